"""SCALE-UP (Guo et al., 2023): a triggered image keeps its label when its pixels are multiplied (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.defenses.detectors.detector import LabelDetector
from decompclip.evaluation.evaluate import Encoder


class ScaleUp(LabelDetector):
    """Share of the copies `min(n x, 1)` that keep the image's label.

    Args:
        model, classifier, batch_size: as `LabelDetector`.
        factors: of the copies.
    """

    name: ClassVar[str] = "SCALE-UP"

    def __init__(
        self,
        model: Encoder,
        classifier: Float[Tensor, "class d_embed"],
        *,
        factors: Sequence[int | float] = (3, 5, 7, 9, 11),
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, classifier, batch_size=batch_size)
        self.factors = tuple(factors)

    @property
    def forwards(self) -> int:
        return 1 + len(self.factors)

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        label = self._answers(images)
        kept = [self._answers((factor * images).clamp(max=1)) == label for factor in self.factors]
        return torch.stack(kept).double().mean(0)
