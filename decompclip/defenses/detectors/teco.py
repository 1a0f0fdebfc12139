"""TeCo (Liu et al., 2023): triggered images resist some corruptions and yield to others (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.defenses.detectors.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from decompclip.defenses.detectors.detector import LabelDetector
from decompclip.evaluation.evaluate import Encoder

NEVER = len(SEVERITIES) + 1


class TeCo(LabelDetector):
    """Deviation, over corruptions, of the lowest severity at which an image's label flips; 6 where it never does.

    Every severity is applied to the image itself.

    Args:
        model, classifier, batch_size: as `LabelDetector`.
        corruptions: the paper's twelve by default.
        seed: of what the corruptions draw.
    """

    name: ClassVar[str] = "TeCo"

    def __init__(
        self,
        model: Encoder,
        classifier: Float[Tensor, "class d_embed"],
        *,
        corruptions: Sequence[Corruption] = CORRUPTIONS,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(model, classifier, batch_size=batch_size)
        self.corruptions = tuple(corruptions)
        self.seed = seed

    @property
    def forwards(self) -> int:
        return 1 + len(self.corruptions) * len(SEVERITIES)

    def flips(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch corruption"]:
        """The lowest severity of each corruption at which the label flips, or `NEVER`."""
        label = self._answers(images)
        found = torch.full((len(images), len(self.corruptions)), float(NEVER), dtype=torch.float64)
        for column, corruption in enumerate(self.corruptions):
            for severity in reversed(SEVERITIES):
                flipped = self._answers(corruption(images, severity, seed=self.seed)) != label
                found[flipped.cpu(), column] = severity
        return found

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        return self.flips(images).std(1, correction=0)
