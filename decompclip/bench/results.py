"""Summaries of runs: by attack, and over attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import t

from decompclip.intervals import CONFIDENCE

DETECTION = ("auroc", "tpr", "fpr", "control", "cost")
REPAIR = ("cacc", "asr", "control", "triggered_accuracy")


def leaderboard(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every run, and their summary, ready for JSON.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("expected at least one run; received none")
    return {
        "attacks": attacks(runs),
        "detectors": _table(runs, "detectors", DETECTION),
        "repairs": _table(runs, "repairs", REPAIR),
        "runs": list(runs),
    }


def attacks(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["attack"] for run in runs if run["attack"]))


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean with the 95 % interval of Student's t over independent values; of one value there is no interval."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return {"value": mean, "low": None, "high": None, "n": n}
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def _table(runs: Sequence[dict[str, Any]], part: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Name -> metric -> mean by attack (over twins and seeds), mean over attacks, and the clean models' own.

    An attack counts once, whether it has one twin or three.
    """
    names = dict.fromkeys(name for run in runs for name in run[part])
    return {name: {metric: _cells(runs, part, name, metric) for metric in metrics} for name in names}


def _cells(runs: Sequence[dict[str, Any]], part: str, name: str, metric: str) -> dict[str, Any]:
    by_attack: dict[str, list[float]] = {}
    clean = []
    for run in runs:
        value = _value(run[part].get(name, {}).get(metric))
        if value is not None:
            (by_attack.setdefault(run["attack"], []) if run["attack"] else clean).append(value)
    means = {attack: sum(values) / len(values) for attack, values in by_attack.items()}
    bounds = _bounds(metric)
    mean = mean_interval(list(means.values())) if means else None
    if mean and mean["low"] is not None:
        mean |= {"low": max(bounds[0], mean["low"]), "high": min(bounds[1], mean["high"])}
    return {"attacks": means, "mean": mean, "clean": sum(clean) / len(clean) if clean else None}


def _bounds(metric: str) -> tuple[float, float]:
    return (0.0, math.inf) if metric == "cost" else (0.0, 1.0)


def _value(found: Any) -> float | None:
    return found["value"] if isinstance(found, dict) else found
