"""The images of a diagnosis, batch by batch: as the model is fed them, and the pixels that other feeds start from.

Faults of a tensor of pixels show in its numbers alone; the other checks go on with corrected pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from decompclip.data.images import FolderSource, ImageSource
from decompclip.data.shapes import ShapesSource
from decompclip.data.sources import PairImages
from decompclip.diagnosis.result import Fault, Measurement
from decompclip.models.clip import HookedCLIP
from decompclip.models.preprocessing import CutExtremes

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

SAME = 1e-3
"""Feeds that differ by less, in units of the tower's input, are one."""

Pictures = Tensor | Sequence[Image.Image] | ImageSource
"""Pixels in [0, 1], pictures, or a source of images."""


def normalise(pixels: Float[Tensor, "batch 3 h w"], by: Normalisation) -> Float[Tensor, "batch 3 h w"]:
    """Pixels less the mean, by the standard deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in by)
    return (pixels - mean) / std


def denormalise(images: Float[Tensor, "batch 3 h w"], by: Normalisation) -> Float[Tensor, "batch 3 h w"]:
    """The pixels that `normalise` made `images` of; values outside [0, 1] show a fault."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in by)
    return images * std + mean


def resize(
    pixels: Float[Tensor, "batch 3 h w"], size: tuple[int, int]
) -> Float[Tensor, "batch 3 rows columns"]:
    """The same pictures in another size, squashed if need be."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)


def corrected(
    images: Tensor, *, size: tuple[int, int], own: Normalisation
) -> tuple[Float[Tensor, "batch 3 h w"], tuple[Fault, ...]]:
    """Pixels in [0, 1] of the tower's size, and the faults that were corrected to get them.

    Args:
        images: what was given.
        size: of the tower's input.
        own: the model's normalisation, the first to be thought of where the images are normalised already.

    Raises:
        ValueError: it is no batch of RGB images, empty, or not finite.
    """
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[-1]):
        raise ValueError(
            f"expected pixels [batch, 3, h, w] in [0, 1]; received {list(images.shape)}; stack RGB images along a batch axis"
        )
    if not images.numel():
        raise ValueError(f"expected at least one image; received a tensor of shape {list(images.shape)}")
    faults = []
    if images.shape[1] != 3:
        what, remedy = f"the channels stand last, {list(images.shape)}", "move them behind the batch axis"
        faults.append(Fault("pixels", what, f"{remedy}: `images.permute(0, 3, 1, 2)`"))
        images = images.permute(0, 3, 1, 2)
    pixels = images.float()
    if not images.is_floating_point():
        most = 255 if float(images.max()) <= 255 else 65535
        what = f"the pixels are integers ({str(images.dtype).removeprefix('torch.')})"
        faults.append(_fault(what, images, f"divide them by {most} before they are normalised"))
        pixels = pixels / most
    if not pixels.isfinite().all():
        bad = int((~pixels.isfinite().flatten(1).all(dim=1)).sum())
        raise ValueError(
            f"expected finite pixels; received nan or inf in {bad} of {len(pixels)} images; correct them or leave them out"
        )
    pixels, found = _in_unit_range(pixels, own)
    faults += found
    given = tuple(pixels.shape[-2:])
    if given != size:
        remedy = f"resize them to {_by(size)}, as the model's `preprocess` does; here it was done for the other checks"
        faults.append(_wrong_size("the images are", given, size, remedy))
    return resize(pixels, size), tuple(faults)


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
        what = "the pixels are all but black: divided by 255 twice"
        return pixels * 255, [_fault(what, pixels, "divide by 255 once")]
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
        return max(found, key=lambda item: item[0])[1:]
    low, high = pixels.min(), pixels.max()
    return None, (pixels - low) / (high - low)


def _fault(what: str, images: Tensor, remedy: str) -> Fault:
    numbers = (Measurement("least", float(images.min())), Measurement("largest", float(images.max())))
    return Fault("pixels", what, remedy, numbers)


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _wrong_size(subject: str, given: Sequence[int], wanted: Sequence[int], remedy: str) -> Fault:
    what = f"{subject} of {_by(given)} pixels, and the tower is for {_by(wanted)}"
    return Fault("resolution", what, remedy)


@dataclass(frozen=True)
class Views:
    """One batch.

    Attributes:
        fed: what goes into the tower, as the user feeds it.
        pixels: in [0, 1], of the tower's size, cropped or squashed as the model says.
        reshaped: likewise, squashed where the model crops and cropped where it squashes; None where the
            pictures' own shape is not known.
        labels: the classes that the source knows.
        foreign: whether `fed` may differ from what the model's own preprocessing gives.
        faults: of this batch's images.
    """

    fed: Float[Tensor, "batch 3 h w"]
    pixels: Float[Tensor, "batch 3 h w"]
    reshaped: Float[Tensor, "batch 3 h w"] | None = None
    labels: Int[Tensor, " batch"] | None = None
    foreign: bool = False
    faults: tuple[Fault, ...] = ()


def labelled(images: Pictures) -> bool:
    """Whether the images of a folder or table have labels; True for other sources, which may be streams."""
    return not isinstance(images, FolderSource | PairImages) or images.labelled


def views(model: HookedCLIP, images: Pictures, batch_size: int) -> Iterator[Views]:
    """Go through the images once.

    Raises:
        ValueError: they are none of `Pictures`, or not images.
    """
    source: Any = images
    if isinstance(images, Tensor):
        right, faults = corrected(images, size=model.image_size, own=(model.mean, model.std))
        for start, pixels in enumerate(right.split(batch_size)):
            yield Views(model.normalize(pixels), pixels, faults=() if start else faults)
    elif isinstance(images, FolderSource):
        yield from _of_folder(model, images, batch_size)
    elif isinstance(images, ShapesSource):
        foreign = images.normalise != model.normalize
        for batch in replace(images, normalise=lambda pixels: pixels).batches(batch_size):
            fed, faults = _fit(model, images.normalise(batch.images))
            yield Views(fed, resize(batch.images, model.image_size), None, batch.labels, foreign, faults)
    elif isinstance(images, list | tuple):
        yield from _of_list(model, images, batch_size)
    elif hasattr(images, "batches"):
        for batch in source.batches(batch_size):
            yield _of_source(model, batch.images, batch.labels)
    else:
        raise ValueError(
            f"expected pixels [batch, 3, h, w] in [0, 1], a list of PIL images or an image source; received "
            f"{type(images).__name__}"
        )


def _of_list(model: HookedCLIP, pictures: Sequence[Any], batch_size: int) -> Iterator[Views]:
    look = _looks(model, model.preprocess)
    for start in range(0, len(pictures), batch_size):
        chosen = pictures[start : start + batch_size]
        for picture in chosen:
            if not isinstance(picture, Image.Image):
                raise ValueError(
                    f"expected a list of PIL images; received {type(picture).__name__} in it; stack tensors to one tensor "
                    "[batch, 3, h, w]"
                )
        looks = torch.stack([look(picture.convert("RGB")) for picture in chosen])
        yield Views(looks[:, 0], looks[:, 1], looks[:, 2])


def _of_folder(model: HookedCLIP, source: FolderSource, batch_size: int) -> Iterator[Views]:
    other = copy.copy(source)  # reads the same files, and counts skipped ones where `source` does
    sizes: set[tuple[int, ...]] = set()
    other.preprocess = _looks(model, source.preprocess, sizes)
    for batch in other.batches(batch_size):
        faults = tuple(_source_size(model, size) for size in sizes)
        foreign = source.preprocess is not model.preprocess
        fed, pixels, reshaped = batch.images.unbind(1)
        yield Views(fed, pixels, reshaped, batch.labels, foreign, faults)


def _of_source(model: HookedCLIP, images: Tensor, labels: Tensor | None) -> Views:
    """A source's images come as the model takes them; those in [0, 1] or in 0..255 never were normalised."""
    low, high = float(images.min()), float(images.max())
    if not images.is_floating_point() or (low >= 0 and (high <= 1 or high > MOST_NORMALISED)):
        pixels, faults = corrected(images, size=model.image_size, own=(model.mean, model.std))
        return Views(_fit(model, images.float())[0], pixels, None, labels, True, faults)
    fed, faults = _fit(model, images)
    return Views(fed, denormalise(fed, (model.mean, model.std)), None, labels, False, faults)


