"""BadCLIP (Liang et al., 2024): a patch optimised so that the clean model sees the target in it.

`optimise_patch` makes the patch by gradient descent on a frozen clean model (docs/method.md, section 5).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.trigger import FIXED, SIZE, PatchTrigger, Pixels, Place, stream
from decompclip.data.files import PictureError, open_rgb
from decompclip.data.pixels import check_pixels, encode_png, picture_pixels
from decompclip.models.clip import differentiable

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


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
    margin: float = 1.0,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
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
        margin: of the triplet loss.
        seed: of the patch's first pixels and of the batches.
        log: gets the loss as text, every hundred steps.

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
            triplet = F.triplet_margin_loss(anchor, positive, negative, margin=margin)
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
        if log is not None and (step + 1) % 100 == 0:
            log(
                f"step {step + 1}: loss {losses[-1]:.3f}, InfoNCE {contrast.item():.3f}, triplet {triplet.item():.3f}"
            )
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
