"""Data sets of others as pairs: whatever is read by its place, and folders of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from decompclip.data.files import SkippedFile, is_bookkeeping, open_rgb, reason
from decompclip.data.images import OnError, image_files
from decompclip.data.pairs import Pairs, check_templates, template_caption
from decompclip.data.pixels import Preprocess, check_image, to_pixels


class MapDataset(Protocol):
    """What torch and torchvision call a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetPairs(Pairs):
    """A data set of (image, caption) or of (image, class), such as torchvision's, as pairs.

    Args:
        dataset: its images are pictures, or tensors in [0, 1]. If it has `captions`, or classes as `targets` (as
            torchvision's data sets do), they are read there; otherwise every item is opened once to learn them.
        preprocess: from a picture to pixels in [0, 1]; tensors pass as they are.
        class_names: the classes that numbers stand for; those of `dataset.classes` by default.
        templates: captions of images that have a class; a random one each.
        ids: what the pairs are called, `"0"`, `"1"`, ... by default.
        caption_seed: of the templates drawn.
        order_seed, on_error: as `Pairs`.

    Raises:
        ValueError: no items, classes without names or templates, or a caption that is missing or no text.
    """

    def __init__(
        self,
        dataset: MapDataset,
        preprocess: Preprocess | None = None,
        *,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        caption_seed: int = 0,
        order_seed: int = 0,
        on_error: OnError = "skip",
    ) -> None:
        names = getattr(dataset, "classes", ()) if class_names is None else class_names
        templates = () if templates is None else check_templates(templates)
        super().__init__(class_names=names, templates=templates, order_seed=order_seed, on_error=on_error)
        if not len(dataset):
            raise ValueError("expected a data set of pairs; received one without items")
        self.dataset, self.preprocess = dataset, preprocess or to_pixels()
        self._caption_seed = caption_seed
        self._ids = [str(index) for index in range(len(dataset))] if ids is None else list(ids)
        if len(self._ids) != len(dataset):
            raise ValueError(f"expected one id for each of {len(dataset)} pairs; received {len(self._ids)}")

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    @cached_property
    def _seconds(self) -> Sequence[Any]:
        """What comes second in each item."""
        return [self._second(index) for index in range(len(self.dataset))]

    @cached_property
    def labels(self) -> Int[Tensor, " pair"] | None:
        targets = getattr(self.dataset, "targets", None)
        if targets is None:
            if hasattr(self.dataset, "captions"):
                return None
            targets = self._seconds
        numbers = [_number(target) for target in targets]
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            return None
        if known and not (min(known) >= 0 and max(known) < len(self.class_names)):
            raise ValueError(
                f"expected classes 0..{len(self.class_names) - 1}, the places of class_names; received "
                f"{min(known)}..{max(known)}; pass class_names"
            )
        return torch.tensor(known)

    @cached_property
    def captions(self) -> Sequence[str]:
        natural = getattr(self.dataset, "captions", None)
        if natural is None and self.labels is not None:
            if not self.templates:
                raise ValueError(
                    'expected captions; received classes alone; pass templates, such as ["a photo of a {}."]'
                )
            return [
                template_caption(self.class_names[label], self.templates, seed=self._caption_seed, name=name)
                for label, name in zip(self.labels.tolist(), self._ids, strict=True)
            ]
        texts = list(self._seconds if natural is None else natural)
        for name, caption in zip(self._ids, texts, strict=True):
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(
                    f"expected a caption with every image; pair {name!r} has {caption!r}; leave such pairs out"
                )
        return texts

    def _second(self, index: int) -> Any:
        try:
            return self.dataset[index][1]
        except Exception as error:
            raise ValueError(
                f"expected items (image, caption); item {index} cannot be read: {reason(error)}; give the data set "
                "an attribute `captions`, or leave the item out"
            ) from error

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return [self._image(index) for index in indices]

    def _image(self, index: int) -> Tensor | str:
        try:
            image = self.dataset[index][0]
            return self.preprocess(image) if isinstance(image, Image.Image) else check_image(image)
        except Exception as error:  # PIL's decoders raise whatever a broken file makes them stumble over
            return reason(error)


def folder_pairs(
    folder: str | Path,
    templates: Sequence[str],
    preprocess: Preprocess | None = None,
    *,
    class_names: Mapping[str, str] | None = None,
    caption_seed: int = 0,
    order_seed: int = 0,
    on_error: OnError = "skip",
    root: str | Path | None = None,
) -> DatasetPairs:
    """A folder with a sub-folder of images a class (as torchvision's `ImageFolder`), captions from templates.

    Bookkeeping of the system's (`.ipynb_checkpoints`, `__MACOSX`, ...) is no class; other files that are no pictures are
    listed in `skipped`.

    Args:
        templates: with a slot {} for the class's name.
        preprocess: from a picture to pixels in [0, 1]; see `to_pixels`.
        class_names: names of classes whose folders are called otherwise, such as `{"n02123045": "tabby cat"}`.
        caption_seed, order_seed, on_error: as `DatasetPairs`.
        root: a folder that all images must lie in, links resolved; None allows any.

    Raises:
        FileNotFoundError: no such folder, or no sub-folder or an empty one.
        ValueError: templates without a slot.
    """
    folder = Path(folder)
    files, left_out = image_files(folder)
    inside = [file for file in files if len(file.parts) > 1]
    left_out += [
        SkippedFile(file.as_posix(), "lies in no sub-folder that names its class")
        for file in files
        if len(file.parts) == 1
    ]
    classes = sorted({file.parts[0] for file in inside})
    with_nothing = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not is_bookkeeping(entry.name) and entry.name not in classes
    )
    if with_nothing or not classes:
        raise FileNotFoundError(
            f"expected a sub-folder of images for each class in {folder}; "
            f"{', '.join(with_nothing) + ' without any' if with_nothing else 'there is none'}; fill or remove such"
        )
    names = [(class_names or {}).get(name, name.replace("_", " ")) for name in classes]
    pairs = DatasetPairs(
        _ClassFolders(folder, inside, [classes.index(file.parts[0]) for file in inside], root),
        preprocess,
        class_names=names,
        templates=templates,
        ids=[file.as_posix() for file in inside],
        caption_seed=caption_seed,
        order_seed=order_seed,
        on_error=on_error,
    )
    pairs._left_out |= {skip.path: skip for skip in left_out}
    return pairs


@dataclass(frozen=True)
class _ClassFolders:
    """Picture files, read by their place, each with its class."""

    folder: Path
    files: Sequence[Path]
    targets: Sequence[int]
    root: str | Path | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_rgb(self.folder / self.files[index], root=self.root), self.targets[index]


def _number(second: Any) -> int | None:
    if isinstance(second, Tensor | np.generic) and second.ndim == 0:
        second = second.item()
    return second if isinstance(second, int) else None
