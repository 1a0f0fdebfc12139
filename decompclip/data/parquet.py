"""Parquet files of image bytes, as Hugging Face data sets and img2dataset write them, read one row group at a time."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Unpack

from decompclip.data.files import reason
from decompclip.data.pairs import ListedPairs, PairEntry, PairOptions
from decompclip.data.pixels import Preprocess, read_image

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
LABEL_COLUMNS = ("label", "cls", "labels", "class")
CAPTION_COLUMNS = ("caption", "text", "txt")
PLAIN_TEMPLATES = ("a photo of a {}.",)

HELD = 512 * 2**20
"""Bytes of encoded images that are kept: row groups are read again where a data set has more of them."""

MOST_CLASSES = 100_000
"""Classes that labels may count where nothing names them: larger numbers are ids of something else."""


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


class ParquetPairs(ListedPairs):
    """Images in parquet files as pairs.

    An image is a column of bytes (`jpg`, `png`, `webp`, `image`) or a struct of `bytes` and `path` (`image`, as Hugging
    Face has it). Captions are a column `caption`, `text` or `txt`; classes one `label` or `cls` of whole numbers or names.

    Args:
        path: a file, a folder of files, or several files in order.
        preprocess: as `Pairs`.
        need_captions: False keeps rows without one, for their images.
        options: as `Pairs`. `class_names` are by default the file's own (Hugging Face's `ClassLabel`), or the names that its
            labels are; where a file has names of its own, its labels are found among those given by name. `templates` are by
            default "a photo of a {}.".

    Raises:
        FileNotFoundError: no such file.
        ValueError: no parquet, no rows, no column of images, labels that are neither whole numbers nor known names, or a
            damaged part among the labels or captions. A damaged part among the images is left out and listed, or raises, as
            `on_error` says.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        preprocess: Preprocess | None = None,
        *,
        need_captions: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        paths = [path] if isinstance(path, str | Path) else path
        self.rows = ParquetRows([file for each in paths for file in parquet_files(each)])
        labels, names = self.rows.labels(options.get("class_names", ()))
        templates = options.get("templates") or PLAIN_TEMPLATES
        super().__init__(preprocess, **{**options, "class_names": names, "templates": templates})
        entries = []
        for place, (name, label, text) in enumerate(
            zip(self.rows.ids, labels, self._texts(labels), strict=True)
        ):
            caption = self._caption(text, label, name)
            if need_captions and not caption:
                self._leave_out(name, "has no caption")
                continue
            entries.append(PairEntry(name, caption, label, place))
        self._list(entries, f"rows with an image and a caption in {self.rows.files[0]}")

    def _texts(self, labels: Sequence[int | None]) -> Sequence[str]:
        """The caption of each row; empty where there is none."""
        found = self.rows.column(*CAPTION_COLUMNS) or [""] * len(self.rows)
        return [text.strip() if isinstance(text, str) else "" for text in found]

    def _image(self, image: int) -> Tensor | str:
        content = self.rows.content(image)
        return content if isinstance(content, str) else read_image(content, self.preprocess)


@dataclass(frozen=True)
class _Group:
    """A row group: its file and its place there, its first row there and among all, and how many."""

    file: int
    place: int
    within: int
    start: int
    rows: int


