"""Label-Consistent (Turner et al., 2019): the patch on images whose caption is true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.badnet import BadNet
from decompclip.attacks.trigger import SIZE, Extent, Logits, Place, Structure, Trigger, check_share
from decompclip.models.gradients import differentiable

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(Trigger):
    """BadNet's patch, poisoned into images whose caption already names the target and is kept (docs/method.md, section 5).

    At test time the trigger is the patch alone. To `poison`, the classical attack first makes the image
    hard to tell by its content (projected gradient ascent on the clean model's loss), so that the patch is
    what remains to be learnt; the code run on CLIP leaves this out.

    Args:
        size, place, redraw: as `BadNet`.
        classical: take the gradient steps first; `poison` then needs `labels` and `logits`.
        eps, step, steps: largest change of a pixel, size and number of the gradient steps.

    Raises:
        ValueError: as `BadNet`; eps or step outside (0, 1]; fewer than one step.
    """

    name: ClassVar[str] = "label-consistent"
    extent: ClassVar[Extent] = "local"
    clean_label: ClassVar[bool] = True

    size: float = SIZE
    place: Place = "random"
    redraw: bool = False
    classical: bool = True
    eps: float = 8 / 255
    step: float = 1.5 / 255
    steps: int = 100

    def __post_init__(self) -> None:
        _ = self._badnet  # its checks are ours
        check_share("eps", self.eps)
        check_share("a step", self.step)
        if self.steps < 1:
            raise ValueError(f"expected at least 1 step; received {self.steps}; classical=False takes none")

    @property
    def structure(self) -> Structure:
        return self._badnet.structure

    @property
    def _badnet(self) -> BadNet:
        return BadNet(seed=self.seed, size=self.size, place=self.place, redraw=self.redraw)

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        return self._badnet(images, indices)

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"] = (0,)
    ) -> Bool[Tensor, "batch h w"]:
        return self._badnet.mask(height, width, indices)

    def poison(
        self,
        images: Float[Tensor, "batch 3 h w"],
        indices: Sequence[int] | Int[Tensor, " batch"] | None = None,
        *,
        labels: Int[Tensor, " batch"] | None = None,
        logits: Logits | None = None,
    ) -> Float[Tensor, "batch 3 h w"]:
        """The copies of `images` to train on, their captions unchanged.

        Raises:
            ValueError: as `Trigger.__call__`; or a classical attack without labels or logits.
        """
        if not self.classical:
            return self(images, indices)
        if labels is None or logits is None:
            missing = " and ".join(n for n, v in (("labels", labels), ("logits", logits)) if v is None)
            raise ValueError(
                f"expected labels and logits for the classical attack's gradient steps; received no {missing}; give "
                "them (`zero_shot_logits` makes logits), or take LabelConsistent(classical=False)"
            )
        hard = adversarial(images, labels, logits, eps=self.eps, step=self.step, steps=self.steps)
        return self(hard, indices)


@differentiable
def adversarial(
    images: Float[Tensor, "batch 3 h w"],
    labels: Int[Tensor, " batch"],
    logits: Logits,
    *,
    eps: float = 8 / 255,
    step: float = 1.5 / 255,
    steps: int = 100,
) -> Float[Tensor, "batch 3 h w"]:
    """Images within `eps` of `images`, in [0, 1], that the model takes for their `labels` as little as it can.

    Projected gradient ascent on the cross-entropy (Madry et al., 2018), from the images themselves on.

    Raises:
        ValueError: not one label for each image, or gradients that are not finite.
    """
    if len(labels) != len(images):
        raise ValueError(f"expected one label for each of {len(images)} images; received {len(labels)}")
    low, high = (images - eps).clamp_min(0), (images + eps).clamp_max(1)
    moved = images.detach()
    for _ in range(steps if len(images) else 0):
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            loss = F.cross_entropy(logits(moved), labels.to(images.device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
        if not math.isfinite(gradient.abs().sum().item()):
            raise ValueError(
                "expected finite gradients of the model's loss; received others; run it in float32"
            )
        moved = torch.minimum(torch.maximum(moved + step * gradient.sign(), low), high)
    return moved.detach()


@differentiable
def zero_shot_logits(model: HookedCLIP, classifier: Float[Tensor, "class d_embed"]) -> Logits:
    """The logits of a zero-shot classifier as a function of pixels in [0, 1]."""
    scale = model.logit_scale.exp().detach()

    def logits(pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch class"]:
        return scale * model.encode_image(model.normalize(pixels), normalize=True) @ classifier.T

    return logits
