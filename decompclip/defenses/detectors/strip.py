"""STRIP (Gao et al., 2019): a trigger still rules when another image is laid over (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.defenses.detectors.detector import LabelDetector, Scaled, need


class STRIP(LabelDetector):
    """Minus the mean entropy of the answers to an image with each of `n` clean ones laid over it.

    Args:
        model, classifier, batch_size: as `LabelDetector`; the model has CLIP's logit scale.
        n: superimposed images; 64 in the paper.
        weight: of the image itself in the sum; half of each, as here, keeps pixels in [0, 1].
        seed: of which clean images are laid over.
    """

    name: ClassVar[str] = "STRIP"
    learns: ClassVar[bool] = True
    overlays_: Float[Tensor, "n 3 h w"]

    def __init__(
        self,
        model: Scaled,
        classifier: Float[Tensor, "class d_embed"],
        *,
        n: int = 64,
        weight: float = 0.5,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(model, classifier, batch_size=batch_size)
        self.scale = model.logit_scale
        self.n = n
        self.weight = weight
        self.seed = seed

    @property
    def forwards(self) -> int:
        return self.n

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        # the n images of the lowest draws: a sample of all, whatever their order and number
        generator = torch.Generator().manual_seed(self.seed)
        kept, draws = None, torch.zeros(0)
        for part in batches:
            images = part if kept is None else torch.cat([kept, part])
            draws = torch.cat([draws, torch.rand(len(images) - len(draws), generator=generator)])
            best = draws.argsort()[: self.n].sort().values
            kept, draws = images[best], draws[best]
        need(len(draws), self.n, "to lay over others")
        assert kept is not None
        self.overlays_ = kept

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        overlays = self.overlays_.to(images)
        return torch.stack([-self._entropy(self.weight * x + (1 - self.weight) * overlays) for x in images])

    def _entropy(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
        logits = torch.cat([self._cosines(part) for part in images.split(self.batch_size)]) * self.scale.exp()
        return torch.distributions.Categorical(logits=logits).entropy().mean()
