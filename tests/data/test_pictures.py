"""Picture files of every kind that is read, and those that are not."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from decompclip.data.files import FORMATS, MAX_PIXELS, PictureError, is_picture, open_image, open_rgb
from decompclip.data.images import FolderSource
from decompclip.data.pixels import to_pixels

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def paint(path: Path, colour: tuple[int, ...] = RED, size: tuple[int, int] = (32, 24)) -> Path:
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)
    return path


def png(width: int, height: int, *, rows: int | None = None) -> bytes:
    """A PNG of one bit a pixel, all white, as small as it gets; `rows` of them are really there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    line = b"\0" + b"\xff" * -(-width // 8)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(line * (height if rows is None else rows)))
        + chunk(b"IEND", b"")
    )


def pixel(path: Path, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    value = open_rgb(path).getpixel(place)
    assert isinstance(value, tuple)
    return value


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    assert pixel(paint(tmp_path / "clear.png", (255, 0, 0, 0))) == WHITE
    assert pixel(paint(tmp_path / "solid.png", (255, 0, 0, 255))) == RED
    Image.new("L", (4, 4), 100).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == (100, 100, 100)
    Image.new("1", (4, 4), 1).save(tmp_path / "line.png")
    assert pixel(tmp_path / "line.png") == WHITE
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert pixel(tmp_path / "print.jpg") == WHITE
    palette = Image.new("RGB", (4, 4), GREEN).quantize(4)
    palette.save(tmp_path / "palette.png")
    assert pixel(tmp_path / "palette.png") == GREEN
    palette.save(tmp_path / "clear.gif", transparency=palette.getpixel((0, 0)))
    assert pixel(tmp_path / "clear.gif") == WHITE


def test_sixteen_bits_of_grey_keep_their_steps(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert [pixel(tmp_path / "deep.png", (x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floating-point numbers of unknown range"):
        open_rgb(tmp_path / "float.tif")


def test_a_turned_photo_stands_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 20), GREEN)
    photo.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    photo.save(tmp_path / "turned.png", exif=exif)
    assert open_rgb(tmp_path / "turned.png").size == (20, 40)
    assert pixel(tmp_path / "turned.png", (10, 5)) == RED
    assert pixel(tmp_path / "turned.png", (10, 35)) == GREEN


def test_pixels_of_integers_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "far.tif")
    with pytest.raises(PictureError, match=r"integers of unknown range, 0\.\.70000"):
        open_rgb(tmp_path / "far.tif")


@pytest.mark.parametrize("how", range(1, 9))
def test_every_orientation_stands_as_it_was_taken(tmp_path: Path, how: int) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    held = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[how]
    exif = Image.Exif()
    exif[0x0112] = how
    for name in ("a.png", "a.tif", "a.webp"):
        options: Any = {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(np.ascontiguousarray(held)).save(tmp_path / name, exif=exif, **options)
        assert np.array_equal(np.asarray(open_rgb(tmp_path / name)), upright), name


def test_a_broken_note_on_the_orientation_costs_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), GREEN).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert pixel(tmp_path / "a.png") == GREEN


def test_transparency_in_part_lets_white_through(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", transparency=bytes([128, 255]))
    assert pixel(tmp_path / "palette.png") == (255, 127, 127)
    assert pixel(tmp_path / "palette.png", (1, 0)) == GREEN
    Image.new("RGB", (4, 4), RED).save(tmp_path / "key.png", transparency=RED)
    assert pixel(tmp_path / "key.png") == WHITE


def test_inks_become_light(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.tif"):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / name)
        assert np.abs(np.array(pixel(tmp_path / name)) - RED).max() <= 2, name


KINDS = {
    "PNG": ("PNG", {}),
    "JPEG": ("JPEG", {}),
    "WEBP": ("WEBP", {"lossless": True}),
    "AVIF": ("AVIF", {"quality": 100}),
    "GIF": ("GIF", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), GREEN)]}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), GREEN)]}),
    "PPM": ("PPM", {}),
    "MPO": ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), GREEN)]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "photo.jfif", "photo.JPG", "photo.png", "photo.dat"])
def test_kinds_are_told_by_content_whatever_the_name(tmp_path: Path, kind: str, name: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    written, options = KINDS[kind]
    with (tmp_path / name).open("w+b") as file:
        Image.new("RGB", (8, 8), RED).save(file, written, **options)
    assert is_picture(tmp_path / name)
    assert np.abs(np.array(pixel(tmp_path / name)) - RED).max() <= 2
    (batch,) = FolderSource(tmp_path, to_pixels(8)).batches()
    assert batch.paths == (name,)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "SGI", "JPEG2000", "DDS", "PSD", "FLI"])
@pytest.mark.parametrize("suffix", [".eps", ".png", ""])
def test_other_kinds_of_pillows_are_listed_and_never_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, suffix: str
) -> None:
    Image.init()
    held = io.BytesIO()
    if kind == "PSD":
        held.write(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(800))
    elif kind == "FLI":
        held.write(struct.pack("<IHHHHHHHI", 128, 0xAF12, 1, 8, 8, 8, 3, 0, 1) + bytes(200))
    else:
        Image.new("RGB", (32, 32), RED).save(held, kind)
    paint(tmp_path / "good.png")
    (tmp_path / f"other{suffix}").write_bytes(held.getvalue())
    for name in set(Image.OPEN) - set(FORMATS):

        def reached(*_: object, name: str = name) -> None:
            raise AssertionError(f"{name} was asked")

        monkeypatch.setitem(Image.OPEN, name, (reached, reached))
    source = FolderSource(tmp_path, to_pixels(8))
    assert [path for batch in source.batches() for path in batch.paths] == ["good.png"]
    assert [skip.path for skip in source.skipped] == [f"other{suffix}"]
    assert "is no picture of a kind that is read" in source.skipped[0].reason


@pytest.mark.parametrize(
    ("width", "height"), [(MAX_PIXELS // 1024 + 1, 1024), (60_000, 60_000), (1, MAX_PIXELS + 1)]
)
def test_a_few_bytes_that_claim_millions_of_pixels_are_refused(
    tmp_path: Path, width: int, height: int
) -> None:
    (tmp_path / "bomb.png").write_bytes(png(width, height, rows=1))
    with pytest.raises(PictureError, match="has (too many pixels|.* pixels; expected at most 134217728)"):
        open_rgb(tmp_path / "bomb.png")
    source = FolderSource(tmp_path, to_pixels(8))
    with pytest.raises(ValueError, match="none of its 1 images could be read"):
        list(source.batches())
    assert "pixels" in source.skipped[0].reason


def test_the_size_is_checked_whatever_pillows_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, rows=1))
    with pytest.raises(PictureError, match="has 60000 x 60000 pixels; expected at most"):
        open_rgb(tmp_path / "bomb.png")


def test_nothing_but_a_regular_file_below_the_root_is_opened(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    paint(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    paint(inside / "own.png")
    with open_image(inside / "link.png"):
        pass
    with open_image(inside / "own.png", root=inside):
        pass
    for path in (inside / "link.png", inside / ".." / "secret.png"):
        with pytest.raises(OSError, match="lies outside"):
            open_rgb(path, root=inside)
    os.mkfifo(inside / "pipe.png")
    with pytest.raises(OSError, match="is a FIFO, no file"):
        open_rgb(inside / "pipe.png")
    with pytest.raises(OSError, match="is a device, no file"):
        open_rgb("/dev/zero")
    with pytest.raises(OSError, match="is a folder, no file"):
        open_rgb(inside)
