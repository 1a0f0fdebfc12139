"""Thresholds that hold on fresh clean images."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def calibrated(scores: Float[Tensor, " image"], fpr: float) -> float:
    """The least of the sorted clean `scores` that a fresh clean image exceeds with probability `fpr` at most.

    Raises:
        ValueError: a rate outside (0, 1), or finer than so many images can tell.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"expected a false-positive rate in (0, 1); received {fpr}")
    n = len(scores)
    place = math.ceil((n + 1) * (1 - fpr) - 1e-9)
    if place > n:
        raise ValueError(
            f"expected at least {math.ceil(1 / fpr - 1e-9) - 1} clean images to calibrate a false-positive rate of {fpr}; "
            f"received {n}; fit on more, or ask for a higher rate"
        )
    return float(scores[place - 1])
