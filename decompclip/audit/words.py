"""Numbers with their intervals as the report's text, and the sizes by which it names an effect."""

from __future__ import annotations

import math

from decompclip.audit.checks import Change, Setting
from decompclip.intervals import Rate

STRONG, WEAK = 0.5, 0.1
"""Differences (of shares) that the lower end of an interval must pass to be called large, or more than small; where an
effect's absence is spoken of, the upper end may be `WEAK` at most."""

EXPLAINED = 0.9
"""Share of the suspect images' effect which another cause must reach to explain it."""

FEW = 100
"""Images below which a set is called small."""


def share(rate: Rate) -> str:
    """A share with its interval."""
    if not rate.total:
        return "not measurable (no images)"
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def rate(value: Rate | None) -> str:
    """`share`, or a dash where it is not known."""
    return "–" if value is None or not value.total else share(value)


def points(value: float, interval: tuple[float, float]) -> str:
    """A difference of shares with its interval, in percentage points."""
    low, high = interval
    return f"{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def difference(setting: Setting) -> str:
    """What suspect images add in this setting: attack success less control."""
    return points(setting.difference, setting.difference_interval)


def plus_minus(value: float, error: float, *, sign: bool = True) -> str:
    """A number with the half-width of its 95 % interval."""
    known = "unknown" if math.isnan(error) else f"{error:.4f}"
    return f"{value:{'+' if sign else ''}.4f} ± {known}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """`1 head`, `2 heads`, `no heads`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def cost(change: Change) -> str:
    """The change of clean accuracy."""
    if change.cost is None:
        return "–"
    value, low, high = change.cost
    return points(-value, (-high, -low))


def outcome(change: Change) -> str:
    """Of the images sent to the target: the share that no longer is, and the share that gets its own class back."""
    back = "not known without labels" if change.restored is None else share(change.restored)
    return f"Of the images sent to the target, no longer the target: {share(change.saved)}; own class back: {back}"
