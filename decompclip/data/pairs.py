"""Image-caption pairs: what one is, sets of them that are read by place, and the order that a seed gives to training.

Every draw depends on a seed and a pair's id alone (`keyed`): it is the same in any order, process or machine.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.api import check_choice
from decompclip.data.feed import DeviceSource, in_threads
from decompclip.data.files import SkippedFile, unusable
from decompclip.data.images import OnError, readable
from decompclip.data.pixels import Preprocess, finished, is_ours, read_image, stack_images, to_pixels

ALL = slice(None)

READ = 64
"""Pairs whose images are read at a time where they are gone through one by one."""


def keyed(seed: int, what: str, name: str) -> int:
    """A draw in 0 .. 2**64 - 1 for the pair called `name`."""
    digest = hashlib.sha256(f"{seed}\0{what}\0{name}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big")


def template_caption(class_name: str, templates: Sequence[str], *, seed: int, name: str) -> str:
    """A random one of the templates, filled with the class; `name` is the pair's."""
    return templates[keyed(seed, "caption", name) % len(templates)].replace("{}", class_name)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError unless there is a template, and a slot {} in each."""
    if isinstance(templates, str):
        raise ValueError(f"expected a list of templates; received the single string {templates!r}")
    bare = [template for template in templates if "{}" not in template]
    if bare or not templates:
        found = f"{bare[0]!r} without one" if bare else "none"
        raise ValueError(
            f"expected caption templates with a slot {{}} for the class's name; received {found}; the plainest is "
            '"a photo of a {}."'
        )
    return tuple(templates)


def content_name(image: Float[Tensor, "3 h w"], caption: str) -> str:
    """A name for a pair that has none: a digest of its pixels and caption."""
    pixels = image.detach().cpu().contiguous().float().numpy()
    return hashlib.sha256(pixels.tobytes() + caption.encode("utf-8", "surrogateescape")).hexdigest()[:24]


@dataclass(frozen=True)
class Pair:
    """One image in [0, 1] and its caption; the class where it is known, as a place in the list of classes."""

    id: str
    image: Float[Tensor, "3 h w"]
    caption: str
    label: int | None = None


@dataclass(frozen=True)
class PairBatch:
    """Images in [0, 1], their captions, classes where known, what each pair is called, and their places where the source knows them."""

    images: Float[Tensor, "batch 3 h w"]
    captions: tuple[str, ...]
    labels: Int[Tensor, " batch"] | None
    ids: tuple[str, ...]
    indices: Int[Tensor, " batch"] | None = None

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> PairBatch:
        """Pairs as a batch. Raises ValueError if their images are of several sizes."""
        return cls(
            stack_images([pair.image for pair in pairs]),
            tuple(pair.caption for pair in pairs),
            all_labels([pair.label for pair in pairs]),
            tuple(pair.id for pair in pairs),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def rows(self, rows: slice) -> PairBatch:
        """Some of them."""
        labels, indices = (None if x is None else x[rows] for x in (self.labels, self.indices))
        return PairBatch(self.images[rows], self.captions[rows], labels, self.ids[rows], indices)

    def __getitem__(self, row: int) -> Pair:
        label = None if self.labels is None else int(self.labels[row])
        return Pair(self.ids[row], self.images[row], self.captions[row], label)


def all_labels(labels: Sequence[int | None]) -> Int[Tensor, " pair"] | None:
    """Classes as a tensor; None unless every pair has one."""
    known = [label for label in labels if label is not None]
    return torch.tensor(known) if len(known) == len(labels) else None


class PairSteps(ABC):
    """Pairs that training takes in steps: the base of `Pairs`, `PairStream` and `PoisonedPairs`."""

    @abstractmethod
    def take(
        self, step: int, size: int, *, rows: slice = ALL, device: torch.device | str | None = None
    ) -> PairBatch:
        """The pairs of training step `step`: a pure function of the step, so that training can resume anywhere.

        Args:
            step, size: which step, and pairs a step.
            rows: which of the step's pairs, for a process that has a part in it; what is read by place reads no others.
            device: where the images go; None leaves them on the CPU.
        """

    def batch(self, step: int, size: int) -> tuple[Float[Tensor, "batch 3 h w"], list[str]]:
        """Images in [0, 1] and captions of `take`."""
        taken = self.take(step, size)
        return taken.images, list(taken.captions)


class PairOptions(TypedDict, total=False):
    """What all sources of pairs take by keyword; see `Pairs`."""

    class_names: Sequence[str]
    templates: Sequence[str] | None
    caption_seed: int
    order_seed: int
    on_error: OnError


class Pairs(PairSteps, DeviceSource):
    """A finite set of pairs, read by place. A source of its own says what its pairs are and how to get images.

    Args:
        preprocess: from a picture to pixels in [0, 1]; by default `to_pixels()`, which keeps the picture's size.
        class_names: the classes that labels stand for, and that a target is checked against; none if unknown.
        templates: captions of pairs that have a class and no text, with a slot {} for the class's name; a random one each.
            None: a pair needs a caption.
        caption_seed: of the templates drawn.
        order_seed: of the order in which `batch` goes through the pairs, anew each epoch.
        on_error: `"skip"` puts the next pair whose image can be read in the place of one whose image cannot,
            and lists the latter in `skipped`; `"raise"` stops.

    Raises:
        ValueError: a template without a slot, an unknown `on_error`, or an `order_seed` below 0.
    """

    def __init__(
        self,
        preprocess: Preprocess | None = None,
        *,
        class_names: Sequence[str] = (),
        templates: Sequence[str] | None = None,
        caption_seed: int = 0,
        order_seed: int = 0,
        on_error: OnError = "skip",
    ) -> None:
        check_choice("on_error", on_error, OnError)
        if order_seed < 0:
            raise ValueError(f"expected an order_seed that is not negative; received {order_seed}")
        self.preprocess = preprocess or to_pixels()
        self.class_names = tuple(class_names)
        self.templates = () if templates is None else check_templates(templates)
        self.caption_seed, self.order_seed = caption_seed, order_seed
        self.on_error: OnError = on_error
        self._left_out: dict[str, SkippedFile] = {}

    @property
    def pure(self) -> bool:
        return is_ours(self.preprocess)

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """What each pair is called: the same in whatever order or number they are read."""

    @property
    @abstractmethod
    def captions(self) -> Sequence[str]: ...

    @property
    @abstractmethod
    def labels(self) -> Int[Tensor, " pair"] | None: ...

    @property
    def known_labels(self) -> Sequence[int | None]:
        """The class of each pair that has one, where `labels` is for all or none."""
        return [None] * len(self) if self.labels is None else self.labels.tolist()

    def _file(self, index: int) -> Path | None:
        """The file that holds a pair's image; None where there is none to name."""
        return None

    @abstractmethod
    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        """The image of each pair as `preprocess` prepares it, or why there is none."""

    @property
    def skipped(self) -> list[SkippedFile]:
        """What was left out so far; images that cannot be read show only in reading."""
        return list(self._left_out.values())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)} pairs")
        return self.read([index % len(self)])[0]

    def __iter__(self) -> Iterator[Pair]:
        """Every pair in order; those whose images cannot be read are left out."""
        for places, images in self._readable(range(len(self)), READ):
            for index, image in zip(places, images, strict=True):
                label = None if self.labels is None else int(self.labels[index])
                yield Pair(self.ids[index], finished(image, self.preprocess), self.captions[index], label)

    def image(self, index: int) -> Tensor | None:
        """The image of a pair; None if it cannot be read, which is listed in `skipped`."""
        image = self._images([index])[0]
        if isinstance(image, str):
            self._leave_out(self.ids[index], image)
            return None
        return finished(image, self.preprocess)

    def batches(
        self, batch_size: int = 64, *, device: torch.device | str | None = None
    ) -> Iterator[PairBatch]:
        """Every pair in order, `batch_size` at a time (the last batch may be smaller), as `__iter__` goes through them.

        Args:
            batch_size: pairs in a batch.
            device: where the images go; None leaves them on the CPU.
        """
        return self.part(range(len(self)), batch_size, device=device)

    def part(
        self, places: Sequence[int], batch_size: int = 64, *, device: torch.device | str | None = None
    ) -> Iterator[PairBatch]:
        """Those of the pairs at some places whose images can be read, as `batches` gives them; there may be none."""
        for kept, images in self._readable(places, batch_size):
            yield self._batch(kept, images, device)

    def _readable(self, places: Sequence[int], size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
        return readable(places, size, self._images, lambda place, why: self._leave_out(self.ids[place], why))

    def _batch(
        self, places: Sequence[int], images: Sequence[Tensor], device: torch.device | str | None
    ) -> PairBatch:
        return PairBatch(
            stack_images(images, self.preprocess, device=device),
            tuple(self.captions[place] for place in places),
            None if self.labels is None else self.labels[list(places)],
            tuple(self.ids[place] for place in places),
            torch.tensor(places),
        )

    def read(self, indices: Sequence[int], *, device: torch.device | str | None = None) -> PairBatch:
        """The pairs at these places.

        Args:
            indices: the places.
            device: where the images go; None leaves them on the CPU.

        Raises:
            ValueError: no image can be read, one cannot and `on_error="raise"`, or images of several sizes.
        """
        places, images = list(indices), self._images(indices)
        for row, place in enumerate(places):
            tried = 0
            while isinstance(found := images[row], str):
                self._leave_out(self.ids[places[row]], found)
                tried += 1
                if tried == len(self):
                    raise ValueError(
                        f"expected images; not one of {len(self)} can be read, the last: {found}"
                    )
                places[row] = (place + tried) % len(self)
                images[row] = self._images([places[row]])[0]
        return self._batch(places, [image for image in images if not isinstance(image, str)], device)

    def take(
        self, step: int, size: int, *, rows: slice = ALL, device: torch.device | str | None = None
    ) -> PairBatch:
        """The pairs of training step `step`, or the `rows` of them, which alone are read.

        Raises:
            ValueError: more pairs asked for than there are, a negative step; or as `read`.
        """
        return self.read(batch_places(len(self), step, size, seed=self.order_seed)[rows], device=device)

    def _caption(self, text: str, label: int | None, name: str) -> str:
        """`text`, or where there is none a template filled with the class; empty where neither is known."""
        if text or label is None or not (self.templates and self.class_names):
            return text
        return template_caption(self.class_names[label], self.templates, seed=self.caption_seed, name=name)

    def _leave_out(self, name: str, reason: str, *, within: object = None) -> None:
        if self.on_error == "raise":
            raise unusable(within or name, reason)
        self._left_out[name] = SkippedFile(name, reason)


@dataclass(frozen=True)
class PairEntry:
    """What is known of a pair without its image, and where the image lies."""

    id: str
    caption: str
    label: int | None
    image: Any = None


def entries_of(pairs: PairBatch | Pairs) -> list[PairEntry]:
    """Pairs without their images; classes where all are known."""
    labels = [None] * len(pairs) if pairs.labels is None else pairs.labels.tolist()
    return [PairEntry(*pair) for pair in zip(pairs.ids, pairs.captions, labels, strict=True)]


class ListedPairs(Pairs):
    """Base of sources that know all their pairs before any image is read: shards, tables, folders."""

    entries: Sequence[PairEntry]

    def _list(self, entries: Iterable[PairEntry], expected: str) -> None:
        """Keep the entries; raises ValueError if there is none."""
        self.entries = list(entries)
        if not self.entries:
            why = f"; {self.skipped[0].path.rstrip(':')}: {self.skipped[0].reason}" if self.skipped else ""
            raise ValueError(f"expected {expected}; found none{why}")

    @cached_property
    def ids(self) -> Sequence[str]:
        return [entry.id for entry in self.entries]

    @cached_property
    def captions(self) -> Sequence[str]:
        return [entry.caption for entry in self.entries]

    @cached_property
    def labels(self) -> Int[Tensor, " pair"] | None:
        return all_labels(self.known_labels)

    @property
    def known_labels(self) -> Sequence[int | None]:
        return [entry.label for entry in self.entries]

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return in_threads(self._image, [self.entries[index].image for index in indices], pure=self.pure)

    @abstractmethod
    def _image(self, image: Any) -> Tensor | str:
        """The image that an entry names, or why there is none; several threads ask at a time."""


class FilePairs(ListedPairs):
    """Base of sources whose images are files of their own, where each entry says.

    Attributes:
        root: a folder that the files must lie in, links resolved; None allows any.
    """

    root: str | Path | None

    def _file(self, index: int) -> Path:
        return self.entries[index].image

    def _image(self, image: Path) -> Tensor | str:
        return read_image(image, self.preprocess, root=self.root)


def batch_places(length: int, step: int, size: int, *, seed: int) -> list[int]:
    """Places of the pairs of one step. Each epoch has an order of its own and leaves out what fills no batch.

    Args:
        length: how many pairs there are.
        step, size: which step, and pairs a step.
        seed: of the orders.

    Raises:
        ValueError: batches of no pairs or of more than there are, or a negative step.
    """
    if not 0 < size <= length:
        raise ValueError(f"expected batches of 1 to {length} pairs, as many as there are; received {size}")
    if step < 0:
        raise ValueError(f"expected a step that is not negative; received {step}")
    epoch, start = divmod(step * size, length - length % size)
    return permuted(length, seed, epoch)[start : start + size].tolist()


@lru_cache(maxsize=2)
def permuted(length: int, seed: int, epoch: int = 0) -> np.ndarray:
    """`0 .. length-1` in an order that seed and epoch give."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


class SubsetPairs(Pairs):
    """The pairs of `base` at `places`, called as they are there.

    Args:
        base: pairs.
        places: which of them, in order.
        order_seed: as `Pairs`.

    Raises:
        IndexError: a place that `base` does not have.
    """

    def __init__(self, base: Pairs, places: Sequence[int], *, order_seed: int = 0) -> None:
        self.base, self.places = base, tuple(places)
        for place in self.places:
            if not 0 <= place < len(base):
                raise IndexError(f"expected places in 0..{len(base) - 1}; received {place}")
        super().__init__(
            base.preprocess,
            class_names=base.class_names,
            templates=base.templates or None,
            order_seed=order_seed,
            on_error=base.on_error,
        )

    @property
    def pure(self) -> bool:
        return self.base.pure

    @cached_property
    def ids(self) -> Sequence[str]:
        return [self.base.ids[place] for place in self.places]

    @cached_property
    def captions(self) -> Sequence[str]:
        return [self.base.captions[place] for place in self.places]

    @cached_property
    def labels(self) -> Int[Tensor, " pair"] | None:
        return all_labels(self.known_labels)

    @cached_property
    def known_labels(self) -> Sequence[int | None]:
        known = self.base.known_labels
        return [known[place] for place in self.places]

    @property
    def skipped(self) -> list[SkippedFile]:
        """What `base` left out, on opening too, and what of these pairs could not be read."""
        return [*self.base.skipped, *super().skipped]

    def _file(self, index: int) -> Path | None:
        return self.base._file(self.places[index])

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return self.base._images([self.places[index] for index in indices])
