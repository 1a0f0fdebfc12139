"""Summaries are means of what the runs say."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import ttest_1samp

from decompclip.bench.page import leaderboard, mean_interval


def made(attack: str | None, auroc: float, *, seed: int = 0, asr: float = 0.5) -> dict[str, Any]:
    rate = {"value": asr, "low": 0.0, "high": 1.0}
    detector = {
        "auroc": None if attack is None else {"value": auroc, "low": 0.0, "high": 1.0},
        "tpr": None,
        "fpr": rate,
        "control": {"value": 0.5, "low": 0.4, "high": 0.6},
        "cost": 2.0 + seed,
    }
    repair = {"cacc": rate, "control": rate, "asr": attack and rate, "triggered_accuracy": attack and rate}
    return {"attack": attack, "seed": seed, "detectors": {"D": detector}, "repairs": {"R": repair}}


RUNS = [
    made("a", 0.9),
    made("a", 0.7, seed=1),
    made("a", 0.8, seed=2),
    made("b", 0.6, asr=0.1),
    made(None, 0.0, asr=0.2),
]


def test_an_attack_counts_once_however_many_seeds_it_has() -> None:
    board = leaderboard(RUNS)
    assert board["attacks"] == ["a", "b"]
    found = board["detectors"]["D"]["auroc"]
    assert found["attacks"] == pytest.approx({"a": 0.8, "b": 0.6})
    assert found["mean"]["value"] == pytest.approx(0.7)
    assert (found["mean"]["n"], found["clean"]) == (2, None)
    assert found["mean"]["high"] == 1.0  # of two attacks the interval is wide; a rate is none above 1
    assert board["runs"] == RUNS


def test_clean_models_stand_apart() -> None:
    found = leaderboard(RUNS)["repairs"]["R"]
    assert found["cacc"]["attacks"] == pytest.approx({"a": 0.5, "b": 0.1})
    assert found["cacc"]["clean"] == pytest.approx(0.2)
    assert found["asr"]["clean"] is None


def test_cost_is_no_rate() -> None:
    found = leaderboard(RUNS)["detectors"]["D"]["cost"]["mean"]
    assert found["value"] == pytest.approx((3.0 + 2.0) / 2) and found["high"] > 1
    assert found["low"] == 0.0


def test_intervals_are_students() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    found = mean_interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert mean_interval([0.3]) == {"value": 0.3, "low": None, "high": None, "n": 1}


def test_clean_models_alone_have_no_mean() -> None:
    board = leaderboard(RUNS[-1:])
    assert board["attacks"] == [] and board["detectors"]["D"]["auroc"]["mean"] is None


def test_no_runs() -> None:
    with pytest.raises(ValueError, match="expected at least one run; received none"):
        leaderboard([])
