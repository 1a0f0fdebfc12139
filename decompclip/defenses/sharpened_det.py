"""Detection with a few unlabelled images of the traffic, some of them triggered: what do the odd ones have in common?

Our own. Images that one trigger hijacks leave their class in one direction. The most suspicious images of a mixed batch show it,
and others that went the same way, less far, are found by it. Four triggered images among a hundred are enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition
from decompclip.defenses.agnostic_det import AgnosticDet, calibrated

SUSPICIOUS = 0.02
"""Share of clean images that may be among those that a direction is learnt from."""

LEAST = 4
"""Odd images that have a direction in common: fewer say nothing."""


@dataclass(frozen=True, eq=False)
class SharpenedDet:
    """An `AgnosticDet` that knows which way suspicious images go; made by `sharpen`.

    The score is the detector's plus the offset along the direction, each in standard deviations over clean images.

    Attributes:
        detector: the one that was sharpened.
        direction: a unit vector, of offsets as `Expected.offsets`.
        found: how many images it was learnt from.
        scores_: of the detector's clean images, in rising order.
    """

    detector: AgnosticDet
    direction: Float[Tensor, " d_embed"]
    found: int
    scores_: Float[Tensor, " image"]

    def score(self, d: Decomposition) -> Float[Tensor, " batch"]:
        """Higher is more suspicious.

        Raises:
            ValueError: as `AgnosticDet.look`.
        """
        seen = self.detector.look(d)
        return _sum(
            self.detector,
            self.detector.score_of(seen),
            self.detector.expected_.offsets(seen) @ self.direction,
            self.direction,
        )

    def threshold_at(self, fpr: float) -> float:
        """The score above which a share `fpr` of clean images lies.

        Raises:
            ValueError: a rate outside (0, 1), or finer than the clean images can tell.
        """
        return calibrated(self.scores_, fpr)

    def predict(self, d: Decomposition, *, fpr: float = 0.05) -> Bool[Tensor, " batch"]:
        """Which images are suspicious, at this share of clean ones.

        Raises:
            ValueError: as `score` and `threshold_at`.
        """
        return self.score(d) > self.threshold_at(fpr)


def sharpen(detector: AgnosticDet, mixed: Decomposition) -> AgnosticDet | SharpenedDet:
    """A detector that has seen `mixed`, unlabelled images of which some may be triggered.

    The same detector where no more images look odd than clean ones would, by two standard deviations: there is nothing to
    learn from then. Score other images with it: those that the direction was learnt from have pulled it to themselves.

    Raises:
        NotFittedError: the detector was not fitted.
        ValueError: as `AgnosticDet.look`, or it was fitted on fewer than 49 clean images.
    """
    odd = detector.predict(mixed, fpr=SUSPICIOUS)
    found, expected = int(odd.sum()), SUSPICIOUS * len(mixed)
    if found < max(LEAST, expected + 2 * math.sqrt(expected)):
        return detector
    mean = detector.expected_.offsets(detector.look(mixed[odd])).mean(0)
    direction = mean / mean.norm()
    scores = _sum(detector, detector.scores_, detector.offsets_ @ direction, direction)
    return SharpenedDet(detector, direction, found, scores.sort().values)


def _sum(
    detector: AgnosticDet,
    scores: Float[Tensor, " image"],
    along: Float[Tensor, " image"],
    direction: Float[Tensor, " d_embed"],
) -> Float[Tensor, " image"]:
    clean = detector.offsets_ @ direction
    plain = detector.scores_
    return (scores - plain.mean()) / plain.std() + (along - clean.mean()) / clean.std()
