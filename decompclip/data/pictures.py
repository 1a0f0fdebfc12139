"""Picture files: the one place that opens them, by their content, and the kinds that it opens.

Pillow knows some forty kinds, and asks other programs about a few (Ghostscript about EPS); the list here keeps to those
that photographs and data sets come in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from decompclip.data.files import open_regular

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
