"""Parquet files of image bytes, as Hugging Face data sets and img2dataset write them, read one row group at a time."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from decompclip.data.datasets import DatasetPairs
from decompclip.data.files import open_rgb, reason
from decompclip.data.images import OnError
from decompclip.data.pixels import Preprocess

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
LABEL_COLUMNS = ("label", "cls", "labels", "class")
CAPTION_COLUMNS = ("caption", "text", "txt")
PLAIN = ("a photo of a {}.",)

HELD = 512 * 2**20
"""Bytes of encoded images that are kept: row groups are read again where a data set has more of them."""


def parquet_files(path: str | Path) -> list[Path]:
    """The parquet files that a file or a folder stands for, in order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.parquet")) if path.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"expected a parquet file, or a folder of such; received {path}, which is neither"
        )
    return files


def parquet_pairs(
    path: str | Path | Sequence[str | Path],
    preprocess: Preprocess | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    caption_seed: int = 0,
    order_seed: int = 0,
    on_error: OnError = "skip",
    need_captions: bool = True,
) -> DatasetPairs:
    """Images in parquet files as pairs.

    An image is a column of bytes (`jpg`, `png`, `webp`, `image`) or a struct of `bytes` and `path` (`image`, as Hugging
    Face has it). Captions are a column `caption`, `text` or `txt`; classes one `label` or `cls` of whole numbers or names.

    Args:
        path: a file, a folder of files, or several files in order.
        preprocess: from a picture to pixels in [0, 1]; see `to_pixels`.
        class_names: the classes, in the order of their numbers; by default the file's own (Hugging Face's `ClassLabel`), or the
            names that its labels are. Where a file has names of its own, its labels are found among these by name.
        templates: captions of images that have a class and no caption; by default "a photo of a {}.".
        caption_seed, order_seed, on_error: as `DatasetPairs`.
        need_captions: refuse to give captions where nothing is known of an image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no parquet, no column of images, labels that are neither whole numbers nor known names, or a damaged part
            among the labels or captions. A damaged part among the images is left out and listed, or raises, as `on_error`
            says.
    """
    paths = [path] if isinstance(path, str | Path) else path
    rows = ParquetRows([file for each in paths for file in parquet_files(each)], class_names)
    natural = rows.column("captions")
    dataset = (
        _Labelled(rows)
        if natural is None and rows.targets
        else _Captioned(rows, natural or ["" if need_captions else "image"] * len(rows))
    )
    return DatasetPairs(
        dataset,
        preprocess,
        class_names=rows.classes,
        templates=templates or PLAIN,
        ids=rows.ids,
        caption_seed=caption_seed,
        order_seed=order_seed,
        on_error=on_error,
    )


@dataclass(frozen=True)
class _Group:
    file: int
    place: int  # in the file
    start: int  # its first row among all
    rows: int


