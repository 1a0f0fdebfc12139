"""Images with their classes, in batches: the protocol that audits take, folders of photographs, names of classes, splits."""

from __future__ import annotations

import difflib
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from decompclip.api import check_choice
from decompclip.data.feed import DeviceSource, in_threads
from decompclip.data.files import (
    OURS,
    SUFFIXES,
    UNKNOWN,
    SkippedFile,
    canonical,
    is_picture,
    open_rgb,
    reason,
    unusable,
    walk,
)
from decompclip.data.pixels import Preprocess, is_ours, prepare, stack_images

OnError = Literal["skip", "raise"]
T = TypeVar("T")


@dataclass(frozen=True)
class ImageBatch:
    """Images as the model takes them, their classes where known, a name for each, and their places in the source where it knows them."""

    images: Float[Tensor, "batch 3 h w"]
    labels: Int[Tensor, " batch"] | None
    paths: tuple[str, ...]
    indices: Int[Tensor, " batch"] | None = None


@runtime_checkable
class ImageSource(Protocol):
    """Images as the model takes them: a finite sequence of images that can be gone through again and again, in the same order."""

    @property
    def skipped(self) -> Sequence[SkippedFile]: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int = 64) -> Iterator[ImageBatch]: ...


class ListedImages(DeviceSource):
    """Base of sources whose images are read one by one; those that cannot be read are left out and listed.

    Args:
        items: what stands for each image, in order.
        preprocess: from a picture to an image.
        labels: the class of each item. If any has one, items without are left out; if none has, labels are None.
        unlabelled: why such items are left out.
        where: the images' place, for errors.
        limit: take a random subset of so many items, still in order; None takes all.
        seed: of the subset.

    Raises:
        ValueError: a limit below one.
    """

    def __init__(
        self,
        items: Sequence[Any],
        labels: Mapping[Any, int],
        preprocess: Preprocess,
        *,
        unlabelled: str,
        where: str,
        limit: int | None,
        seed: int,
    ) -> None:
        if labels:
            for item in items:
                if item not in labels:
                    self._without_label(item, unlabelled)
            items = [item for item in items if item in labels]
        self._items, self._labels, self._where = items, labels, where
        self.preprocess = preprocess
        self._items = self.drawn(limit, seed)._items

    def drawn(self, limit: int | None, seed: int) -> Self:
        """A random subset of so many, still in order; all where there are no more, or without a limit.

        Raises:
            ValueError: a limit below one.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"expected a limit of at least 1 image; received {limit}; None takes all")
        if limit is None or limit >= len(self):
            return self
        return self.subset(
            np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False)).tolist()
        )

    def subset(self, places: Sequence[int]) -> Self:
        """The images at these places alone, in their order; of a stream, which is read forwards, there is none."""
        found = copy(self)
        found._items = [self._items[place] for place in places]
        return found

    @property
    def pure(self) -> bool:
        return is_ours(self.preprocess)

    @property
    @abstractmethod
    def skipped(self) -> Sequence[SkippedFile]:
        """What was left out so far; complete once `batches` has run to its end."""

    @abstractmethod
    def _name(self, item: Any) -> str: ...

    @abstractmethod
    def _images(self, items: Sequence[Any]) -> list[Tensor | str]:
        """The image of each item as `preprocess` prepares it, or why there is none."""

    @abstractmethod
    def _leave_out(self, item: Any, reason: str) -> None: ...

    def _without_label(self, item: Any, reason: str) -> None:
        self._leave_out(item, reason)

    @property
    def labelled(self) -> bool:
        """Whether classes are known."""
        return bool(self._labels)

    def __len__(self) -> int:
        """Number of images to read, unreadable ones included: which those are shows only in reading."""
        return len(self._items)

    def batches(
        self, batch_size: int = 64, *, device: torch.device | str | None = None
    ) -> Iterator[ImageBatch]:
        """All readable images, `batch_size` at a time (the last batch may be smaller).

        Args:
            batch_size: images in a batch.
            device: where the images go, in 8 bits where they come in 8 bits; None leaves them on the CPU.

        Raises:
            ValueError: not one image could be read, or one could not and `on_error="raise"`.
        """
        found = False
        for batch in self.part(range(len(self)), batch_size, device=device):
            yield batch
            found = True
        if not found:
            last = f", the last: {self.skipped[-1].reason}" if self.skipped else ""
            raise ValueError(
                f"expected images in {self._where}; none of its {len(self)} images could be read{last}; check that they are pictures and complete"
            )

    def part(
        self, places: Sequence[int], batch_size: int = 64, *, device: torch.device | str | None = None
    ) -> Iterator[ImageBatch]:
        """The readable ones of the images at some places (0 is the first of all), as `batches` gives them; there may be none.

        Raises:
            ValueError: an image cannot be read and `on_error="raise"`.
        """

        def read(some: Sequence[int]) -> list[Tensor | str]:
            return self._images([self._items[place] for place in some])

        def leave_out(place: int, reason: str) -> None:
            self._leave_out(self._items[place], reason)

        for kept, images in readable(places, batch_size, read, leave_out):
            items = [self._items[place] for place in kept]
            labels = torch.tensor([self._labels[item] for item in items]) if self._labels else None
            stacked = stack_images(images, self.preprocess, device=device)
            yield ImageBatch(stacked, labels, tuple(map(self._name, items)), torch.tensor(kept))

    def listed(self, places: range) -> Iterator[tuple[str, int | None]]:
        """Name and class of the images at some places, unread."""
        for place in places:
            yield self._name(self._items[place]), self._labels.get(self._items[place])

    def files_of(self, places: range) -> Iterator[Path | None]:
        """The files that hold the images at some places; None where no file of its own does."""
        for place in places:
            yield self._file(self._items[place])

    def _file(self, item: Any) -> Path | None:
        return None


def readable(
    items: Sequence[T],
    size: int,
    read: Callable[[Sequence[T]], list[Tensor | str]],
    leave_out: Callable[[T, str], object],
) -> Iterator[tuple[list[T], list[Tensor]]]:
    """Items with their images, `size` at a time, without those of which `read` says why there is no image."""
    kept: list[T] = []
    images: list[Tensor] = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        for item, image in zip(part, read(part), strict=True):
            if isinstance(image, str):
                leave_out(item, image)
                continue
            kept.append(item)
            images.append(image)
        if len(images) >= size:
            yield kept[:size], images[:size]
            kept, images = kept[size:], images[size:]
    if images:
        yield kept, images


class FolderSource(ListedImages):
    """The image files of a folder and its sub-folders, in the order of their paths.

    A file is an image by its content, whatever its name (`decompclip.data.files.FORMATS`). All else is listed in
    `skipped`, but for bookkeeping of the system (names that begin with a dot, `__MACOSX`, `Thumbs.db`, ...).
    Links to folders are followed, to each folder once.

    If sub-folders are named after classes (case, spaces, hyphens, underscores and Unicode form aside), an image's label is
    that of the nearest such folder above it, and files outside all of them are left out. If none is, labels
    are None.

    Args:
        folder: where to look.
        preprocess: from an RGB picture to the model's input.
        class_names: names by which to label.
        on_error: `"skip"` leaves out files that cannot be read or labelled and lists them in `skipped`;
            `"raise"` stops at the first.
        limit: take a random subset of so many files, still in the order of their paths.
        seed: of the subset.
        root: a folder that all images must lie in, links resolved; None allows any.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: no image file in it, an unknown `on_error`, or a limit below one.
    """

    def __init__(
        self,
        folder: str | Path,
        preprocess: Callable[[Image.Image], Float[Tensor, "3 h w"]],
        *,
        class_names: Sequence[str] | None = None,
        on_error: OnError = "skip",
        limit: int | None = None,
        seed: int = 0,
        root: str | Path | None = None,
    ) -> None:
        check_choice("on_error", on_error, OnError)
        self.folder, self.on_error, self.root = Path(folder), on_error, root
        files, left_out = image_files(self.folder)
        self._skipped = {skip.path: skip for skip in left_out}
        super().__init__(
            files,
            _folder_labels(files, class_names or ()),
            preprocess,
            unlabelled="lies in no folder that is named after a class",
            where=str(folder),
            limit=limit,
            seed=seed,
        )

    @property
    def skipped(self) -> list[SkippedFile]:
        return list(self._skipped.values())

    @property
    def files(self) -> Sequence[Path]:
        """Paths of the files to read, inside the folder."""
        return tuple(self._items)

    def _name(self, item: Path) -> str:
        return item.as_posix()

    def _file(self, item: Path) -> Path:
        return self.folder / item

    def _images(self, items: Sequence[Path]) -> list[Tensor | str]:
        return in_threads(self._image, items, pure=self.pure)

    def _image(self, item: Path) -> Tensor | str:
        try:
            picture = open_rgb(self.folder / item, root=self.root)
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
            return reason(error)
        return prepare(self.preprocess, picture)

    def _leave_out(self, item: Path, reason: str) -> None:
        if self.on_error == "raise":
            raise unusable(self.folder / item, reason)
        self._skipped[item.as_posix()] = SkippedFile(item.as_posix(), reason)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Class names from a file: one a line (blank lines and lines that start with # aside), or a JSON list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, holds no class, or one twice.
    """
    path, expected = Path(path), "expected a text file with one class a line, or a JSON list of names"
    if not path.is_file():
        raise FileNotFoundError(f"{expected}; there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        is_json = path.suffix.lower() == ".json" or text.startswith("[")
        lines = (line.strip() for line in text.splitlines())
        names = json.loads(text) if is_json else [line for line in lines if line and line[0] != "#"]
    except ValueError as error:  # of the decoding, or of the JSON
        raise ValueError(f"{expected}; {path} is neither: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{expected}; {path} holds other JSON")
    if not any(names):
        raise ValueError(f"{expected}; {path} names no class")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"expected each class once; {path} names again: {', '.join(map(repr, repeated))}")
    return tuple(names)


def class_index(name: str, class_names: Sequence[str]) -> int:
    """Place of a class in the list, whatever the name's case, spaces, hyphens and underscores.

    Raises:
        ValueError: it is not among them (the nearest names are offered), or stands for several.
    """
    places = class_places(class_names)
    if (place := find_class(name, places)) is not None:
        return place
    near = [class_names[places[key][0]] for key in difflib.get_close_matches(_key(name), places)]
    offered = f"nearest: {', '.join(map(repr, near))}" if near else f"they begin {list(class_names[:3])}"
    raise ValueError(f"class {name!r} is not among the {len(class_names)} classes; {offered}")


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", canonical(name))


def class_places(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Places of the classes by the form of a name that is compared."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(class_names):
        places.setdefault(_key(name), []).append(place)
    return places


def find_class(name: str, places: dict[str, list[int]]) -> int | None:
    """A class's place by its name; None if there is none.

    Raises:
        ValueError: the name stands for several.
    """
    found = places.get(_key(name), [])
    if len(found) > 1:
        raise ValueError(
            f"expected {name!r} to stand for one class; it could be any of the classes {found} (counted from 0): "
            "rename them to differ by more than case, spaces, hyphens and underscores"
        )
    return found[0] if found else None


def image_files(folder: Path) -> tuple[list[Path], list[SkippedFile]]:
    """Paths of a folder's image files, inside it and in order, and what else lies there.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: no such folder, or no image file in it.
    """
    expected = f"expected a folder with image files ({', '.join(SUFFIXES)}, or others of that content)"
    if not folder.exists():
        raise FileNotFoundError(f"{expected}; there is no folder {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{expected}; {folder} is a file")
    found = walk(folder)
    files = [file for file in found.files if file.suffix.lower() in SUFFIXES or is_picture(folder / file)]
    pictures = set(files)
    others = [
        SkippedFile(file.as_posix(), UNKNOWN)
        for file in found.files
        if file not in pictures and file.name not in OURS
    ]
    if not files:
        hidden = f", and {found.hidden} hidden ones" if found.hidden else ""
        raise ValueError(
            f"{expected}; {folder} and its sub-folders hold {len(found.files) + len(found.left_out)} files{hidden}, none of them such"
        )
    return files, [*found.left_out, *others]


def _folder_labels(files: Sequence[Path], class_names: Sequence[str]) -> dict[Path, int]:
    """The class of each file that lies in a folder named after one: the nearest above it, which comes last."""
    places = class_places(class_names)
    found = ((file, find_class(part, places)) for file in files for part in file.parent.parts)
    return {file: place for file, place in found if place is not None}


def split_indices(n: int, fraction: float, seed: int) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Split `0 .. n-1` at random into `round(fraction * n)` indices and the others, both in rising order.

    The paper's validation part is `fraction=0.2`, its evaluation part the rest.

    Args:
        n: how many there are.
        fraction: of them in the first part.
        seed: of the split.

    Raises:
        ValueError: a part would be empty.
    """
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(
            f"expected two parts with images in both; received {n} images and the fraction {fraction}, which "
            f"leaves one part empty; take a fraction between 0 and 1, and more images if there are few"
        )
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(range(n), train_size=size, test_size=n - size, random_state=seed)
    return torch.tensor(sorted(first)), torch.tensor(sorted(second))
