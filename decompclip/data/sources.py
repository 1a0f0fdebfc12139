"""Images and pairs by a word or a path, as the commands take them. `READERS` is the place for another format of files."""

from __future__ import annotations

import json
import os
import tarfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from decompclip.data.datasets import FolderPairs, PairStream, StreamImages
from decompclip.data.files import (
    KNOWN,
    POISON_LIST,
    SUFFIXES,
    WORLDS,
    SkippedFile,
    SourceSpec,
    is_bookkeeping,
    open_regular,
    parse_source,
)
from decompclip.data.images import (
    FolderSource,
    ListedImages,
    OnError,
    class_places,
    find_class,
    image_files,
)
from decompclip.data.known import CC3M, CHECKED, DATASETS, DatasetCheck, check_known, known_pairs, recognise
from decompclip.data.pairs import Pairs, SubsetPairs, permuted
from decompclip.data.parquet import PLAIN_TEMPLATES, ParquetPairs, parquet_files
from decompclip.data.photos import CIFAR10_CLASSES, PhotoPairs, cifar10
from decompclip.data.pixels import Preprocess, to_pixels
from decompclip.data.shapes import PROPERTIES, Shapes, ShapesPairs
from decompclip.data.shards import ShardPairs, check_finished, expand_shards, samples
from decompclip.data.tables import CsvPairs
from decompclip.display import Track, silently, some
from decompclip.models.bundled import card
from decompclip.models.preprocessing import PictureTransform

WORLD_SEED = 8_001
"""Stream of the Shapes world; no bundled model was trained or measured on it."""

DEFAULT_LIMIT = 2_000

SHAPES_LENGTH = 16_000
"""Pairs of the bundled world, unless said otherwise."""

PHOTOGRAPHS: dict[str, Callable[..., Pairs]] = {"cifar10": cifar10, "tiny-imagenet": PhotoPairs}
"""Data sets that a word names, in the folder that DECOMPCLIP_DATA names."""


@dataclass(frozen=True)
class Reader:
    """How a kind of file that holds many pairs is read.

    Attributes:
        pairs: opens the path; by keyword `root`, `need_captions` and `PairOptions`.
        check: raises where `pairs` would find nothing, and reads no image.
    """

    pairs: Callable[..., Pairs]
    check: Callable[[str], object]


def _whole(kind: type[ShardPairs | ParquetPairs]) -> Callable[..., Pairs]:
    """Files that hold their images themselves have no use for a root."""

    def read(path: str, preprocess: Preprocess | None, *, root: Any, **options: Any) -> Pairs:
        return kind(path, preprocess, **options)

    return read


READERS = {
    "table": Reader(CsvPairs, lambda path: CsvPairs(path, need_captions=False)),
    "shards": Reader(_whole(ShardPairs), expand_shards),
    "parquet": Reader(_whole(ParquetPairs), parquet_files),
}
"""By the kind that `SUFFIX_KINDS` gives a suffix."""


