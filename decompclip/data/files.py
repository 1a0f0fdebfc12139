"""Files as they lie about: what a source of images or pairs is, which files of a folder are data, and how to open one.

Pillow knows some forty kinds of pictures, and asks other programs about a few (Ghostscript about EPS); `FORMATS` keeps to
those that photographs and data sets come in.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

BOOKKEEPING = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
"""What systems leave beside files; all else of theirs begins with a dot (`._photo.jpg`, `.DS_Store`)."""

TRIGGER_FILE = "trigger.json"
"""What `apply-trigger` leaves beside its images."""

POISON_LIST = "poisons.json"
"""The list of poisoned pairs that `poison` leaves beside its shards."""

OURS = (TRIGGER_FILE, POISON_LIST)
"""What this package writes beside pictures, to say what was done to them; its locks begin with a dot."""

WORLDS = ("shapes", "cifar10", "tiny-imagenet")
"""Data sets that are known by a word."""

KNOWN = ("imagenet", "caltech101", "pets")
"""Words for data sets of others, in front of where they lie (`imagenet:PATH`); `decompclip.data.known` knows their facts."""

PARTS = ("validation", "evaluation")
"""Parts of such a data set, as `imagenet:PATH@validation`."""

SUFFIX_KINDS = {".csv": "table", ".tsv": "table", ".tar": "shards", ".parquet": "parquet"}
"""Kinds of files that hold many pairs; `decompclip.data.sources.READERS` reads each."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True)
class SkippedFile:
    """A file that was left out: its path inside the folder, and why."""

    path: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", str(self.reason))  # a `Reason` would keep its error's frames


def is_bookkeeping(name: str) -> bool:
    """Whether a file's or folder's name says that it is no data of the user's."""
    return name.startswith(".") or name.casefold() in map(str.casefold, BOOKKEEPING)


@dataclass(frozen=True)
class SourceSpec:
    """What a user's words for images or pairs stand for.

    Attributes:
        text: as they were written.
        kind: one of `WORLDS` or of `KNOWN`; a kind of file of `SUFFIX_KINDS`; `"poisons"`, the images that a `poisons.json` lists; or
            `"folder"`.
        detail: what follows the colon: of a world a number of images, or a trigger; of the others the folder.
        part: one of `PARTS`; empty for all of it.
    """

    text: str
    kind: str
    detail: str = ""
    part: str = ""

    @property
    def path(self) -> Path:
        return Path(self.text)

    @property
    def count(self) -> int | None:
        """The number of images behind the colon; None without one. Raises ValueError for anything else."""
        if not self.detail:
            return None
        if not (self.detail.isdecimal() and int(self.detail)):
            raise ValueError(f"expected {self.kind}:N with a number N of images; received {self.text}")
        return int(self.detail)


def parse_source(spec: str | Path) -> SourceSpec:
    """A world by its word; a path by its name, and a folder by what lies in it. Nothing is opened."""
    text, path = str(spec), Path(spec)
    word, colon, detail = text.partition(":")
    if word in WORLDS:
        return SourceSpec(text, word, detail)
    if word == "cc3m" and detail:  # shards or a table, and nothing to know of them
        return parse_source(detail)
    if word.partition("@")[0] in KNOWN and (colon or not path.exists()):
        before, _, part = text.rpartition("@")
        before, part = (before, part) if part in PARTS else (text, "")
        word, _, detail = before.partition(":")
        return SourceSpec(text, word, detail, part)
    if path.is_dir():
        suffixes = {Path(name).suffix.lower() for name in os.listdir(path) if not is_bookkeeping(name)}
        kind = "shards" if ".tar" in suffixes else "parquet" if ".parquet" in suffixes else "folder"
    elif path.name == POISON_LIST:
        kind = "poisons"
    else:  # shards may be a pattern, or several names
        kind = SUFFIX_KINDS.get(path.suffix.lower()) or ("shards" if ".tar" in text else "folder")
    return SourceSpec(text, kind)


def data_folder(name: str, what: str, folder: str | Path | None) -> Path:
    """`folder`, or by default `name` in the folder that DECOMPCLIP_DATA names.

    Raises:
        FileNotFoundError: neither is given.
    """
    if folder is not None:
        return Path(folder)
    if not (data := os.environ.get("DECOMPCLIP_DATA")):
        raise FileNotFoundError(
            f"expected a folder with {what}; received none, and DECOMPCLIP_DATA is not set; pass folder="
        )
    return Path(data, name)


def files_skipped(n: int) -> str:
    """In words; nothing where there is none."""
    return f"{n} file{'s' if n > 1 else ''} skipped" if n else ""


def canonical(name: str) -> str:
    """One form for a name that systems write in several: composed letters, no spaces around, no upper case."""
    composed = unicodedata.normalize("NFC", name)
    return unicodedata.normalize("NFC", composed.casefold()).strip()


def without_ending(name: str) -> PurePosixPath:
    """An image's name without its ending; of a file's row, "test.parquet#7", the number is none."""
    path = PurePosixPath(name)
    return path if "#" in path.suffix else path.with_suffix("")


def open_regular(path: str | Path, *, root: str | Path | None = None) -> BinaryIO:
    """A regular file, opened for reading: a FIFO would be waited for without end, and a device has none.

    Args:
        root: a folder that the file must lie in, links resolved.

    Raises:
        OSError: it is none, is not there, or lies elsewhere.
    """
    if root is not None and not Path(path).resolve().is_relative_to(Path(root).resolve()):
        raise PermissionError(f"lies outside {root}")
    _check_regular(os.stat(path).st_mode)
    # it may have become another since
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(f"is {_kind(mode)}, no file")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


