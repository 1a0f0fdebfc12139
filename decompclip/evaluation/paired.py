"""The difference of two accuracies on the same images, with an interval that knows they are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool
from scipy.special import ndtri
from torch import Tensor

from decompclip.evaluation.intervals import CONFIDENCE


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
        z, n = _z(comparisons), self.total + 2
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
    """The mean of paired differences and its 95 % interval, which takes the mean to be close to normal."""
    mean = float(differences.double().mean())
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = _z(1) * float(differences.double().std()) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def _z(comparisons: int) -> float:
    return float(-ndtri((1 - CONFIDENCE) / 2 / comparisons))
