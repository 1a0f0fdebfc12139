"""Shares with their uncertainty, and differences of shares: 95 % intervals, the one confidence of the package.

Rate, wilson           of a share
Redrawn                of a share, over several draws of what was fitted on
difference_interval    of the difference of two shares of different images
Paired, mean_interval  of a difference on the same images
half_width             of many means at once
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from jaxtyping import Bool, Float
from scipy.special import ndtri
from scipy.stats import t
from torch import Tensor

CONFIDENCE = 0.95
"""Of every interval of the package."""


def z_for(comparisons: int = 1) -> float:
    """Half-width of an interval in standard errors, where the estimate is close to normal.

    Args:
        comparisons: how many such intervals shall hold all together (Bonferroni).
    """
    return float(-ndtri((1 - CONFIDENCE) / 2 / comparisons))


Z = z_for()


def t_for(count: int) -> float:
    """The same for the mean of `count` numbers whose spread is known from them alone: Student's t."""
    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1))


def wilson(share: float, trials: int | float) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen in `trials` trials.

    `scipy.stats.binomtest` gives the same for whole counts; an AUROC's effective number of trials is not
    whole (see `decompclip.evaluation.metrics.auroc_interval`).

    Raises:
        ValueError: `share` is no share, or there were no trials.
    """
    if not (0 <= share <= 1 and trials > 0):
        raise ValueError(
            f"expected a share in 0..1 of more than 0 trials; received {share} of {trials}; a `Rate` of "
            "nothing has the interval 0..1"
        )
    widening = 1 + Z**2 / trials
    centre = (share + Z**2 / (2 * trials)) / widening
    half = Z / widening * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    # min and max guard the rounding at shares of exactly 0 and 1
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


@dataclass(frozen=True)
class Rate:
    """`count` of `total` images, with a 95 % Wilson interval.

    A rate of nothing (`total == 0`) has the value nan and the interval 0..1: any share is possible.
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total:
            raise ValueError(f"expected 0 <= count <= total; received count {self.count} of {self.total}")

    @classmethod
    def of(cls, hits: Bool[Tensor, " n"]) -> Rate:
        """The share of true entries."""
        return cls(int(hits.sum()), hits.numel())

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def low(self) -> float:
        return wilson(self.value, self.total)[0] if self.total else 0.0

    @property
    def high(self) -> float:
        return wilson(self.value, self.total)[1] if self.total else 1.0

    def __str__(self) -> str:
        if not self.total:
            return "no images"
        return _percent(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no nan: the value of a rate of nothing is None."""
        value = self.value if self.total else None
        return {"count": self.count, "total": self.total, "value": value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Redrawn:
    """One rate on the same images, measured after each of several independent draws of what was fitted on.

    With 95 %, one more draw gives a rate between `low` and `high`, on all images of the kind: Student's t over the draws
    and Wilson's interval over the images, their half-widths added in quadrature.
    """

    rates: tuple[Rate, ...]

    def __post_init__(self) -> None:
        totals = {rate.total for rate in self.rates}
        if len(totals) != 1 or 0 in totals:
            raise ValueError(
                f"expected rates on the same images, at least one; received {len(self.rates)} rates of "
                f"{sorted(totals)} images; measure every draw on the same ones"
            )

    @property
    def value(self) -> float:
        return fmean(rate.value for rate in self.rates)

    @property
    def low(self) -> float:
        return max(0.0, self.value - self._half(wilson(self.value, self.rates[0].total)[0]))

    @property
    def high(self) -> float:
        return min(1.0, self.value + self._half(wilson(self.value, self.rates[0].total)[1]))

    def _half(self, end: float) -> float:
        n = len(self.rates)
        if n < 2:
            return 1.0  # one draw does not tell how much they differ
        spread = stdev(rate.value for rate in self.rates) * math.sqrt(1 + 1 / n)
        return math.hypot(t_for(n) * spread, end - self.value)

    def __str__(self) -> str:
        return _percent(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the value of every draw."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return ends | {"total": self.rates[0].total, "draws": [rate.value for rate in self.rates]}


def _percent(rate: Rate | Redrawn) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def difference_interval(a: Rate, b: Rate) -> tuple[float, float]:
    """95 % interval of `a.value - b.value`: Newcombe's hybrid of the two Wilson intervals (his method 10).

    The samples are taken as independent. For paired images, whose outcomes tend to agree, the interval is then too wide
    rather than too narrow. Without images on either side it is -1..1.
    """
    if not (a.total and b.total):
        return -1.0, 1.0
    difference = a.value - b.value
    down = math.hypot(a.value - a.low, b.high - b.value)
    up = math.hypot(a.high - a.value, b.value - b.low)
    return difference - down, difference + up


@dataclass(frozen=True)
class Paired:
    """Of `total` images, `gained` are right in the second way alone, and `lost` in the first way alone."""

    gained: int
    lost: int
    total: int

    @classmethod
    def of(cls, before: Bool[Tensor, " batch"], after: Bool[Tensor, " batch"]) -> Paired:
        """Counted from which images are right in the one way and in the other."""
        return cls(int((after & ~before).sum()), int((before & ~after).sum()), len(before))

    @property
    def value(self) -> float:
        """Accuracy of the second way minus that of the first."""
        return (self.gained - self.lost) / self.total

    def interval(self, comparisons: int = 1) -> tuple[float, float]:
        """95 % interval of `value`: Bonett and Price's adjusted Wald interval for paired shares (2012).

        Args:
            comparisons: how many such intervals shall hold all together (Bonferroni).
        """
        z, n = z_for(comparisons), self.total + 2
        up, down = (self.gained + 1) / n, (self.lost + 1) / n
        half = z * math.sqrt(max(0.0, up + down - (up - down) ** 2) / n)
        return max(-1.0, min(self.value, up - down - half)), min(1.0, max(self.value, up - down + half))


def noticeable(total: int, *, comparisons: int, margin: float) -> float | None:
    """The least difference, all gain and no loss, whose interval would lie above `margin`; None if none would."""
    for gained in range(total + 1):
        if Paired(gained, 0, total).interval(comparisons)[0] > margin:
            return gained / total
    return None


def mean_interval(differences: Tensor) -> tuple[float, float, float]:
    """The mean of paired differences and its 95 % interval by Student's t; of one difference, all numbers."""
    mean = float(differences.double().mean())
    half = float(half_width(differences.double())) if len(differences) > 1 else math.inf
    return mean, mean - half, mean + half


def half_width(values: Float[Tensor, "image ..."]) -> Tensor:
    """Half-widths of the intervals of means over the first axis, by Student's t; nan where there is one value."""
    n = len(values)
    return (
        values.std(dim=0) * (t_for(n) / math.sqrt(n))
        if n > 1
        else values.new_full(values.shape[1:], math.nan)
    )
