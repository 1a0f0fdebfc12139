"""Tables of image files, captions and classes: the CSV files that open_clip, CleanCLIP and others train on.

Tables of classes and cues too, as Waterbirds and CelebA come with (`CuePairs`).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from decompclip.api import check_choice
from decompclip.data.files import SUFFIXES, open_regular, reason
from decompclip.data.images import class_places, find_class
from decompclip.data.pairs import FilePairs, PairEntry, PairOptions
from decompclip.data.pixels import Preprocess
from decompclip.display import some

IMAGE_COLUMNS = ("filepath", "image", "path", "file", "filename")
CAPTION_COLUMNS = ("title", "caption", "text")
LABEL_COLUMNS = ("label", "class", "class_name", "category")


class CsvPairs(FilePairs):
    """The pairs of a table with a header: paths of images, from the table's folder on, and captions.

    Quotation marks are marks of the format where a row then has the header's number of columns, and letters of
    the captions otherwise, as in tables that were written without quoting. A quoted text may run over several lines,
    unless two of these are rows on their own, each with an image: a file that is there, or a name that ends as
    images' do. A row with another number of columns is left out and listed with its line.

    Args:
        table: columns apart by commas, tabs or semicolons (as in the header).
        preprocess: as `Pairs`.
        image_column: by default the first there is of `IMAGE_COLUMNS`: open_clip's `filepath`, CleanCLIP's `image`, ...
        caption_column: by default the first there is of `CAPTION_COLUMNS`: `title`, `caption`, ...
        label_column: by default the first there is of `LABEL_COLUMNS`, where there are class names.
        root: a folder that all images must lie in, links resolved; None allows any.
        need_captions: False keeps rows without one, for their images.
        options: as `Pairs`; classes are read as names or as places counted from 0.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: a column that is not there, no row that can be used, or no text in UTF-8.
    """

    def __init__(
        self,
        table: str | Path,
        preprocess: Preprocess | None = None,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        root: str | Path | None = None,
        need_captions: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(preprocess, **options)
        self.table, self.root, self._need_captions = Path(table), root, need_captions
        header, lines, separator = _read_header(self.table)
        image = _column(header, image_column, IMAGE_COLUMNS, "image")
        rows = _read_rows(
            lines, separator, len(header), lambda cells: self._may_be_image(cells[image].strip())
        )
        label = _place(header, label_column, LABEL_COLUMNS) if self.class_names or label_column else None
        if label is None and label_column is not None:
            label = _column(header, label_column, LABEL_COLUMNS, "label")
        caption = _place(header, caption_column, CAPTION_COLUMNS)
        no_other = label is None or not self.templates or caption_column is not None
        if caption is None and need_captions and no_other:
            caption = _column(header, caption_column, CAPTION_COLUMNS, "caption")
        self._list(
            self._entries(rows, header, image, caption, label),
            f"rows with an image and a caption in the {len(rows)} of {self.table}",
        )

    def _entries(
        self, rows: list[_Row], header: list[str], image: int, caption: int | None, label: int | None
    ) -> Iterator[PairEntry]:
        places = class_places(self.class_names)
        for number, row in enumerate(rows, 1):
            if isinstance(row.cells, str):
                self._leave_out(f"{number}:", f"line {row.line} {row.cells}", within=self.table)
                continue
            path = row.cells[image].strip()
            if path.startswith(("http://", "https://")):
                raise ValueError(
                    f"expected paths of image files in column {header[image]!r} of {self.table}; received the address "
                    f"{path}; download the images first (img2dataset writes shards, which ShardPairs reads)"
                )
            name = f"{number}:{path}"
            known = None if label is None else _class(row.cells[label].strip(), places, len(self.class_names))
            text = self._caption("" if caption is None else row.cells[caption].strip(), known, name)
            wanted = {"image": path, "caption": text or not self._need_captions}
            if missing := [what for what, found in wanted.items() if not found]:
                self._leave_out(name, f"line {row.line} has no {' and no '.join(missing)}", within=self.table)
                continue
            yield PairEntry(name, text, known, self.table.parent / path)

    def _may_be_image(self, path: str) -> bool:
        return Path(path).suffix.lower() in SUFFIXES or (
            bool(path) and os.path.exists(self.table.parent / path)
        )


CueSplit = Literal["train", "validation", "test"]

_SPLITS: dict[str, CueSplit] = {"0": "train", "1": "validation", "2": "test"}
"""As the tables number them."""

CUE_OPTIONS = {
    "waterbirds": (("landbird", "waterbird"), ("land background", "water background")),
    "celeba": (("person without blond hair", "person with blond hair"), ("woman", "man")),
}
"""Classes and cues, by name, in the order of the tables' numbers."""


