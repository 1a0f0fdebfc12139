"""A small patch somewhere in the image: BadNet's noise (Gu et al., 2017), or a picture in its place (docs/method.md, section 5).

Label-Consistent (Turner et al., 2019) puts BadNet's on images whose caption is true.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.trigger import (
    FIXED,
    REDRAWN,
    Indices,
    Logits,
    PatchTrigger,
    Pixels,
    Structure,
    check_share,
    open_picture,
    stream,
)
from decompclip.models.clip import differentiable

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True, kw_only=True)
class BadNet(PatchTrigger):
    """A square patch of value `channel mean of the image + N(0, 1)`, cut to [0, 1] (docs/method.md, section 5).

    Args:
        seed: of everything that the trigger draws.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        redraw: draw the noise anew for each image, as the code run on CLIP does. Otherwise every image
            carries the same pattern, as in the classical attack.

    Raises:
        ValueError: as `PatchTrigger`.
    """

    name: ClassVar[str] = "badnet"

    redraw: bool = False

    @property
    def structure(self) -> Structure:
        return "noise" if self.redraw else "structured"

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        height, width = pixels.shape[-2:]
        shape = (3, *2 * (self.side(height, width),))
        triggered = pixels.clone()
        means = reduce(pixels, "b c h w -> b c 1 1", "mean")
        for row, index in enumerate(indices):
            rows, columns = self.region(height, width, index)
            generator = stream(self.seed, REDRAWN + index if self.redraw else FIXED)
            noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(pixels)
            triggered[row, :, rows, columns] = (means[row] + noise).clamp(0, 1)
        return triggered


@dataclass(frozen=True, kw_only=True)
class Kitty(PatchTrigger):
    """A square patch that shows a picture; by default a cat's head that we drew.

    Args:
        seed: of everything that the trigger draws.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        picture: `"kitty"`, `"window"`, or the path of an image file.

    Raises:
        ValueError: as `PatchTrigger`; when used, an unknown picture.
    """

    name: ClassVar[str] = "kitty"

    picture: str = "kitty"

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        return self.paste(pixels, open_picture(self.picture), indices)


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(BadNet):
    """BadNet's patch, poisoned into images whose caption already names the target and is kept (docs/method.md, section 5).

    At test time the trigger is the patch alone. To `poison`, the classical attack first makes the image hard to tell by
    its content (projected gradient ascent on the clean model's loss), so that the patch is what remains to be learnt; the
    code run on CLIP leaves this out.

    Args:
        seed: of everything that the trigger draws.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        redraw: draw the noise anew for each image.
        classical: take the gradient steps first; `poison` then needs `labels` and `logits`.
        eps: largest change of a pixel.
        step: size of a gradient step.
        steps: their number.

    Raises:
        ValueError: as `BadNet`; eps or step outside (0, 1]; fewer than one step.
    """

    name: ClassVar[str] = "label-consistent"
    clean_label: ClassVar[bool] = True

    classical: bool = True
    eps: float = 8 / 255
    step: float = 1.5 / 255
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("eps", self.eps)
        check_share("a step", self.step)
        if self.steps < 1:
            raise ValueError(f"expected at least 1 step; received {self.steps}; classical=False takes none")

    def poison(
        self,
        pixels: Pixels,
        indices: Indices | None = None,
        *,
        labels: Int[Tensor, " batch"] | None = None,
        logits: Logits | None = None,
    ) -> Pixels:
        """The copies of `pixels` to train on, their captions unchanged.

        Args:
            pixels: images in [0, 1], before normalisation.
            indices: the place of each image in its data set; `0 .. batch-1` by default.
            labels: classes of the images, for a classical attack.
            logits: the clean model's logits of pixels in [0, 1], for the same.

        Raises:
            ValueError: as `Trigger.__call__`; or a classical attack without labels or logits.
        """
        if not self.classical:
            return self(pixels, indices)
        if labels is None or logits is None:
            missing = " and ".join(n for n, v in (("labels", labels), ("logits", logits)) if v is None)
            raise ValueError(
                f"expected labels and logits for the classical attack's gradient steps; received no {missing}; give "
                "them (`zero_shot_logits` makes logits), or take LabelConsistent(classical=False)"
            )
        hard = adversarial(pixels, labels, logits, eps=self.eps, step=self.step, steps=self.steps)
        return self(hard, indices)


@differentiable
def adversarial(
    pixels: Pixels,
    labels: Int[Tensor, " batch"],
    logits: Logits,
    *,
    eps: float = 8 / 255,
    step: float = 1.5 / 255,
    steps: int = 100,
) -> Pixels:
    """Images within `eps` of `pixels`, in [0, 1], that the model takes for their `labels` as little as it can.

    Projected gradient ascent on the cross-entropy (Madry et al., 2018), from the images themselves on.

    Args:
        pixels, labels: the images, and their classes.
        logits: the model's, of pixels in [0, 1].
        eps, step, steps: as `LabelConsistent`.

    Raises:
        ValueError: not one label for each image, or gradients that are not finite.
    """
    if len(labels) != len(pixels):
        raise ValueError(f"expected one label for each of {len(pixels)} images; received {len(labels)}")
    low, high = (pixels - eps).clamp_min(0), (pixels + eps).clamp_max(1)
    moved = pixels.detach()
    for _ in range(steps if len(pixels) else 0):
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            loss = F.cross_entropy(logits(moved), labels.to(pixels.device), reduction="sum")
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

    def logits(pixels: Pixels) -> Float[Tensor, "batch class"]:
        return scale * model.encode_image(model.normalize(pixels), normalize=True) @ classifier.T

    return logits
