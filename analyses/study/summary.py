"""Over seeds, over models and over images: the intervals and tables that analyses report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from decompclip.figures.curves import Curve
from decompclip.figures.scatter import Point
from decompclip.intervals import mean_interval

GATE = 0.5
"""Share of the clean accuracy that an ablation may leave where it is to say something of a backdoor."""


def carries(before: float, after: float) -> bool:
    """Whether ablated components carry the class: what does not cannot be shown to carry a backdoor."""
    return after <= GATE * before


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


def rate(value: Mapping[str, Any]) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def interval_text(point: Point, digits: int = 1) -> str:
    """`94.8 (93.0..95.9)` for a range, `94.8 [93.0, 95.9]` for an interval."""
    text = f"{point.value:.{digits}f}"
    if point.low is None or point.high is None:
        return text
    if point.note:
        return f"{text} ({point.low:.{digits}f}..{point.high:.{digits}f})"
    return f"{text} [{point.low:.{digits}f}, {point.high:.{digits}f}]"


ENOUGH = 4
"""Models, or attacks, from which on a mean over them has an interval: that of two or three says less than their range."""

SPREAD = f"means with 95 % intervals, of fewer than {ENOUGH} with their range"
"""What `over_models` gives for groups of several sizes."""


def spread(models: int) -> str:
    """What `over_models` gives for so many."""
    if models == 1:
        return "one model"
    return f"mean over {models} models, {'95 % interval' if models >= ENOUGH else 'range'}"


def mean_point(values: Iterable[float]) -> Point:
    """The mean with its 95 % interval by Student's t, models as units; of a few with their range, of one alone."""
    values = list(values)
    if len(values) >= ENOUGH:
        return Point(*mean_interval(torch.tensor(values, dtype=torch.float64)))
    return Point(mean(values), min(values), max(values), "range") if len(values) > 1 else Point(values[0])


def over_models(values: Iterable[float], digits: int = 1) -> str:
    """`94.8 [93.0, 96.6]`, or of a few models `94.8 (93.0..95.9)`: `mean_point` in words."""
    return interval_text(mean_point(values), digits)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


MOST_CURVES = 4
"""As many curves as a panel holds: with more attacks, kinds of trigger are drawn."""


def groups(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of models, by attack where these are few, else by kind of trigger."""
    attacks = by_attack(record)
    if len(attacks) <= MOST_CURVES:
        return attacks
    kinds: dict[str, list[str]] = {}
    for names in attacks.values():
        kinds.setdefault(record["models"][names[0]]["kind"], []).extend(names)
    return {
        f"{kind} ({len(names)} model{'s' if len(names) > 1 else ''})": names for kind, names in kinds.items()
    }


RANGE = "range over models"
"""What the bands of `curve` are."""


def curve(
    x: Sequence[float], values: Sequence[Sequence[float]], thin: Sequence[Sequence[float]] = ()
) -> Curve:
    """Mean over models, `values[model][x]`, and the range over them as a band."""
    columns = list(zip(*values, strict=True))
    several = len(values) > 1
    return Curve(
        x,
        [mean(column) for column in columns],
        [min(column) for column in columns] if several else None,
        [max(column) for column in columns] if several else None,
        [mean(column) for column in zip(*thin, strict=True)] if thin else None,
    )


def markdown(rows: Iterable[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rest))
