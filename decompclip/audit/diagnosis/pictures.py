"""The images of a diagnosis, batch by batch: as the model is fed them, and the pixels that other feeds start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from decompclip.audit.diagnosis.pixels import MOST_NORMALISED, denormalise, repair, resize
from decompclip.audit.diagnosis.result import Fault
from decompclip.data.images import FolderSource, ImageSource, ShapesSource
from decompclip.data.pair_images import PairImages
from decompclip.models.clip import HookedCLIP
from decompclip.models.proportions import CutExtremes

Pictures = Tensor | Sequence[Image.Image] | ImageSource
"""Pixels in [0, 1], pictures, or a source of images."""

SAME = 1e-3
"""Feeds that differ by less, in units of the tower's input, are one."""


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
    reshaped: Float[Tensor, "batch 3 h w"] | None
    labels: Int[Tensor, " batch"] | None
    foreign: bool = False
    faults: tuple[Fault, ...] = ()


def count(images: Pictures) -> int:
    """How many there are at most: unreadable files show only in reading."""
    return len(images)


def labelled(images: Pictures) -> bool:
    """Whether images by a path bring labels along, told from the first; other sources may be streams."""
    if not isinstance(images, FolderSource | PairImages):
        return True
    return next(images.batches(1)).labels is not None


def views(model: HookedCLIP, images: Pictures, batch_size: int) -> Iterator[Views]:
    """Go through the images once.

    Raises:
        ValueError: they are none of `Pictures`, or not images.
    """
    if isinstance(images, Tensor):
        repaired = repair(images, size=model.image_size, own=(model.mean, model.std))
        for start, pixels in enumerate(repaired.pixels.split(batch_size)):
            yield Views(model.normalize(pixels), pixels, None, None, faults=() if start else repaired.faults)
    elif isinstance(images, FolderSource):
        yield from _of_folder(model, images, batch_size)
    elif isinstance(images, ShapesSource):
        bare = replace(images, normalise=lambda pixels: pixels)
        for batch in bare.batches(batch_size):
            fed, faults = _fit(model, images.normalise(batch.images))
            pixels = resize(batch.images, model.image_size)
            yield Views(fed, pixels, None, batch.labels, images.normalise != model.normalize, faults)
    elif isinstance(images, list | tuple):
        yield from _of_list(model, images, batch_size)
    elif hasattr(images, "batches"):
        source: Any = images
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
        yield Views(*looks.unbind(1), labels=None)


def _of_folder(model: HookedCLIP, source: FolderSource, batch_size: int) -> Iterator[Views]:
    twin = copy.copy(source)  # reads the same files, and counts skipped ones where `source` does
    sizes: set[tuple[int, ...]] = set()
    twin.preprocess = _looks(model, source.preprocess, sizes)
    for batch in twin.batches(batch_size):
        fed, pixels, reshaped = batch.images.unbind(1)
        faults = tuple(_wrong_size(model, size) for size in sizes)
        yield Views(fed, pixels, reshaped, batch.labels, source.preprocess is not model.preprocess, faults)


def _of_source(model: HookedCLIP, images: Tensor, labels: Tensor | None) -> Views:
    """A source's images come as the model takes them; those in [0, 1] or in 0..255 never were normalised."""
    low, high = float(images.min()), float(images.max())
    if not images.is_floating_point() or (low >= 0 and (high <= 1 or high > MOST_NORMALISED)):
        repaired = repair(images, size=model.image_size, own=(model.mean, model.std))
        return Views(_fit(model, images.float())[0], repaired.pixels, None, labels, True, repaired.faults)
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
    return resize(fed, model.image_size), (_wrong_size(model, size),)


def _wrong_size(model: HookedCLIP, size: tuple[int, ...]) -> Fault:
    given, wanted = (" x ".join(map(str, some)) for some in (size, model.image_size))
    return Fault(
        "resolution",
        "error",
        f"the source gives images of {given} pixels, and the tower is for {wanted}",
        (),
        "let the source use this model's `preprocess`; here they were resized for the other checks",
    )
