"""Image sources by a path: a folder, a table, or shards, whatever the command.

Images with classes by a word or a path, as the command line names them: in [0, 1], for `evaluate`.

Pairs by a word or a path, as the command line names them.
"""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from decompclip.data.cifar10 import CLASSES, TEMPLATES, cifar10
from decompclip.data.datasets import folder_pairs
from decompclip.data.files import SkippedFile, is_bookkeeping
from decompclip.data.images import FolderSource, ImageBatch, OnError, class_places, find_class, image_files
from decompclip.data.pairs import Pairs, SubsetPairs
from decompclip.data.pixels import Preprocess, stack_images, to_pixels
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.data.shapes_pairs import ShapesPairs
from decompclip.data.shards import ShardPairs, check_finished, expand_shards
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


WORLD_SEED = 8_001
"""Stream of the Shapes world; no bundled model was trained or measured on it."""

DEFAULT_LIMIT = 2_000

KNOWN = {"shapes": PROPERTIES["shape"], "cifar10": CLASSES}
"""Bundled or well-known data sets, with their classes."""


def classes_of(spec: str) -> tuple[str, ...]:
    """The classes of a data set that is known by a word; none for a folder."""
    return KNOWN.get(spec.partition(":")[0], ())


def open_labelled(
    spec: str,
    size: tuple[int, int],
    class_names: Sequence[str],
    *,
    preprocess: Preprocess | None = None,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    on_error: OnError = "skip",
    root: str | Path | None = None,
) -> Shapes | Pairs | FolderSource | PairImages:
    """The images that `spec` names.

    Args:
        spec: `shapes` or `shapes:5000` (the bundled world), `cifar10` or `cifar10:500` (its test part, in the folder that
            DECOMPCLIP_DATA names), or what `open_images` takes: a folder with a sub-folder of images a class, a table, shards.
        size: of the model's images.
        class_names: the classifier's.
        preprocess: from a picture to pixels in [0, 1] of that size, a model's `pixels`; by default the shorter side is
            scaled and the middle cropped.
        limit: at most so many images, where `spec` does not say how many; None takes all of a folder.
        seed: of the world, or of which images are taken.
        root: a folder that the images must lie in, links resolved.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such source, or its classes are others.
    """
    name, _, length = spec.partition(":")
    preprocess = preprocess or to_pixels(size)
    if name in KNOWN and tuple(class_names) != KNOWN[name]:
        raise ValueError(
            f"expected the {len(KNOWN[name])} classes of {name}, {', '.join(KNOWN[name])}; received {len(class_names)}: "
            f"{', '.join(class_names)}; leave --classes out"
        )
    if name in KNOWN and length and not (length.isdecimal() and int(length)):
        raise ValueError(f"expected {name}:N with a number N of images; received {spec}")
    if name == "shapes":
        if size[0] != size[1]:
            raise ValueError(f"expected a model of square images for shapes; received {size[0]} x {size[1]}")
        return Shapes(int(length or limit or DEFAULT_LIMIT), seed=WORLD_SEED + seed, resolution=size[0])
    if name == "cifar10":
        photos = cifar10("test", preprocess=preprocess)
        order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(photos))
        return SubsetPairs(photos, sorted(order[: int(length or limit or len(photos))].tolist()))
    return open_images(spec, preprocess, class_names, limit=limit, seed=seed, on_error=on_error, root=root)


SHAPES_LENGTH = 16_000
"""Pairs of the bundled world, unless said otherwise."""

PLAIN_TEMPLATES = ("a photo of a {}.",)


Kind = Literal["folder", "table", "shards", "poisons"]


def kind_of(spec: str | Path) -> Kind:
    """What a path stands for: a table or shards by its name, or a folder; `poisons.json` for what it lists."""
    path = Path(spec)
    if path.suffix.lower() in {".csv", ".tsv"} and not path.is_dir():
        return "table"
    if path.name == "poisons.json" and not path.is_dir():
        return "poisons"
    if path.is_dir():
        shards = (shard for shard in path.glob("*.tar") if not is_bookkeeping(shard.name))
        return "shards" if any(shards) else "folder"
    return "shards" if ".tar" in str(spec) else "folder"


def open_pairs(
    spec: str | Path,
    preprocess: Preprocess | None = None,
    *,
    class_names: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> Pairs:
    """The pairs that `spec` names.

    Args:
        spec: `shapes` or `shapes:5000` (the bundled world); `cifar10` (in the folder that DECOMPCLIP_DATA names); a
            `.csv` or `.tsv` table; WebDataset shards, as `ShardPairs` takes them; or a folder with a sub-folder of
            images a class.
        preprocess: from a picture to pixels in [0, 1].
        class_names: of shards and tables.
        templates: captions of images that have a class; by default CIFAR-10's own, else "a photo of a {}.".
        seed: of the captions drawn and of the order; of the world too.
        root: a folder that the images of folders and tables must lie in, links resolved.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it cannot be used.
    """
    name, _, length = str(spec).partition(":")
    if name == "shapes":
        if length and not (length.isdecimal() and int(length)):
            raise ValueError(f"expected shapes:N with a number N of pairs; received {spec}")
        return ShapesPairs(int(length or SHAPES_LENGTH), seed=seed, order_seed=seed)
    if name == "cifar10":
        texts = TEMPLATES if templates is None else templates
        return cifar10(templates=texts, preprocess=preprocess, caption_seed=seed, order_seed=seed)
    texts = PLAIN_TEMPLATES if templates is None else templates
    if Path(spec).is_dir():
        check_finished(Path(spec))
    filled = texts if class_names else None
    match kind_of(spec):
        case "table":
            return CsvPairs(
                spec,
                preprocess,
                class_names=class_names,
                templates=filled,
                root=root,
                caption_seed=seed,
                order_seed=seed,
            )
        case "shards":
            return ShardPairs(
                str(spec),
                preprocess,
                class_names=class_names,
                templates=filled,
                caption_seed=seed,
                order_seed=seed,
            )
        case "folder" if Path(spec).is_dir():
            return folder_pairs(spec, texts, preprocess, root=root, caption_seed=seed, order_seed=seed)
    raise FileNotFoundError(
        "expected pairs as shapes, cifar10, a .csv or .tsv table, WebDataset shards (.tar) or a folder with a sub-folder "
        f"of images a class; there is no {spec}"
    )
