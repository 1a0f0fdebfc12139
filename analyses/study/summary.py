"""Over seeds and over images: the intervals and tables that analyses report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from decompclip.figures.curves import Curve
from decompclip.figures.scatter import Point

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


FEW = 4
"""As many curves as a panel holds: with more attacks, kinds of trigger are drawn."""


def groups(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of models, by attack where these are few, else by kind of trigger."""
    attacks = by_attack(record)
    if len(attacks) <= FEW:
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
