"""What is wrong with a tensor of pixels, told from its numbers alone, and the pixels put right."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.diagnosis.result import Evidence, Fault

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the three channels."""

NORMALISATIONS: dict[str, Normalisation] = {
    "OpenAI's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "Inception's (0.5)": ((0.5,) * 3, (0.5,) * 3),
    "no": ((0.0,) * 3, (1.0,) * 3),
}
"""Those in use among CLIPs: OpenAI's in most, Inception's in SigLIP, ImageNet's in CLIPA."""

OVERSHOOT = 0.2
"""How far pixels in [0, 1] may lie outside: resampling overshoots at edges."""

MOST_NORMALISED = 8.0
"""Above every normalised pixel; integers kept as floating point pass it."""

DIVIDED_TWICE = 1 / 64
"""Pixels in 0..255 that are divided by 255 twice end below."""


@dataclass(frozen=True)
class Repaired:
    """Pixels in [0, 1] of the tower's size, and what was wrong with those that were given."""

    pixels: Float[Tensor, "batch 3 h w"]
    faults: tuple[Fault, ...]


def normalise(pixels: Float[Tensor, "batch 3 h w"], by: Normalisation) -> Float[Tensor, "batch 3 h w"]:
    """Pixels less the mean, by the standard deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in by)
    return (pixels - mean) / std


def denormalise(images: Float[Tensor, "batch 3 h w"], by: Normalisation) -> Float[Tensor, "batch 3 h w"]:
    """The pixels that `normalise` made `images` of."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in by)
    return images * std + mean


def resize(
    pixels: Float[Tensor, "batch 3 h w"], size: tuple[int, int]
) -> Float[Tensor, "batch 3 rows columns"]:
    """The same pictures in another size, squashed if need be."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)


def repair(images: Tensor, *, size: tuple[int, int], own: Normalisation) -> Repaired:
    """Bring a tensor to pixels in [0, 1] of the tower's size, and say what had to be done.

    Args:
        own: the model's normalisation, the first to be thought of where the images are normalised already.

    Raises:
        ValueError: it is no batch of RGB images, empty, or not finite.
    """
    images, faults = _channels_first(images)
    if not images.numel():
        raise ValueError(f"expected at least one image; received a tensor of shape {list(images.shape)}")
    if not images.is_floating_point():
        most = 255 if float(images.max()) <= 255 else 65535
        faults.append(
            _fault(
                f"the pixels are integers ({str(images.dtype).removeprefix('torch.')})",
                images,
                f"divide them by {most} before they are normalised",
            )
        )
        images = images.float() / most
    pixels = images.float()
    if not pixels.isfinite().all():
        bad = int((~pixels.isfinite().flatten(1).all(dim=1)).sum())
        raise ValueError(
            f"expected finite pixels; received nan or inf in {bad} of {len(pixels)} images; mend or leave them out"
        )
    pixels, found = _in_unit_range(pixels, own)
    faults += found
    if tuple(pixels.shape[-2:]) != size:
        given, wanted = (f"{h} x {w}" for h, w in (tuple(pixels.shape[-2:]), size))
        faults.append(
            Fault(
                "resolution",
                "error",
                f"the images are of {given} pixels, and the tower is for {wanted}",
                (),
                f"resize them to {wanted}, as the model's `preprocess` does; here it was done for the other checks",
            )
        )
        pixels = resize(pixels, size)
    return Repaired(pixels, tuple(faults))


def _channels_first(images: Tensor) -> tuple[Tensor, list[Fault]]:
    if images.ndim == 4 and images.shape[1] == 3:
        return images, []
    if images.ndim == 4 and images.shape[-1] == 3:
        what = f"the channels stand last, {list(images.shape)}"
        return images.permute(0, 3, 1, 2), [
            Fault(
                "pixels", "error", what, (), "move them behind the batch axis: `images.permute(0, 3, 1, 2)`"
            )
        ]
    raise ValueError(
        f"expected pixels [batch, 3, h, w] in [0, 1]; received {list(images.shape)}; stack RGB images along a batch axis"
    )


def _in_unit_range(pixels: Tensor, own: Normalisation) -> tuple[Tensor, list[Fault]]:
    low, high = float(pixels.min()), float(pixels.max())
    if low >= -OVERSHOOT and high > MOST_NORMALISED:
        most = 255 if high <= 256 else 65535
        remedy = f"divide them by {most} before they are normalised"
        return pixels / most, [_fault(f"the pixels are in 0..{most}, not in 0..1", pixels, remedy)]
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        name, undone = _undo(pixels, own)
        what = (
            "the pixels are normalised already" if name else "the pixels are in no range that pixels are in"
        )
        remedy = "give pixels in [0, 1], which `diagnose` and `model.normalize` normalise; "
        remedy += f"here {name} normalisation was undone" if name else "here they were stretched to [0, 1]"
        return undone, [_fault(what, pixels, remedy)]
    if 0 < high < DIVIDED_TWICE:
        remedy = "divide by 255 once"
        return pixels * 255, [_fault("the pixels are all but black: divided by 255 twice", pixels, remedy)]
    return pixels, []


def _undo(pixels: Tensor, own: Normalisation) -> tuple[str | None, Tensor]:
    """The normalisation that, undone, leaves pixels in [0, 1] and fills that range best; and those pixels."""
    found: list[tuple[float, str, Tensor]] = []
    for name, by in {"the model's own": own, **NORMALISATIONS}.items():
        undone = denormalise(pixels, by)
        low, high = float(undone.min()), float(undone.max())
        if low >= -OVERSHOOT / 4 and high <= 1 + OVERSHOOT / 4:
            found.append((round(high - low, 2), name, undone))
    if found:
        _, name, undone = max(found, key=lambda item: item[0])
        return name, undone
    low, high = pixels.min(), pixels.max()
    return None, (pixels - low) / (high - low)


def _fault(what: str, images: Tensor, remedy: str) -> Fault:
    numbers = (Evidence("least", float(images.min())), Evidence("largest", float(images.max())))
    return Fault("pixels", "error", what, numbers, remedy)