class ParquetRows:
    """Rows of parquet files by their place; image bytes are read a row group at a time.

    Args:
        files: in order.

    Attributes:
        ids: `file#row` of each.

    Raises:
        ValueError: as `ParquetPairs`.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        self.files = list(files)
        self._readers: list[pq.ParquetFile] = []
        self._groups: list[_Group] = []
        total = 0
        for number, file in enumerate(self.files):
            try:
                reader = pq.ParquetFile(file, memory_map=True)
            except Exception as error:
                raise ValueError(
                    f"{file} is no parquet file that can be read: {reason(error)}; get it again"
                ) from error
            self._readers.append(reader)
            within = 0
            for place in range(reader.num_row_groups):
                rows = reader.metadata.row_group(place).num_rows
                self._groups.append(_Group(number, place, within, total, rows))
                within, total = within + rows, total + rows
        if not total:
            raise ValueError(f"expected rows with images; {self.files[0]} has none; get it again")
        self._starts = [group.start for group in self._groups]
        self._total = total
        schema = self._schema
        held = [name for name in IMAGE_COLUMNS if name in schema.names and _holds_bytes(schema, name)]
        if not held:
            raise ValueError(
                f"expected a column of image bytes called {', '.join(IMAGE_COLUMNS)}; {self.files[0]} has "
                f"{', '.join(f'{field.name} ({field.type})' for field in schema) or 'no column'}"
            )
        self._image = held[0]
        self._lock = threading.Lock()
        self._held: OrderedDict[int, list[bytes | None] | str] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return self._total

    @property
    def _schema(self) -> pa.Schema:
        return self._readers[0].schema_arrow

    @cached_property
    def ids(self) -> list[str]:
        return [
            f"{self.files[group.file].name}#{group.within + row}"
            for group in self._groups
            for row in range(group.rows)
        ]

    def column(self, *names: str) -> list[Any] | None:
        """The first of these columns that there is, of all files; None where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        found = next((name for name in names if name in self._schema.names), None)
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

    def labels(self, class_names: Sequence[str]) -> tuple[list[int] | list[None], tuple[str, ...]]:
        """The class of every row, or None for all, and the classes' names.

        Args:
            class_names: in the order of their numbers; none for the files' own, if these agree.

        Raises:
            ValueError: labels that are neither whole numbers nor known names, or files that name their classes otherwise.
        """
        values, each = self.column(*LABEL_COLUMNS), [_class_label(x.schema_arrow) for x in self._readers]
        kinds = {type(value) for value in values or ()}
        if kinds == {int} and not class_names:
            self._check_alike(each)
        names = tuple(class_names) or (each[0] if len(set(each)) == 1 else ())
        if values is None or all(value is None or value == -1 for value in values):  # -1: as of test parts
            return [None] * len(self), names
        if kinds == {int} and any(own and own != names for own in each):
            named: list[Any] = self._named(values, [own or names for own in each])
            values, kinds = named, {str}
        if kinds == {int}:
            least, most = min(values), max(values)
            if least < 0 or most >= (len(names) or MOST_CLASSES):
                raise ValueError(
                    f"expected labels 0..{(len(names) or MOST_CLASSES) - 1}, the places of class_names; {self.files[0]} has "
                    f"{least}..{most}; pass class_names"
                )
            return values, names or tuple(map(str, range(most + 1)))
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

    def _check_alike(self, each: list[tuple[str, ...]]) -> None:
        """Raises ValueError unless all files have the same names for their classes."""
        for file, names in zip(self.files, each, strict=True):
            if names != each[0]:
                raise ValueError(
                    f"expected files that name their classes alike; {self.files[0]} has {', '.join(each[0]) or 'no names'}, "
                    f"and {file} has {', '.join(names) or 'none'}; pass class_names, or read them apart"
                )

    def _named(self, values: list[int], each: list[tuple[str, ...]]) -> list[str]:
        """The names of all labels: each file's by the names of that file."""
        found, start = [], 0
        for file, reader, names in zip(self.files, self._readers, each, strict=True):
            own = values[start : (start := start + reader.metadata.num_rows)]
            if outside := [value for value in own if not 0 <= value < len(names)]:
                raise ValueError(
                    f"expected labels 0..{len(names) - 1} in {file}, the places of {', '.join(names)}; received {outside[0]}; "
                    "correct the labels or the names in the file"
                )
            found += [names[value] for value in own]
        return found

    def content(self, index: int) -> bytes | str:
        """The encoded image of a row, or why there is none."""
        number = bisect_right(self._starts, index) - 1
        with self._lock:  # readers and the row groups held are one for all threads
            held = self._group(number)
        if isinstance(held, str):
            return held
        content = held[index - self._starts[number]]
        return "has no image bytes" if content is None else content

    def _group(self, number: int) -> list[bytes | None] | str:
        """Encoded images of a row group, or why they cannot be read."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        group = self._groups[number]
        try:
            column = self._readers[group.file].read_row_group(group.place, columns=[self._image]).column(0)
            values: list[Any] = column.to_pylist()
        except Exception as error:
            found = (
                f"row group {group.place} of {self.files[group.file].name} cannot be read: {reason(error)}"
            )
            self._held[number] = found
            return found
        images = [value.get("bytes") if isinstance(value, dict) else value for value in values]
        self._held[number] = images
        self._bytes += _size(images)
        while len(self._held) > 1 and self._bytes > HELD:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return images


def _class_label(schema: pa.Schema) -> tuple[str, ...]:
    """The names of Hugging Face's `ClassLabel`, which stand in a file's metadata; none where these are of another form."""
    try:
        found: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
    except (ValueError, RecursionError):
        return ()
    column = next((name for name in LABEL_COLUMNS if name in schema.names), "")
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    known = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return tuple(found) if known else ()


def _size(held: list[bytes | None] | str) -> int:
    return 0 if isinstance(held, str) else sum(len(content) for content in held if content)


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    import pyarrow as pa

    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        places = [place for place in range(kind.num_fields) if kind.field(place).name == "bytes"]
        kind = kind.field(places[0]).type if places else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