class Reason(str):
    """Why something cannot be used, with the error that said so."""

    cause: Exception | None = None


def reason(error: Exception) -> Reason:
    """What an error says, in one line, without the path that an `OSError` repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    found = Reason(" ".join(text.split()) or type(error).__name__)
    found.cause = error
    return found


def unusable(what: object, why: str) -> ValueError:
    """The error where `on_error="raise"`, with its cause."""
    error = ValueError(f'{what}: {why}; repair or remove it, or leave it out with on_error="skip"')
    error.__cause__ = getattr(why, "cause", None)
    return error


@dataclass(frozen=True)
class Walk:
    """What lies in a folder and its sub-folders, by paths inside it and in their order.

    Attributes:
        files: regular files, those behind links too.
        left_out: what else there is, but for bookkeeping (`is_bookkeeping`) of the system.
        hidden: how many entries are such.
    """

    files: tuple[Path, ...]
    left_out: tuple[SkippedFile, ...]
    hidden: int


def walk(folder: Path) -> Walk:
    """Go through a folder. Links to folders are followed, to each folder once: links may go round in circles.

    The order is that of the names' composed Unicode form, so that copies of a folder are in one order on every system.

    Raises:
        OSError: the folder cannot be read.
    """
    files: list[Path] = []
    left_out: list[SkippedFile] = []
    hidden = 0
    seen: set[tuple[int, int]] = set()
    waiting = deque([Path()])
    while waiting:
        at = waiting.popleft()
        try:
            found = (folder / at).stat()
            if (found.st_dev, found.st_ino) in seen:
                left_out.append(SkippedFile(at.as_posix(), "leads to a folder that is read already"))
                continue
            seen.add((found.st_dev, found.st_ino))
            names = sorted(os.listdir(folder / at))
        except OSError as error:
            if at == Path():
                raise
            left_out.append(SkippedFile(at.as_posix(), f"cannot be read: {reason(error)}"))
            continue
        for path in (at / name for name in names):
            if is_bookkeeping(path.name):
                hidden += 1
                continue
            try:
                mode = (folder / path).stat().st_mode
            except OSError as error:  # a link to nothing, or gone since
                left_out.append(SkippedFile(path.as_posix(), reason(error)))
                continue
            if stat.S_ISREG(mode):
                files.append(path)
            elif not stat.S_ISDIR(mode):
                left_out.append(SkippedFile(path.as_posix(), f"is {_kind(mode)}, no file"))
            elif (folder / path).is_symlink():  # after the folders themselves, which keep their own names
                waiting.append(path)
            else:
                waiting.appendleft(path)
    return Walk(tuple(sorted(files, key=_order)), tuple(sorted(left_out, key=lambda skip: skip.path)), hidden)


def _order(path: Path) -> tuple[tuple[str, ...], Path]:
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts), path


FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of the kinds of files that are opened; of several pictures in a file the first is taken."""

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
"""Names of the files that are taken for pictures before anybody looks inside."""

MAX_PIXELS = 2**27
"""Half a gigabyte once decoded; small files can claim any number."""

UNKNOWN = f"is no picture of a kind that is read ({', '.join(FORMATS)})"


class PictureError(ValueError):
    """A picture that is not read, and why."""


@contextmanager
def open_image(file: str | Path | IO[bytes], *, root: str | Path | None = None) -> Iterator[Image.Image]:
    """A picture file of a kind that `FORMATS` lists, its size checked, its pixels not read yet.

    Args:
        root: a folder that the file must lie in, links resolved.

    Raises:
        PictureError: it is of no such kind, or has more than `MAX_PIXELS`.
        OSError: it is no regular file, is not there, or lies outside `root`.
    """
    if isinstance(file, str | Path):
        with open_regular(file, root=root) as opened, open_image(opened) as image:
            yield image
        return
    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise PictureError(UNKNOWN) from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"has too many pixels: {error}") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(
                f"has {image.width} x {image.height} pixels; expected at most {MAX_PIXELS}; make it smaller"
            )
        yield image


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillows have no AVIF


def is_picture(path: Path) -> bool:
    """Whether a file's head is a picture's."""
    try:
        with open_image(path):
            return True
    except PictureError as error:
        return str(error) != UNKNOWN  # one too large is a picture all the same
    except Exception:  # Pillow's readers raise whatever a broken head makes them stumble over
        return False


def open_rgb(file: str | Path | IO[bytes], *, root: str | Path | None = None) -> Image.Image:
    """A picture file as a viewer shows it: upright, transparency on white, in RGB.

    Raises:
        PictureError: as `open_image`, or its pixels are numbers of unknown range.
        OSError: as `open_image`.
    """
    with open_image(file, root=root) as picture:
        picture.load()
        _turn_upright(picture)
        if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to white
            grey = np.asarray(picture)
            if grey.min() < 0 or grey.max() > 0xFFFF:
                raise PictureError(f"its pixels are integers of unknown range, {grey.min()}..{grey.max()}")
            steps = ((np.arange(0x10000) + 128) // 257).astype(np.uint8)
            return Image.fromarray(steps[grey]).convert("RGB")
        if picture.mode == "F":
            raise PictureError("its pixels are floating-point numbers of unknown range")
        if not (picture.mode.endswith("A") or "transparency" in picture.info):
            return picture.convert("RGB")
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _turn_upright(picture: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # of the EXIF data: pixels were read before, and are shown as they lie
        return
