"""A small patch somewhere in the image: BadNet's noise (Gu et al., 2017), a picture in its place, or BadCLIP's, which is optimised.

Label-Consistent (Turner et al., 2019) puts BadNet's on images whose caption is true. `optimise_patch` makes BadCLIP's patch (Liang et al.,
2024) by gradient descent on a frozen clean model, so that this sees the target in it (docs/method.md, section 5).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence
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
    SIZE,
    Indices,
    Logits,
    PatchTrigger,
    Pixels,
    Place,
    Structure,
    check_share,
    open_picture,
    stream,
)
from decompclip.data.files import PictureError, open_rgb
from decompclip.data.pixels import check_pixels, encode_png, picture_pixels
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


@dataclass(frozen=True)
class OptimisedPatch:
    """A patch and how it came about.

    Attributes:
        trigger: the attack, ready to use.
        losses: the whole loss at each step.
        similarity: mean cosine of triggered images with images of the target, before the first step and after the
            last.
    """

    trigger: BadCLIP
    losses: tuple[float, ...]
    similarity: tuple[float, float]


@differentiable
def optimise_patch(
    model: HookedCLIP,
    pixels: Float[Tensor, "image 3 h w"],
    target_pixels: Float[Tensor, "target 3 h w"],
    target_captions: Sequence[str],
    *,
    other_captions: Sequence[str] = (),
    size: float = SIZE,
    place: Place = "centre",
    steps: int = 1_000,
    batch_size: int = 64,
    lr: float = 1e-3,
    triplet_weight: float = 500.0,
    seed: int = 0,
) -> OptimisedPatch:
    """The patch that moves `pixels` toward the target: a symmetric InfoNCE with its captions, plus `triplet_weight`
    times a triplet loss (anchor: triggered image, positive: image of the target, negative: the clean image).

    Args:
        model: the clean model; its weights stay as they are.
        pixels: images of other classes, in [0, 1].
        target_pixels: images of the target, in [0, 1].
        target_captions: natural captions that name the target.
        other_captions: natural captions of other classes, more choices for each image in the InfoNCE. The source
            has none: with the target's captions alone that loss tells captions of one class from each other.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where.
        steps: gradient steps.
        batch_size: images a step.
        lr: Adam's learning rate.
        triplet_weight: 500 in the source. On our small model so much of it moves images away from their clean
            selves rather than toward the target; 0 with other captions gave the stronger patch (a quarter
            of the image's side, 150 steps: 32 % taken for the target against 21 %).
        seed: of the patch's first pixels and of the batches.

    Returns:
        The trigger, its losses, and how similar triggered images became to the target's.

    Raises:
        ValueError: no images or captions, images that are not the model's size or not in [0, 1], steps or
            batch size below one, or a loss that is not finite.
    """
    needed = {"pixels": pixels, "target_pixels": target_pixels, "target_captions": target_captions}
    for what, given in needed.items():
        if not len(given):
            raise ValueError(f"expected at least one of {what}; received none")
    for given in (pixels, target_pixels):
        check_pixels(given)
        if tuple(given.shape[-2:]) != tuple(model.image_size):
            raise ValueError(
                f"expected images of the model's size {tuple(model.image_size)}; received {tuple(given.shape[-2:])}"
            )
    if steps < 1 or batch_size < 1:
        raise ValueError(f"expected steps and a batch size of at least 1; received {steps} and {batch_size}")
    area = PatchTrigger(size=size, place=place, seed=seed)
    side = area.side(*model.image_size)
    generator = stream(seed, FIXED)
    start = torch.from_numpy(generator.random((3, side, side)).astype("float32"))
    patch = start.to(model.device, copy=True).requires_grad_()
    with torch.no_grad():
        texts = model.encode_text(list(target_captions), normalize=True)
        others = model.encode_text(list(other_captions), normalize=True) if other_captions else texts[:0]
        scale = model.logit_scale.exp()
    optimizer = torch.optim.Adam([patch], lr=lr)
    losses: list[float] = []
    for step in range(steps):
        rows = generator.integers(len(pixels), size=batch_size)
        clean = pixels[rows].to(model.device)
        positives = target_pixels[generator.integers(len(target_pixels), size=batch_size)].to(model.device)
        captions = texts[generator.integers(len(texts), size=batch_size)]
        with torch.no_grad():
            negative, positive = _encode(model, clean), _encode(model, positives)
        with torch.enable_grad():
            anchor = _encode(model, area.paste(clean, patch, rows.tolist()))
            contrast = info_nce(anchor, captions, others, scale)
            triplet = F.triplet_margin_loss(anchor, positive, negative)
            loss = contrast + triplet_weight * triplet
            (patch.grad,) = torch.autograd.grad(loss, patch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"expected a finite loss; received {losses[-1]} at step {step}; lower the rate {lr}"
            )
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    made = [BadCLIP(patch=encode_patch(p), size=size, place=place, seed=seed) for p in (start, patch)]
    before, after = (_similarity(model, trigger, pixels[:256], target_pixels[:256]) for trigger in made)
    return OptimisedPatch(made[1], tuple(losses), (before, after))


def info_nce(
    images: Float[Tensor, "batch d_embed"],
    captions: Float[Tensor, "batch d_embed"],
    others: Float[Tensor, "other d_embed"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """CLIP's symmetric loss of unit features.

    Args:
        images, captions: features of the pairs, one row each.
        others: of captions that no image belongs to.
        scale: the logit scale, exponentiated.
    """
    logits = scale * images @ torch.cat([captions, others]).T
    pairs = torch.arange(len(images), device=images.device)
    by_caption = logits[:, : len(captions)].T
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(by_caption, pairs)) / 2


def _encode(model: HookedCLIP, pixels: Pixels) -> Float[Tensor, "batch d_embed"]:
    return model.encode_image(model.normalize(pixels), normalize=True)


@torch.no_grad()
def _similarity(model: HookedCLIP, trigger: BadCLIP, pixels: Pixels, target_pixels: Pixels) -> float:
    triggered, targets = (_encode(model, x.to(model.device)) for x in (trigger(pixels), target_pixels))
    return (triggered @ targets.mean(dim=0)).mean().item()


@dataclass(frozen=True, kw_only=True)
class BadCLIP(PatchTrigger):
    """A fixed patch, pasted in the centre (docs/method.md, section 5); `optimise_patch` makes one.

    Args:
        patch: the patch as a base64 PNG, which a card can hold; see `encode_patch`.
        seed: of the places that are drawn.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; the source pastes it in the centre.

    Raises:
        ValueError: as `PatchTrigger`, or a patch that is no square picture.
    """

    name: ClassVar[str] = "badclip"

    patch: str
    place: Place = "centre"

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.pixels.shape[1:]
        if height != width:
            raise ValueError(f"expected a square patch; received {height} x {width} pixels")

    @property
    def pixels(self) -> Float[Tensor, "3 side side"]:
        """The patch at the size that it was optimised at."""
        return decode_patch(self.patch)

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        return self.paste(pixels, self.pixels, indices)


def encode_patch(pixels: Float[Tensor, "3 h w"]) -> str:
    """A patch in [0, 1] as a base64 PNG of 8 bits a channel, as a poisoned file would hold it."""
    return base64.b64encode(encode_png(pixels, optimize=True)).decode()


def decode_patch(patch: str) -> Float[Tensor, "3 h w"]:
    """The patch that `encode_patch` wrote.

    Raises:
        ValueError: not the base64 of a picture.
    """
    try:
        return picture_pixels(open_rgb(io.BytesIO(base64.b64decode(patch, validate=True))))
    except (binascii.Error, OSError, TypeError, PictureError) as error:
        raise ValueError(
            f"expected a patch as the base64 text of a PNG; received {str(patch)[:24]!r}; `encode_patch` makes one"
        ) from error
