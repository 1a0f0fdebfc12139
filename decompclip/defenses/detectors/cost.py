"""What a detector costs, in plain forward passes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.defenses.detectors.detector import Detector


@dataclass(frozen=True)
class Cost:
    """For each image.

    Attributes:
        forwards: forward passes by design.
        ratio: measured time of a score, in times of a plain `encode_image` of the same images, in the same run.
    """

    forwards: int
    ratio: float


@torch.no_grad()
def measure_cost(detector: Detector, images: Float[Tensor, "batch 3 h w"], *, repeats: int = 3) -> Cost:
    """The least of some repeats, of both, one after the other in turns.

    Raises:
        NotFittedError: the detector was not fitted.
        ValueError: no images, or no repeats.
    """
    if not len(images) or repeats < 1:
        raise ValueError(f"expected images and repeats; received {len(images)} images, {repeats} repeats")
    model, plain, scored = detector.model, [], []
    detector.score(images[:1])  # first calls pay for what later ones reuse
    for _ in range(repeats):
        begin = _now()
        for part in images.split(detector.batch_size):
            model.encode_image(model.normalize(part))
        middle = _now()
        detector.score(images)
        plain.append(middle - begin)
        scored.append(_now() - middle)
    return Cost(detector.forwards, min(scored) / min(plain))


def _now() -> float:
    """The time when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
