"""Over seeds and over images: the intervals that analyses report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from decompclip.figures.panels import Point


def by_attack(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the models of each attack, in the order of the record."""
    found: dict[str, list[str]] = {}
    for name, facts in record["models"].items():
        if name in record["found"]["models"]:
            found.setdefault(facts["attack"], []).append(name)
    return found


def over_seeds(rates: Sequence[Mapping[str, Any]], scale: float = 100) -> Point:
    """One model: the value with its own 95 % interval over images; several: their mean and their range."""
    if len(rates) == 1:
        return Point.of(rates[0], scale)
    values = [scale * rate["value"] for rate in rates]
    mean = sum(values) / len(values)
    return Point(mean, min(values), max(values), f"({len(values)} seeds)")


def said(point: Point, digits: int = 1) -> str:
    """`94.8 (93.0..95.9)` over seeds, `94.8 [93.0, 95.9]` over images."""
    text = f"{point.value:.{digits}f}"
    if point.low is None or point.high is None:
        return text
    if point.note:
        return f"{text} ({point.low:.{digits}f}..{point.high:.{digits}f})"
    return f"{text} [{point.low:.{digits}f}, {point.high:.{digits}f}]"


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
