"""Data sets of others as pairs: read by place, gone through in order, and folders of classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Self, Unpack

from decompclip.data.feed import in_threads
from decompclip.data.files import SkippedFile, is_bookkeeping, reason
from decompclip.data.images import ListedImages, OnError, image_files
from decompclip.data.pairs import (
    ALL,
    FilePairs,
    Pair,
    PairBatch,
    PairEntry,
    PairOptions,
    Pairs,
    PairSteps,
    content_name,
)
from decompclip.data.pixels import Preprocess, finished, is_ours, onto, read_image, to_pixels
from decompclip.data.shards import IMAGE_KINDS


class MapDataset(Protocol):
    """What torch and torchvision call a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetPairs(Pairs):
    """A data set of (image, caption) or of (image, class), such as torchvision's, as pairs.

    Args:
        dataset: its images are pictures, or tensors in [0, 1]. If it has `captions`, or classes as `targets` (as
            torchvision's data sets do), they are read there; otherwise every item is opened once to learn them.
        preprocess: as `Pairs`; tensors pass as they are.
        ids: what the pairs are called, `"0"`, `"1"`, ... by default.
        options: as `Pairs`; `class_names` are those of `dataset.classes` by default.

    Raises:
        ValueError: no items, classes without names or templates, or a caption that is missing or no text.
    """

    def __init__(
        self,
        dataset: MapDataset,
        preprocess: Preprocess | None = None,
        *,
        ids: Sequence[str] | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        # of ImageNet, torchvision lists all names of a class
        names = [x if isinstance(x, str) else x[0] for x in getattr(dataset, "classes", ())]
        super().__init__(preprocess, **{"class_names": names, **options})
        if not len(dataset):
            raise ValueError("expected a data set of pairs; received one without items")
        self.dataset = dataset
        self._ids = [str(index) for index in range(len(dataset))] if ids is None else list(ids)
        if len(self._ids) != len(dataset):
            raise ValueError(f"expected one id for each of {len(dataset)} pairs; received {len(self._ids)}")

    @property
    def pure(self) -> bool:
        return False  # the data set's code is another's

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
            known = zip(self.labels.tolist(), self._ids, strict=True)
            return [self._caption("", label, name) for label, name in known]
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
        # one after the other: a data set's own reader may be any, and need not stand several threads
        items = [self._item(index) for index in indices]
        return in_threads(self._image, items, pure=is_ours(self.preprocess))

    def _image(self, item: Any) -> Tensor | str:
        return reason(item) if isinstance(item, Exception) else read_image(item, self.preprocess)

    def _item(self, index: int) -> Any:
        try:
            return self.dataset[index][0]
        except Exception as error:
            return error


class PairStream(PairSteps):
    """Pairs that come one after the other, again and again: for data too large, or too far away, to index.

    Args:
        items: something that can be gone through more than once, with the same items in the same order: of
            `Pair`; of (image, caption) or (image, caption, id); or of WebDataset samples, decoded
            (`.decode("pilrgb")`) or not. An item that cannot be read is left out and listed in `skipped`.
        preprocess: from a picture to pixels in [0, 1]; tensors pass as they are.
        class_names: the classes that labels stand for, or that a target is checked against.

    Raises:
        ValueError: an iterator, which could be gone through only once.
    """

    def __init__(
        self, items: Iterable[Any], preprocess: Preprocess | None = None, *, class_names: Sequence[str] = ()
    ) -> None:
        if iter(items) is items:
            raise ValueError(
                "expected pairs that can be gone through again and again; received an iterator, which is used up "
                "after one pass; wrap what makes it in a class with __iter__"
            )
        self.items, self.preprocess, self.class_names = items, preprocess or to_pixels(), tuple(class_names)
        self._left_out: dict[str, SkippedFile] = {}
        self._urls: dict[str, str] = {}
        self._running: Iterator[Pair] = iter(())
        self._position = 0

    @property
    def skipped(self) -> list[SkippedFile]:
        """What was left out so far, by this stream or by `items` themselves."""
        return [*getattr(self.items, "skipped", ()), *self._left_out.values()]

    def __iter__(self) -> Iterator[Pair]:
        """One pass."""
        for place, item in enumerate(self.items):
            try:
                yield item if isinstance(item, Pair) else self._pair(item)
            except UnreadableItem as error:
                name = error.name or f"item {place}"
                self._left_out[name] = SkippedFile(name, str(error))

    def take(
        self, step: int, size: int, *, rows: slice = ALL, device: torch.device | str | None = None
    ) -> PairBatch:
        """The pairs `step * size` and on, the stream's passes one after the other.

        Steps in a row cost nothing more; to resume, the stream runs from its start to the step. All pairs of a step are read, for
        one that cannot be read moves those behind it.

        Raises:
            ValueError: no pair in the whole stream, batches of none, a negative step, images of several sizes.
        """
        if size < 1 or step < 0:
            raise ValueError(
                f"expected batches of at least 1 pair and a step that is not negative; received {size} and {step}"
            )
        if step * size < self._position:
            self._running, self._position = iter(()), 0
        while self._position < step * size:
            self._next()
        taken = PairBatch.of([self._next() for _ in range(size)]).rows(rows)
        return replace(taken, images=onto(taken.images, device))

    def _next(self) -> Pair:
        pair = next(self._running, None)
        if pair is None:
            self._running = iter(self)
            pair = next(self._running, None)
        if pair is None:
            last = f", the last left out: {self.skipped[-1].reason}" if self.skipped else ""
            raise ValueError(f"expected a stream of pairs; it holds none that can be read{last}")
        self._position += 1
        return pair

    def _pair(self, item: Any) -> Pair:
        if isinstance(item, Mapping):
            return self._sample(item)
        image, caption, *rest = self._parts(item)
        return self._made(rest[0] if rest else None, image, caption, None)

    def _parts(self, item: Any) -> Sequence[Any]:
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise ValueError(
                f"expected a stream of (image, caption), (image, caption, id), Pair or WebDataset samples; received "
                f"{type(item).__name__}"
            )
        return item

    def _sample(self, sample: Mapping[str, Any]) -> Pair:
        """A WebDataset sample; its shard's name and its key make the id, as in `ShardPairs`."""
        name = self._name(sample)
        kind = next((kind for kind in IMAGE_KINDS if kind in sample), None)
        if kind is None:
            raise UnreadableItem(name, "has no image")
        label = sample.get("cls")
        try:
            label = None if label is None else int(label)
        except ValueError:
            raise UnreadableItem(name, f"class {label!r} is no number") from None
        return self._made(name, sample[kind], sample.get("txt"), label)

    def _name(self, sample: Mapping[str, Any]) -> str | None:
        url = str(sample.get("__url__", ""))
        shard = Path(url).name.split(".")[0]
        if self._urls.setdefault(shard, url) != url:
            raise ValueError(
                f"expected shards whose names tell them apart; received {self._urls[shard]} and {url}, whose pairs would have "
                "the same ids; rename one, or read local shards with ShardPairs, which tells them apart"
            )
        return "/".join(part for part in (shard, str(sample.get("__key__", ""))) if part) or None

    def known(self, item: Any) -> tuple[str | None, int | None, Any]:
        """What an item is called, its class, and its image undecoded; captions are not looked at."""
        if isinstance(item, Pair):
            return item.id, item.label, item.image
        if isinstance(item, Mapping):
            kinds = (kind for kind in (*IMAGE_KINDS, "image", "img") if kind in item)
            image, label = item.get(next(kinds, "")), item.get("cls", item.get("label"))
            if isinstance(image, Mapping):  # of `datasets`, undecoded
                image = image.get("bytes") or Path(str(image.get("path")))
            digits = isinstance(label, str | bytes) and label.strip().isdigit()
            return self._name(item), int(label) if digits else _number(label), image
        image, second, *rest = self._parts(item)
        return str(rest[0]) if rest else None, _number(second), image

    def _made(self, name: Any, image: Any, caption: Any, label: int | None) -> Pair:
        name = None if name is None else str(name)
        text = caption.decode("utf-8", "replace") if isinstance(caption, bytes) else caption
        if not isinstance(text, str) or not text.strip():
            raise UnreadableItem(name, f"has no caption: {text!r}")
        found = read_image(image, self.preprocess)
        if isinstance(found, str):
            raise UnreadableItem(name, found)
        pixels = finished(found, self.preprocess)
        return Pair(content_name(pixels, text) if name is None else name, pixels, text.strip(), label)


class StreamImages(ListedImages):
    """The images of a stream by place, for `extract`. The stream is gone through once to list it, undecoded; then what lies before a
    place is passed over, so that each of several processes decodes its own part alone.

    Args:
        stream: its items may have images alone: rows of a data set of Hugging Face's that is streamed (`{"image": ..., "label": ...}`),
            samples of webdataset's readers.
    """

    def __init__(self, stream: PairStream) -> None:
        self._stream, self._left_out = stream, dict[int, SkippedFile]()
        self._names, labels = list[str](), dict[int, int]()
        for place, item in enumerate(stream.items):
            name, label, _ = stream.known(item)
            self._names.append(f"{place:09d}" if name is None else name)
            if label is not None:
                labels[place] = label
        self._running, self._at = iter(()), len(self._names)
        super().__init__(
            range(len(self._names)),
            labels,
            stream.preprocess,
            unlabelled="has no class",
            where="a stream",
            limit=None,
            seed=0,
        )

    def subset(self, places: Sequence[int]) -> Self:
        raise TypeError("a stream has no subset of its images; take them from a list")

    @property
    def pure(self) -> bool:
        return False  # the items come from another's code

    @property
    def skipped(self) -> list[SkippedFile]:
        return [*self._left_out.values()]

    def _name(self, item: int) -> str:
        return self._names[item]

    def _leave_out(self, item: int, reason: str) -> None:
        self._left_out[item] = SkippedFile(self._names[item], reason)

    def _images(self, items: Sequence[int]) -> list[Tensor | str]:
        return in_threads(self._image, [self._item(place) for place in items], pure=is_ours(self.preprocess))

    def _image(self, image: Any) -> Tensor | str:
        return read_image(image, self.preprocess)

    def _item(self, place: int) -> Any:
        """The image of the item at a place, undecoded."""
        if place < self._at:
            self._running, self._at = iter(self._stream.items), 0
        item = next(islice(self._running, place - self._at, None), None)
        self._at = place + 1
        name, _, image = (None, None, None) if item is None else self._stream.known(item)
        if item is None or self._names[place] != (f"{place:09d}" if name is None else name):
            raise ValueError(
                f"expected the same {len(self._names)} items each time that the stream is gone through; item {place}, before "
                f"{self._names[place]!r}, is {'not there' if item is None else repr(name)} now; do not shuffle it"
            )
        return image


class UnreadableItem(ValueError):
    """An item that is left out."""

    def __init__(self, name: str | None, why: str) -> None:
        super().__init__(why)
        self.name = name


class FolderPairs(FilePairs):
    """A folder with a sub-folder of images a class (as torchvision's `ImageFolder`), captions from templates.

    Bookkeeping of the system's (`.ipynb_checkpoints`, `__MACOSX`, ...) is no class; other files that are no pictures are
    listed in `skipped`.

    Args:
        folder: where the classes' folders lie.
        templates: with a slot {} for the class's name.
        preprocess: as `Pairs`.
        class_names: names of classes whose folders are called otherwise, such as `{"n02123045": "tabby cat"}`.
        root: a folder that all images must lie in, links resolved; None allows any.
        caption_seed: of the templates drawn.
        order_seed: of the order in which `batch` goes through the pairs.
        on_error: `"skip"` or `"raise"`, as `Pairs`.

    Raises:
        FileNotFoundError: no such folder, or no sub-folder or an empty one.
        ValueError: templates without a slot.
    """

    def __init__(
        self,
        folder: str | Path,
        templates: Sequence[str],
        preprocess: Preprocess | None = None,
        *,
        class_names: Mapping[str, str] | None = None,
        root: str | Path | None = None,
        caption_seed: int = 0,
        order_seed: int = 0,
        on_error: OnError = "skip",
    ) -> None:
        self.folder, self.root = Path(folder), root
        files, left_out = image_files(self.folder)
        classes = sorted({file.parts[0] for file in files if len(file.parts) > 1})
        with_nothing = sorted(
            entry.name
            for entry in self.folder.iterdir()
            if entry.is_dir() and not is_bookkeeping(entry.name) and entry.name not in classes
        )
        if with_nothing or not classes:
            raise FileNotFoundError(
                f"expected a sub-folder of images for each class in {folder}; "
                f"{', '.join(with_nothing) + ' without any' if with_nothing else 'there is none'}; fill or remove such"
            )
        super().__init__(
            preprocess,
            class_names=[(class_names or {}).get(name, name.replace("_", " ")) for name in classes],
            templates=templates,
            caption_seed=caption_seed,
            order_seed=order_seed,
            on_error=on_error,
        )
        outside = "lies in no sub-folder that names its class"
        left_out += [SkippedFile(file.as_posix(), outside) for file in files if len(file.parts) == 1]
        self._left_out = {skip.path: skip for skip in left_out}
        places = {name: place for place, name in enumerate(classes)}
        found = [(file.as_posix(), places[file.parts[0]], file) for file in files if len(file.parts) > 1]
        self.entries = [
            PairEntry(name, self._caption("", label, name), label, self.folder / file)
            for name, label, file in found
        ]


folder_pairs = FolderPairs
"""The documented name of `FolderPairs`."""


def _number(second: Any) -> int | None:
    if isinstance(second, Tensor | np.generic) and second.ndim == 0:
        second = second.item()
    return second if isinstance(second, int) else None