def _looks(
    model: HookedCLIP,
    preprocess: Callable[[Image.Image], Tensor],
    sizes: set[tuple[int, ...]] | None = None,
) -> Callable[[Image.Image], Float[Tensor, "3 3 h w"]]:
    """From a picture to its three views; sizes other than the tower's are noted in `sizes`."""
    other = _other_geometry(model)

    def look(picture: Image.Image) -> Tensor:
        own = model.preprocess(picture)
        fed = own if preprocess is model.preprocess else preprocess(picture).float()
        if fed.shape != own.shape:
            if sizes is not None:
                sizes.add(tuple(fed.shape[-2:]))
            fed = resize(fed[None], model.image_size)[0]
        pixels = denormalise(own[None], (model.mean, model.std))[0]
        return torch.stack([fed, pixels, other(picture)])

    return look


def _other_geometry(model: HookedCLIP) -> Callable[[Image.Image], Float[Tensor, "3 h w"]]:
    """Squash where the model's preprocessing crops, and the reverse."""
    how = InterpolationMode(model.preprocess_cfg.interpolation.replace("random", "bicubic"))
    size = list(model.image_size)
    if model.preprocess_cfg.resize_mode == "squash":
        cut = CutExtremes((max(size), max(size)), "shortest", how.value)
        return Compose([cut, Resize(max(size), how), CenterCrop(size), ToTensor()])
    return Compose([CutExtremes(model.image_size, "squash", how.value), Resize(size, how), ToTensor()])


def _fit(model: HookedCLIP, fed: Tensor) -> tuple[Tensor, tuple[Fault, ...]]:
    size = tuple(fed.shape[-2:])
    if size == model.image_size:
        return fed, ()
    return resize(fed, model.image_size), (_source_size(model, size),)


def _source_size(model: HookedCLIP, size: tuple[int, ...]) -> Fault:
    remedy = "let the source use this model's `preprocess`; here they were resized for the other checks"
    return _wrong_size("the source gives images", size, model.image_size, remedy)
