"""Image sources by a path: a folder, a table, or shards, whatever the command."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from decompclip.data.files import SkippedFile
from decompclip.data.images import (
    FolderSource,
    ImageBatch,
    OnError,
    class_places,
    find_class,
    image_files,
)
from decompclip.data.pair_sources import PLAIN_TEMPLATES, kind_of
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import stack_images
from decompclip.data.shards import ShardPairs, expand_shards
from decompclip.data.tables import CsvPairs

POISONS = "poisons.json"
"""The list of poisoned pairs that lies beside shards which were poisoned."""


class PairImages:
    """The images of pairs, labelled by the pairs' classes or by captions that are a class's name and no more.

    If some have a class, the others are left out and listed, as in a folder of classes; if none has, labels are None, with a
    warning.

    Args:
        pairs: whose `preprocess` gives what the model takes.
        class_names: the classifier's classes.
        places: of the pairs to take; None takes all.
        labelled: False takes no labels.
        limit, seed: as `FolderSource`.
    """

    def __init__(
        self,
        pairs: Pairs,
        class_names: Sequence[str],
        *,
        places: Sequence[int] | None = None,
        labelled: bool = True,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"expected a limit of at least 1 image; received {limit}; None takes all")
        self.pairs = pairs
        self._skipped: list[SkippedFile] = []
        chosen = list(range(len(pairs)) if places is None else places)
        self._labels = _labels(pairs, chosen, class_names) if labelled else {}
        if self._labels:
            for place in chosen:
                if place not in self._labels:
                    name = pairs.ids[place]
                    self._skipped.append(
                        SkippedFile(name, "has no class, and no caption that is a class's name")
                    )
            chosen = list(self._labels)
        if limit is not None and limit < len(chosen):
            taken = np.random.default_rng(seed).choice(len(chosen), limit, replace=False)
            chosen = [chosen[i] for i in np.sort(taken)]
        self._places = chosen

    @property
    def skipped(self) -> list[SkippedFile]:
        """What was left out so far; complete once `batches` has run to its end."""
        return [*self.pairs.skipped, *self._skipped]

    def __len__(self) -> int:
        return len(self._places)

    def batches(self, batch_size: int = 64) -> Iterator[ImageBatch]:
        """All readable images, `batch_size` at a time (the last batch may be smaller).

        Raises:
            ValueError: not one image could be read.
        """
        readable = (
            (place, image) for place in self._places if (image := self.pairs.image(place)) is not None
        )
        held: list[tuple[int, Tensor]] = []
        found = False
        for item in readable:
            held.append(item)
            found = True
            if len(held) == batch_size:
                yield self._batch(held)
                held = []
        if held:
            yield self._batch(held)
        if not found:
            last = f", the last: {self.skipped[-1].reason}" if self.skipped else ""
            raise ValueError(f"expected images; none of {len(self)} could be read{last}")

    def _batch(self, held: Sequence[tuple[int, Tensor]]) -> ImageBatch:
        labels = torch.tensor([self._labels[place] for place, _ in held]) if self._labels else None
        names = tuple(self.pairs.ids[place] for place, _ in held)
        return ImageBatch(stack_images([image for _, image in held]), labels, names)


def _labels(pairs: Pairs, places: Sequence[int], class_names: Sequence[str]) -> dict[int, int]:
    known, named = pairs.known_labels, class_places(class_names)
    found = {
        place: known[place] if known[place] is not None else find_class(pairs.captions[place], named)
        for place in places
    }
    return {place: label for place, label in found.items() if label is not None}


def open_images(
    spec: str | Path,
    preprocess: Callable[[Image.Image], Float[Tensor, "3 h w"]],
    class_names: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    on_error: OnError = "skip",
    root: str | Path | None = None,
) -> FolderSource | PairImages:
    """The images of a folder, a table or shards.

    Args:
        spec: a folder; a `.csv` or `.tsv` table with a column of images, and of classes or captions where there are; shards
            as `ShardPairs` takes them, such as a folder that `decompclip poison` wrote; or the `poisons.json` in
            that, for the poisoned images alone, which have no label: their caption and class are the attacker's.
        preprocess: from a picture to what the model takes.
        class_names: by which to label.
        limit, seed, on_error, root: as `FolderSource`.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such source, or it holds no images.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected a limit of at least 1 image; received {limit}; None takes all")
    kind, path = kind_of(spec), Path(spec)
    if kind == "folder":
        return FolderSource(
            path, preprocess, class_names=class_names, limit=limit, seed=seed, on_error=on_error, root=root
        )
    templates = PLAIN_TEMPLATES if class_names else None
    options = {
        "class_names": class_names,
        "templates": templates,
        "need_captions": False,
        "on_error": on_error,
    }
    if kind == "table":
        pairs: Pairs = CsvPairs(path, preprocess, root=root, **options)
        source = PairImages(pairs, class_names, limit=limit, seed=seed)
    else:
        folder = path.parent if kind == "poisons" else path
        pairs = ShardPairs(str(folder), preprocess, **options)
        record = folder / POISONS
        poisons = _poisoned(pairs, record) if record.is_file() else []
        if kind == "poisons":
            return PairImages(pairs, class_names, places=poisons, labelled=False, limit=limit, seed=seed)
        if poisons:
            warnings.warn(
                f"{len(poisons)} of the {len(pairs)} pairs in {spec} are poisoned, with the attacker's captions and classes; "
                f"{record} stands for these images alone",
                stacklevel=2,
            )
        source = PairImages(pairs, class_names, limit=limit, seed=seed)
    if class_names and not source._labels:
        warnings.warn(
            f"images of {spec} have no labels: no column or file of classes, and no caption that is the name of one of "
            f"{len(class_names)} classes",
            stacklevel=2,
        )
    return source


def check_images(spec: str | Path) -> None:
    """Whether `open_images` will find it, without reading an image.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `open_images`.
    """
    match kind_of(spec):
        case "folder":
            image_files(Path(spec))
        case "table":
            CsvPairs(spec, need_captions=False)
        case "shards":
            expand_shards(spec)
        case "poisons":
            expand_shards(Path(spec).parent)


def _poisoned(pairs: ShardPairs, record: Path) -> list[int]:
    """Places of the pairs whose id in the source the list names; the shards keep it beside each pair (`KEY.json`).

    Raises:
        ValueError: the list is none, or names none of these pairs.
    """
    try:
        names = {poison["id"] for poison in json.loads(record.read_text(encoding="utf-8"))["poisons"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a list of poisons that `decompclip poison` wrote; {record} is none: {error!r}"
        ) from error
    places = {name: place for place, name in enumerate(pairs.ids)}
    found: list[int] = []
    for shard in pairs.shards:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                place = places.get(f"{pairs.names[shard]}/{key}")
                stream = tar.extractfile(member) if kind == "json" and place is not None else None
                if place is not None and stream and json.loads(stream.read()).get("id") in names:
                    found.append(place)
    if names and not found:
        raise ValueError(
            f"expected the shards that {record} is about beside it; none of its {len(names)} pairs is there"
        )
    return sorted(found)