class ParquetRows:
    """Rows of parquet files by their place; image bytes are read a row group at a time.

    Attributes:
        files: in order.
        classes: names that labels stand for; empty where there are none.
        ids: `file#row` of each.

    Raises:
        ValueError: as `parquet_pairs`.
    """

    def __init__(self, files: Sequence[Path], class_names: Sequence[str] | None = None) -> None:
        import pyarrow.parquet as pq

        self.files = list(files)
        self._readers: list[pq.ParquetFile] = []
        self._groups: list[_Group] = []
        for number, file in enumerate(self.files):
            try:
                reader = pq.ParquetFile(file, memory_map=True)
            except Exception as error:
                raise ValueError(
                    f"{file} is no parquet file that can be read: {reason(error)}; get it again"
                ) from error
            self._readers.append(reader)
            for place in range(reader.num_row_groups):
                rows = reader.metadata.row_group(place).num_rows
                self._groups.append(_Group(number, place, len(self), rows))
        schema = self._schema
        self._image = next(
            (name for name in IMAGE_COLUMNS if name in schema.names and _holds_bytes(schema, name)), None
        )
        if self._image is None:
            raise ValueError(
                f"expected a column of image bytes called {', '.join(IMAGE_COLUMNS)}; {self.files[0]} has "
                f"{', '.join(f'{field.name} ({field.type})' for field in schema) or 'no column'}"
            )
        self._held: OrderedDict[int, list[bytes | None] | str] = OrderedDict()
        self._asked = class_names

    def __len__(self) -> int:
        return self._groups[-1].start + self._groups[-1].rows if self._groups else 0

    @property
    def _schema(self) -> pa.Schema:
        return self._readers[0].schema_arrow

    @cached_property
    def ids(self) -> list[str]:
        return [f"{self.files[g.file].name}#{row}" for g in self._groups for row in self._within(g)]

    def _within(self, group: _Group) -> range:
        first = next(g.start for g in self._groups if g.file == group.file)
        return range(group.start - first, group.start - first + group.rows)

    def column(self, name: str) -> list[Any] | None:
        """A column of all files; `"labels"` and `"captions"` under any of their names; None where there is none."""
        known = {"labels": LABEL_COLUMNS, "captions": CAPTION_COLUMNS}.get(name, (name,))
        found = next((each for each in known if each in self._schema.names), None)
        if found is None:
            return None
        values: list[Any] = []
        for file, reader in zip(self.files, self._readers, strict=True):
            try:
                values += reader.read(columns=[found]).column(0).to_pylist()
            except Exception as error:
                raise ValueError(
                    f"{file}: column {found!r} cannot be read: {reason(error)}; get the file again"
                ) from error
        return values

    @cached_property
    def _labels(self) -> tuple[list[int] | None, tuple[str, ...]]:
        """The class of every row, and the classes' names."""
        values, own = self.column("labels"), tuple(self._own_names())
        names = tuple(self._asked or own)
        if values is None:
            return None, ()
        kinds = {type(value) for value in values}
        if kinds == {int} and own and own != names:  # numbers of the file's own names
            outside = [value for value in values if not 0 <= value < len(own)]
            if outside:
                raise ValueError(
                    f"expected labels 0..{len(own) - 1}, as {self.files[0]} names them; received {outside[0]}"
                )
            values, kinds = [own[value] for value in values], {str}
        if kinds == {int}:
            return values, names or tuple(map(str, range(max(values) + 1)))
        if kinds != {str}:
            raise ValueError(
                f"expected labels that are whole numbers or names; {self.files[0]} has "
                f"{', '.join(sorted(kind.__name__ for kind in kinds))}; every row needs one"
            )
        names = names or tuple(sorted(set(values)))
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(
                f"expected labels among the {len(names)} class names; {self.files[0]} has {unknown[0]!r}"
                f"{f' and {len(unknown) - 1} others' if len(unknown) > 1 else ''}; pass class_names"
            )
        places = {name: place for place, name in enumerate(names)}
        return [places[value] for value in values], names

    @property
    def targets(self) -> list[int] | None:
        return self._labels[0]

    @property
    def classes(self) -> tuple[str, ...]:
        return self._labels[1]

    def _own_names(self) -> Sequence[str]:
        """Hugging Face's `ClassLabel` names, which stand in the file's metadata."""
        try:
            about = json.loads((self._schema.metadata or {})[b"huggingface"])
            features = about["info"]["features"]
            return next(
                features[name]["names"] for name in LABEL_COLUMNS if "names" in features.get(name, {})
            )
        except (KeyError, TypeError, ValueError, StopIteration):
            return ()

    def picture(self, index: int) -> Image.Image:
        """Raises ValueError or OSError where there is no image that can be read."""
        number = int(np.searchsorted([g.start for g in self._groups], index, side="right")) - 1
        group, held = self._groups[number], self._bytes(number)
        if isinstance(held, str):
            raise ValueError(held)
        content = held[index - group.start]
        if content is None:
            raise ValueError("has no image bytes")
        return open_rgb(io.BytesIO(content))

    def _bytes(self, number: int) -> list[bytes | None] | str:
        """Encoded images of a row group, or why they cannot be read."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        group = self._groups[number]
        try:
            column = self._readers[group.file].read_row_group(group.place, columns=[self._image]).column(0)
            found: list[Any] | str = column.to_pylist()
        except Exception as error:
            found = (
                f"row group {group.place} of {self.files[group.file].name} cannot be read: {reason(error)}"
            )
        if not isinstance(found, str):
            found = [value.get("bytes") if isinstance(value, dict) else value for value in found]
        self._held[number] = found
        while len(self._held) > 1 and sum(map(_size, self._held.values())) > HELD:
            self._held.popitem(last=False)
        return found


def _size(held: list[bytes | None] | str) -> int:
    return 0 if isinstance(held, str) else sum(len(content) for content in held if content)


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    import pyarrow as pa

    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        places = [place for place in range(kind.num_fields) if kind.field(place).name == "bytes"]
        kind = kind.field(places[0]).type if places else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@dataclass(frozen=True)
class _Labelled:
    """Rows as (picture, class)."""

    rows: ParquetRows

    @property
    def targets(self) -> list[int] | None:
        return self.rows.targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, None]:
        return self.rows.picture(index), None  # what comes second stands in a column


@dataclass(frozen=True)
class _Captioned(_Labelled):
    """Rows as (picture, caption), with a class where there is one; no text where nothing is known of an image."""

    captions: list[Any]