class PairImages(ListedImages):
    """The images of pairs, labelled by the pairs' classes or by captions that are a class's name and no more.

    If some have a class, the others are left out and listed, as in a folder of classes; if none has, labels are None.

    Args:
        pairs: whose `preprocess` gives what the model takes.
        class_names: the classifier's classes.
        places: of the pairs to take; None takes all.
        labelled: False takes no labels.
        limit, seed: as `ListedImages`.
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
        self.pairs = pairs
        self._skipped: list[SkippedFile] = []
        places = range(len(pairs)) if places is None else places
        super().__init__(
            places,
            _labels(pairs, places, class_names) if labelled else {},
            pairs.preprocess,
            unlabelled="has no class, and no caption that is a class's name",
            where=f"{len(pairs)} pairs",
            limit=limit,
            seed=seed,
        )

    @property
    def pure(self) -> bool:
        return self.pairs.pure

    @property
    def skipped(self) -> list[SkippedFile]:
        return [*self.pairs.skipped, *self._skipped]

    def _name(self, item: int) -> str:
        return self.pairs.ids[item]

    def _file(self, item: int) -> Path | None:
        return self.pairs._file(item)

    def _images(self, items: Sequence[int]) -> list[Tensor | str]:
        return self.pairs._images(items)

    def _leave_out(self, item: int, reason: str) -> None:
        self.pairs._leave_out(self._name(item), reason)

    def _without_label(self, item: int, reason: str) -> None:
        self._skipped.append(SkippedFile(self._name(item), reason))


def listed_images(data: ListedImages | Pairs | PairStream | Shapes) -> ListedImages:
    """Images that are read by place, with their classes; a stream is gone through for it.

    Raises:
        TypeError: others.
    """
    if isinstance(data, Shapes):
        data = ShapesPairs(data.length, seed=data.seed, resolution=data.resolution)
    if isinstance(data, Pairs):
        return PairImages(data, ())
    if isinstance(data, PairStream):
        return StreamImages(data)
    if not isinstance(data, ListedImages):
        raise TypeError(
            "expected images that are read by place: a FolderSource, pairs, a PairStream, or Shapes; received "
            f"{type(data).__name__}"
        )
    return data


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
    """The images of a folder, a table, shards or parquet files.

    Args:
        spec: a folder; a data set of `decompclip.data.known`, as `imagenet:PATH`; a `.csv` or `.tsv` table with a column of images, and of classes or captions where there are; shards
            as `ShardPairs` takes them, such as a folder that `decompclip poison` wrote; a parquet file or a folder of such; or the `poisons.json` in
            the shards' folder, for the poisoned images alone, which have no label: their caption and class are the attacker's.
        preprocess: from a picture to what the model takes.
        class_names: by which to label.
        limit, seed, on_error, root: as `FolderSource`.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such source, or it holds no images.
    """
    source = parse_source(spec)
    kind, path = source.kind, source.path
    poisoned = kind == "poisons"
    if poisoned:
        kind, path = "shards", path.parent
    if kind in KNOWN:
        known = known_pairs(source, preprocess, class_names=class_names, root=root, on_error=on_error)
        return PairImages(known, class_names, limit=limit, seed=seed)
    if kind not in READERS:
        return FolderSource(
            path, preprocess, class_names=class_names, limit=limit, seed=seed, on_error=on_error, root=root
        )
    _say_pictures_left_out(kind, path)
    templates = PLAIN_TEMPLATES if class_names else None
    pairs = READERS[kind].pairs(
        str(path),
        preprocess,
        root=root,
        need_captions=False,
        class_names=class_names,
        templates=templates,
        on_error=on_error,
    )
    record = (path if path.is_dir() else path.parent) / POISON_LIST
    if isinstance(pairs, ShardPairs) and (poisoned or record.is_file()):
        poisons = _poisoned(pairs, record)
        if poisoned:
            return PairImages(pairs, class_names, places=poisons, labelled=False, limit=limit, seed=seed)
        if poisons:
            warnings.warn(
                f"{len(poisons)} of the {len(pairs)} pairs in {spec} are poisoned, with the attacker's captions and classes; "
                f"{record} stands for these images alone",
                stacklevel=2,
            )
    source = PairImages(pairs, class_names, limit=limit, seed=seed)
    if class_names and not source.labelled:
        warnings.warn(
            f"images of {spec} have no labels: no column or file of classes, and no caption that is the name of one of "
            f"{len(class_names)} classes",
            stacklevel=2,
        )
    return source


def _say_pictures_left_out(kind: str, path: Path) -> None:
    """A folder that holds shards or parquet files too is read for these alone."""
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not is_bookkeeping(name))
        pictures = [n for n in names if Path(n).suffix.lower() in SUFFIXES and not is_bookkeeping(n)]
        if pictures:
            first = Path(folder, min(pictures)).relative_to(path).as_posix()
            warnings.warn(
                f"{path} is read as {kind}, and the pictures in it are left out, as {first}; to read them, give them a folder of their own",
                stacklevel=3,
            )
            return


def check_images(spec: str | Path) -> None:
    """Whether `open_images` will find it, without reading an image.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `open_images`.
    """
    source = parse_source(spec)
    kind, path = source.kind, source.path
    if kind == "poisons":
        kind, path = "shards", path.parent
    if kind in KNOWN:
        known_pairs(source)
    elif kind in READERS:
        READERS[kind].check(str(path))
    else:
        image_files(path)


def check_data(spec: str | Path, *, decode: bool = True, track: Track = silently) -> DatasetCheck:
    """What a data set on the disk holds, and what of it is missing or broken.

    Args:
        spec: `imagenet:PATH` and the others of `decompclip.data.known`; `cc3m:PATH`; or what `open_images` takes: the layout of a
            folder shows whether it is one of the known ones.
        decode: open every picture; False looks only whether it is there.
        track: shows progress.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such data set, or nothing of it can be read.
    """
    source = known_source(spec)
    if source.kind in KNOWN:
        return check_known(source, decode=decode, track=track)
    cc3m = str(spec).startswith("cc3m:")
    opened = open_pairs(spec, _POINT) if cc3m else open_images(spec, _POINT, ())
    images = len(opened)
    if decode:
        parts = track(opened.batches(CHECKED), source.text, -(-images // CHECKED))
        images = sum(len(batch.images) for batch in parts)
    facts = (CC3M.title, CC3M.images, CC3M.get) if cc3m else (source.text, None, "")
    return DatasetCheck(facts[0], images, facts[1], (), tuple(opened.skipped), facts[2])


def known_source(spec: str | Path) -> SourceSpec:
    """As `parse_source`, and a folder laid out as one of the known data sets is that one."""
    source = parse_source(spec)
    folder = source.kind not in (*WORLDS, *KNOWN) and source.path.is_dir()
    word = recognise(source.path) if folder else None
    return SourceSpec(source.text, word, source.text) if word else source


_POINT = PictureTransform(lambda picture: Image.new("RGB", (1, 1)))
"""Of pictures that are opened to see whether they can be."""


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
        # a cut one holds what stands whole before the cut
        with suppress(tarfile.TarError), open_regular(shard) as file:
            for key, files in samples(shard, []):
                place = places.get(f"{pairs.names[shard]}/{key}")
                if place is not None and "json" in files:
                    start, size, _ = files["json"]
                    file.seek(start)
                    if json.loads(file.read(size)).get("id") in names:
                        found.append(place)
    if names and not found:
        raise ValueError(
            f"expected the shards that {record} is about beside it; none of its {len(names)} pairs is there"
        )
    return sorted(found)


def classes_of(spec: str) -> tuple[str, ...]:
    """The classes of a data set that is known by a word; none for a path."""
    kind = parse_source(spec).kind
    if kind in KNOWN:
        return DATASETS[kind].class_names()
    if kind == "tiny-imagenet":
        return tuple(card("photos")["class_names"])
    return {"shapes": PROPERTIES["shape"], "cifar10": CIFAR10_CLASSES}.get(kind, ())


def check_world_classes(spec: str, class_names: Sequence[str]) -> None:
    """Raises ValueError where a world, whose classes are numbers alone, has other classes."""
    known = () if parse_source(spec).kind in KNOWN else classes_of(spec)
    if known and tuple(class_names) != known:
        raise ValueError(
            f"expected the {len(known)} classes of {parse_source(spec).kind}, {', '.join(known)}; received "
            f"{len(class_names)}: {some(class_names, 12)}; leave --classes out"
        )


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
    """The images that `spec` names, with classes, in [0, 1], for `evaluate`.

    Args:
        spec: `shapes` or `shapes:5000` (the bundled world), `cifar10` or `tiny-imagenet`, also `cifar10:500` (the test part, in the
            folder that DECOMPCLIP_DATA names), or what `open_images` takes: a folder with a sub-folder of images a class, `imagenet:PATH`, a table, shards.
        size: of the model's images.
        class_names: the classifier's.
        preprocess: from a picture to pixels in [0, 1] of that size, a model's `pixels`; by default the shorter side is
            scaled and the middle cropped.
        limit: at most so many images, where `spec` does not say how many; None takes all of a folder.
        seed: of the world, or of which images are taken.
        on_error, root: as `open_images`.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such source, or its classes are others.
    """
    source = parse_source(spec)
    preprocess = preprocess or to_pixels(size)
    check_world_classes(spec, class_names)
    if source.kind == "shapes":
        if size[0] != size[1]:
            raise ValueError(f"expected a model of square images for shapes; received {size[0]} x {size[1]}")
        return Shapes(source.count or limit or DEFAULT_LIMIT, seed=WORLD_SEED + seed, resolution=size[0])
    if source.kind in PHOTOGRAPHS:
        whole = PHOTOGRAPHS[source.kind]("test", preprocess=preprocess)
        return _drawn(whole, source.count or min(limit or len(whole), len(whole)), seed, spec)
    return open_images(spec, preprocess, class_names, limit=limit, seed=seed, on_error=on_error, root=root)


def _drawn(pairs: Pairs, count: int, seed: int, spec: str | Path) -> SubsetPairs:
    """`count` of them, which the seed draws, in their own order.

    Raises:
        ValueError: there are not so many.
    """
    if count > len(pairs):
        raise ValueError(f"expected at most {len(pairs)} images, as many as there are; received {spec}")
    return SubsetPairs(pairs, sorted(permuted(len(pairs), seed)[:count].tolist()), order_seed=seed)


def open_pairs(
    spec: str | Path,
    preprocess: Preprocess | None = None,
    *,
    class_names: Sequence[str] = (),
    seed: int = 0,
    root: str | Path | None = None,
) -> Pairs:
    """The pairs that `spec` names.

    Captions of images that have a class alone are those of the data set, where a word names it, else "a photo of a {}.".

    Args:
        spec: `shapes` or `shapes:5000` (the bundled world); `cifar10` or `tiny-imagenet`, also `cifar10:5000`, which the seed draws (the
            training part, in the folder that DECOMPCLIP_DATA names); `imagenet:PATH`, `caltech101:PATH` or `pets:PATH` (`decompclip.data.known`); a
            `.parquet` file or a folder of such; a `.csv` or `.tsv` table; WebDataset shards, as `ShardPairs` takes them; or a folder with a sub-folder of
            images a class.
        preprocess: from a picture to pixels in [0, 1].
        class_names: of shards and tables.
        seed: of the captions drawn and of the order; of the world too.
        root: a folder that the images of folders and tables must lie in, links resolved.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it cannot be used.
    """
    source = parse_source(spec)
    if source.kind == "shapes":
        return ShapesPairs(source.count or SHAPES_LENGTH, seed=seed, order_seed=seed)
    if source.kind in PHOTOGRAPHS:
        count = source.count
        whole = PHOTOGRAPHS[source.kind](preprocess=preprocess, caption_seed=seed, order_seed=seed)
        return whole if count is None else _drawn(whole, count, seed, spec)
    if source.kind in KNOWN:
        given = {"class_names": class_names, "caption_seed": seed, "order_seed": seed}
        return known_pairs(source, preprocess, split="train", root=root, **given)
    if source.path.is_dir():
        check_finished(source.path)
    if source.kind in READERS:
        _say_pictures_left_out(source.kind, source.path)
        return READERS[source.kind].pairs(
            source.text,
            preprocess,
            root=root,
            need_captions=True,
            class_names=class_names,
            templates=PLAIN_TEMPLATES if class_names else None,
            caption_seed=seed,
            order_seed=seed,
        )
    if source.path.is_dir():
        return FolderPairs(
            source.path, PLAIN_TEMPLATES, preprocess, root=root, caption_seed=seed, order_seed=seed
        )
    raise FileNotFoundError(
        "expected pairs as shapes, cifar10, tiny-imagenet, imagenet:PATH, caltech101:PATH, pets:PATH, a .csv or .tsv table, parquet files, WebDataset shards (.tar) or a folder with a sub-folder "
        f"of images a class; there is no {spec}"
    )