class CuePairs(FilePairs):
    """Photographs with a class, and a cue that mostly goes with one class and that a model should not answer by.

        CuePairs.waterbirds(folder, "test", model.preprocess)     birds, and what is behind them
        CuePairs.celeba(folder, "test", model.preprocess)         blond hair, and whether the person is a man

    `evaluation.metrics.group_accuracy(predictions, pairs.labels, pairs.cues)` has the accuracy of each class with each cue. Images that
    cannot be read are left out of `batches`, whose `indices` say which ones came.

    Args:
        folder: that the pictures lie in, links resolved.
        rows: of each photograph, its path from there on, class and cue, both counted from 0.
        cue_names: values of the cue.
        preprocess, options: as `Pairs`, `class_names` among them; by default a caption is the class's name.

    Attributes:
        cues: of each photograph, the place of its cue in `cue_names`.

    Raises:
        ValueError: no rows, or a class or cue without a name.
    """

    labels: Int[Tensor, " pair"]

    def __init__(
        self,
        folder: str | Path,
        rows: Sequence[tuple[str, int, int]],
        cue_names: Sequence[str],
        preprocess: Preprocess | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(preprocess, **{"templates": ("a photo of a {}",), **options})
        self.folder = self.root = Path(folder)
        self.cue_names = tuple(cue_names)
        places = {"class": [label for _, label, _ in rows], "cue": [cue for _, _, cue in rows]}
        for (what, own), names in zip(places.items(), (self.class_names, self.cue_names), strict=True):
            for place, (path, _, _) in zip(own, rows, strict=True):
                if not 0 <= place < len(names):
                    raise ValueError(
                        f"expected the {what} of each photograph as a place in the {len(names)} {what}_names, counted from 0; "
                        f"received {place} of {path}; name every {what} ({', '.join(names) or 'none is named'})"
                    )
        self.cues = torch.tensor(places["cue"], dtype=torch.long)
        entries = (
            PairEntry(path, self._caption("", label, path), label, self.folder / path)
            for path, label, _ in rows
        )
        self._list(entries, f"photographs listed for {folder}")

    @classmethod
    def waterbirds(
        cls,
        folder: str | Path,
        split: CueSplit,
        preprocess: Preprocess | None = None,
        **options: Unpack[PairOptions],
    ) -> CuePairs:
        """Waterbirds (Sagawa et al., ICLR 2020): `metadata.csv` with columns `img_filename`, `y`, `split` and `place`, beside the pictures.

        Args:
            folder: `waterbird_complete95_forest2water2`, or one of that form.
            split: the table's 0, 1 and 2.
            preprocess, options: as `Pairs`.

        Raises:
            FileNotFoundError: there is no `metadata.csv`.
            ValueError: it is empty, lacks a column, has another number than 0 or 1 in `y` or `place`, or no row of the split; an
                unknown split, or not two class names.
        """
        check_choice("split", split, CueSplit)
        table = Path(folder) / "metadata.csv"
        rows = _columns(table, ("img_filename", "y", "split", "place"))
        known = [
            (path, _number(y, table, "y", ("0", "1")), _number(place, table, "place", ("0", "1")))
            for path, y, part, place in rows
            if _of_split(part, split, table)
        ]
        return cls._of("waterbirds", Path(folder), known, split, preprocess, options)

    @classmethod
    def celeba(
        cls,
        folder: str | Path,
        split: CueSplit,
        preprocess: Preprocess | None = None,
        *,
        label: str = "Blond_Hair",
        cue: str = "Male",
        cue_names: Sequence[str] = (),
        **options: Unpack[PairOptions],
    ) -> CuePairs:
        """CelebA (Liu et al., ICCV 2015): `list_attr_celeba` and `list_eval_partition`, `.txt` or Kaggle's `.csv`, and `img_align_celeba`.

        Args:
            folder: that holds them.
            split: the partition's 0, 1 and 2.
            preprocess, options: as `Pairs`; other attributes than the usual ones need `class_names=`, the one without it first.
            label, cue: attributes.
            cue_names: of another cue, the one without it first.

        Raises:
            FileNotFoundError: a list or the folder of pictures is not there.
            ValueError: a list is empty, there is no such attribute, a value is neither 1 nor -1, or no row of the split; an unknown
                split; attributes without names, or not two names of each.
        """
        check_choice("split", split, CueSplit)
        place = Path(folder)
        attributes, partition = (_list(place, name) for name in ("list_attr_celeba", "list_eval_partition"))
        name = "img_align_celeba"
        pictures = next((found for found in (place / name / name, place / name) if found.is_dir()), None)
        if pictures is None:
            raise FileNotFoundError(f"expected the pictures of CelebA in {place}: {name}; it is not there")
        names = {"class_names": options.get("class_names"), "cue_names": cue_names}
        missing = [name for name, given in names.items() if not given]
        if missing and (label, cue) != ("Blond_Hair", "Male"):
            raise ValueError(
                f"expected class_names and cue_names of {label} and {cue}, each the one without it first; received no "
                f"{' and no '.join(missing)}"
            )
        parts = {name: part for name, part in _columns(partition, ("image_id", "partition"))}
        rows = [
            (path, _number(y, attributes, label, ("-1", "1")), _number(value, attributes, cue, ("-1", "1")))
            for path, y, value in _columns(attributes, ("image_id", label, cue))
            if _of_split(parts.get(path, ""), split, partition, path)
        ]
        return cls._of("celeba", pictures, rows, split, preprocess, options, cue_names)

    @classmethod
    def _of(
        cls,
        kind: str,
        folder: Path,
        rows: list[tuple[str, int, int]],
        split: str,
        preprocess: Preprocess | None,
        options: PairOptions,
        cue_names: Sequence[str] = (),
    ) -> CuePairs:
        if not rows:
            raise ValueError(f"expected photographs of the {split} split in {folder}; the table has none")
        classes, cues = CUE_OPTIONS[kind]
        names = {"class_names": options.get("class_names") or classes, "cue_names": cue_names or cues}
        for name, given in names.items():
            if len(given) != 2:
                raise ValueError(f"expected two {name}; received {len(given)}: {', '.join(given)}")
        return cls(
            folder, rows, names["cue_names"], preprocess, **{**options, "class_names": names["class_names"]}
        )


def _list(folder: Path, name: str) -> Path:
    """A list of CelebA, in the one form or the other."""
    for path in (folder / f"{name}.txt", folder / f"{name}.csv"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"expected {name}.txt or {name}.csv in {folder}; it is not there")


def _columns(table: Path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Some columns of a table with a header; of CelebA's text, whose first line is a count and whose pictures have no header."""
    lines = [line for line in _text(table).splitlines() if line.strip()]
    if len(lines) == 1 and lines[0].strip().isdigit():  # a count and no more
        lines = []
    if not lines:
        raise ValueError(f"expected rows in {table}; it is an empty table; fetch it again")
    if table.suffix == ".csv":
        marks: dict[str, Any] = {"delimiter": max(",;\t", key=lines[0].count), "skipinitialspace": True}
        header, *rows = ([cell.strip() for cell in cells] for cells in csv.reader(lines, **marks))
    elif (counted := len(lines[0].split()) == 1) or set(names) & set(lines[0].split()):
        header, *rows = (line.split() for line in lines[counted:])
        header = ["image_id", *(name for name in header if name != "image_id")]
        if lines[0].strip().isdecimal() and int(lines[0]) != len(rows):
            raise ValueError(
                f"expected {lines[0].strip()} rows in {table}, as its first line says; it has {len(rows)}; fetch it again"
            )
    else:  # the partition's: no header
        header, rows = list(names), [line.split() for line in lines]
    if missing := [name for name in names if name not in header]:
        raise ValueError(
            f"expected columns {', '.join(names)} in {table}; it has no {', '.join(missing)}, but {some(header, 8)}"
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(f"expected {len(header)} columns in row {number} of {table}; it has {len(row)}")
    at = [header.index(name) for name in names]
    return [tuple(row[place] for place in at) for row in rows]


def _number(value: str, table: Path, column: str, known: tuple[str, str]) -> int:
    if value not in known:
        raise ValueError(f"expected {' or '.join(known)} in column {column} of {table}; received {value!r}")
    return known.index(value)


def _of_split(value: str, split: CueSplit, table: Path, path: str = "") -> bool:
    if value not in _SPLITS:
        of = f" of {path}" if path else ""
        raise ValueError(f"expected a split 0, 1 or 2{of} in {table}; received {value or 'none'}")
    return _SPLITS[value] == split


@dataclass(frozen=True)
class _Row:
    """One row: the line that it begins in, and its cells, or why there are none."""

    line: int
    cells: list[str] | str


def _read_header(table: Path) -> tuple[list[str], list[str], str]:
    """The columns' names, all lines, and the separator."""
    # not splitlines(): captions hold other marks that it splits at
    lines = re.split(r"\r\n|\n|\r", _text(table))
    separator = max("\t,;", key=lines[0].count)
    header = _cells(lines[0], separator, None)
    if isinstance(header, str):
        header = lines[0].split(separator)
    return [name.strip() for name in header], lines, separator


def _read_rows(
    lines: list[str], separator: str, width: int, has_image: Callable[[list[str]], bool]
) -> list[_Row]:
    rows, at = [], 1
    while at < len(lines):
        over = _over_lines(lines, at, separator, width, has_image)
        if over is not None:
            rows.append(_Row(at + 1, over[0]))
        elif lines[at].strip():
            rows.append(_Row(at + 1, _cells(lines[at], separator, width)))
        at += 1 if over is None else over[1]
    return rows


def _cells(line: str, separator: str, width: int | None) -> list[str] | str:
    """A line's cells, or what is wrong with their number: quotes are marks if that makes it right, else letters."""
    try:
        marked = next(csv.reader([line], delimiter=separator, strict=True))
    except (csv.Error, StopIteration):
        marked = line.split(separator)
    plain = line.split(separator)
    for cells in (marked, plain):
        if width is None or len(cells) == width:
            return cells
    if len(marked) < (width or 0):
        return f"has too few columns, {len(marked)} of {width}"
    shown = {"\t": "tab"}.get(separator, f"{separator!r}")
    return f"has {len(marked)} columns, the header {width}; put texts that hold a {shown} in quotes"


def _over_lines(
    lines: list[str], at: int, separator: str, width: int, has_image: Callable[[list[str]], bool]
) -> tuple[list[str], int] | None:
    """The cells of a row that opens a quote in one line and closes it in another, and how many lines it takes.

    None if there is no such row: no quote is left open, or it is closed nowhere, or gives another number of columns, or
    joins lines of which two are rows on their own: then the quote is a letter of a caption, and swallows no row.
    """
    if '"' not in lines[at]:
        return None
    reader = csv.reader((f"{lines[n]}\n" for n in range(at, len(lines))), delimiter=separator, strict=True)
    try:
        cells = next(reader)
    except (csv.Error, StopIteration):
        return None
    many = reader.line_num
    if many == 1 or len(cells) != width:
        return None
    alone = (_cells(line, separator, width) for line in lines[at : at + many])
    whole = (not isinstance(row, str) and has_image(row) for row in alone)
    return None if any(whole) and any(whole) else (cells, many)


def _text(table: Path) -> str:
    if not table.exists():
        raise FileNotFoundError(f"expected a table of images and captions; {table} is no file")
    try:
        with open_regular(table) as file:
            content = file.read()
    except OSError as error:
        raise FileNotFoundError(
            f"expected a table of images and captions; {table} {reason(error)}"
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        what = "it is UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"line {line}: {error.reason}"
        raise ValueError(
            f"expected a table in UTF-8; {table} cannot be read: {what}; save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"expected a table in UTF-8; {table} holds a NUL byte in line {line}: it is UTF-16 or damaged; save it as UTF-8"
        )
    return text


def _class(value: str, places: dict[str, list[int]], classes: int) -> int | None:
    found = find_class(value, places)
    if found is None and value.isdecimal() and int(value) < classes:
        return int(value)
    return found


def _place(header: Sequence[str], asked: str | None, known: Sequence[str]) -> int | None:
    return next(
        (header.index(name) for name in (known if asked is None else [asked]) if name in header), None
    )


def _column(header: Sequence[str], asked: str | None, known: Sequence[str], what: str) -> int:
    if (place := _place(header, asked, known)) is not None:
        return place
    wanted = f"{known}" if asked is None else f"{asked!r}"
    raise ValueError(
        f"expected a column of {what}s named {wanted}; the table has {list(header)}; pass {what}_column, or write a "
        "first line with the columns' names"
    )
