"""PAR's perturbation: away from the poisoned model's features, up to a threshold.

Source: Singh, Croce and Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP"
(arXiv 2412.00727), whose loss is CLIP's on clean pairs minus half of each tower's squared distance to the features of
the model that it starts from. What a text and an image of a backdoor have in common is moved, and CLIP's loss has the
useful part back.

The authors' code drops a distance from the loss once its mean over the batch is above the threshold; so does this, with
the threshold in its place, which has the same gradient and no jump. Left open by the sources that we read: whether the
logit scale is trained (their code uses its value alone, here it is trained, as everywhere), and how views of images are
made (theirs are augmented; here the pairs are as they come).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.models.clip import HookedCLIP
from decompclip.training.losses import Seen, features_of

FURTHEST = 4.0
"""Squared distance of two unit vectors that point opposite ways."""


@dataclass(frozen=True, eq=False)
class Push:
    """A penalty for `finetune`: minus the distance from a frozen model's features, up to a threshold.

    Made by `Push.from_model`.

    Attributes:
        frozen: the open_clip model to move away from.
        threshold: mean squared distance of unit features, of images and of texts, beyond which nothing is gained.
        weight: of each of the two distances.

    Raises:
        ValueError: a threshold that no distance reaches, or a weight that is not above 0.
    """

    frozen: nn.Module = field(repr=False)
    threshold: float = 2.15
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= FURTHEST:
            raise ValueError(
                f"expected a threshold in (0, {FURTHEST:g}], for unit features are no further apart; received "
                f"{self.threshold}"
            )
        if not self.weight > 0:
            raise ValueError(f"expected a weight above 0; received {self.weight}")

    @staticmethod
    def from_model(model: HookedCLIP, *, threshold: float = 2.15, weight: float = 0.5) -> Push:
        """Away from `model` as it is now.

        Raises:
            MissingTextError: the model has no text tower.
        """
        frozen = model.to_open_clip().float().to(model.device)
        return Push(frozen.eval().requires_grad_(False), threshold, weight)

    def __call__(self, seen: Seen) -> Float[Tensor, ""]:
        with torch.no_grad():
            image, text, _ = features_of(self.frozen.to(seen.pixels.device)(seen.pixels, seen.tokens))
        far = [
            (now - then).square().sum(1).mean().clamp(max=self.threshold)
            for now, then in ((seen.image, image), (seen.text, text))
        ]
        return -self.weight * (far[0] + far[1])
