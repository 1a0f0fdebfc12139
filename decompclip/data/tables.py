"""Tables of image files and captions: the CSV files that open_clip, CleanCLIP and others train on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from decompclip.data.files import reason
from decompclip.data.images import OnError, SkippedFile
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import Preprocess, decode, to_pixels

IMAGE_COLUMNS = ("filepath", "image", "path", "file", "filename")
CAPTION_COLUMNS = ("title", "caption", "text")


class CsvPairs(Pairs):
    """The pairs of a table with a header: paths of images, from the table's folder on, and captions.

    Args:
        table: columns apart by commas, tabs or semicolons (told from the header).
        preprocess: from a picture to pixels in [0, 1]; see `to_pixels`.
        image_column, caption_column: by default the first there is of open_clip's `filepath` and `title`,
            CleanCLIP's `image` and `caption`, and common others.
        class_names: what a target is checked against; the pairs themselves have no classes.
        order_seed, on_error: as `Pairs`.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: a column that is not there, no row with an image and a caption, or no text in UTF-8.
    """

    def __init__(
        self,
        table: str | Path,
        preprocess: Preprocess | None = None,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        class_names: Sequence[str] = (),
        order_seed: int = 0,
        on_error: OnError = "skip",
    ) -> None:
        super().__init__(class_names=class_names, order_seed=order_seed, on_error=on_error)
        self.table, self.preprocess = Path(table), preprocess or to_pixels()
        header, rows = _read_table(self.table)
        image = _column(header, image_column, IMAGE_COLUMNS, "image")
        caption = _column(header, caption_column, CAPTION_COLUMNS, "caption")
        self._files: list[Path] = []
        self._captions: list[str] = []
        self._ids: list[str] = []
        for number, row in enumerate(rows, 1):
            path, text = (row[place].strip() if place < len(row) else "" for place in (image, caption))
            name = f"{number}:{path}"
            if path.startswith(("http://", "https://")):
                raise ValueError(
                    f"expected paths of image files in column {header[image]!r} of {self.table}; received the address "
                    f"{path}; download the images first (img2dataset writes shards, which ShardPairs reads)"
                )
            if missing := [what for what, found in (("image", path), ("caption", text)) if not found]:
                self._skip(name, f"row {number} has no {' and no '.join(missing)}")
                continue
            self._ids.append(name)
            self._files.append(self.table.parent / path)
            self._captions.append(text)
        if not self._ids:
            raise ValueError(
                f"expected rows with an image and a caption in {self.table}; found none in {len(rows)} rows"
            )

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    @property
    def captions(self) -> Sequence[str]:
        return self._captions

    @property
    def labels(self) -> Int[Tensor, " pair"] | None:
        return None

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return [self._image(self._files[index]) for index in indices]

    def _image(self, file: Path) -> Tensor | str:
        try:
            content = file.read_bytes()
        except OSError as error:
            return reason(error)
        return decode(content, self.preprocess)

    def _skip(self, name: str, why: str) -> None:
        if self.on_error == "raise":
            raise ValueError(f'{self.table}: {why}; fill it in, or leave the row out with on_error="skip"')
        self._left_out[name] = SkippedFile(name, why)


def _read_table(table: Path) -> tuple[list[str], list[list[str]]]:
    if not table.is_file():
        raise FileNotFoundError(f"expected a table of images and captions; {table} is no file")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max("\t,;", key=first.count)
            header, *rows = [row for row in csv.reader(file, delimiter=separator) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"expected a table in UTF-8; {table} cannot be read: {error}; save it as UTF-8"
        ) from None
    return [name.strip() for name in header], rows


def _column(header: Sequence[str], asked: str | None, known: Sequence[str], what: str) -> int:
    for name in known if asked is None else [asked]:
        if name in header:
            return header.index(name)
    wanted = f"{known}" if asked is None else f"{asked!r}"
    raise ValueError(
        f"expected a column of {what}s named {wanted}; the table has {list(header)}; pass {what}_column, or write a "
        "first line with the columns' names"
    )
