"""The pictures that triggers paste and blend: two that are drawn here, or any image file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from decompclip.data.files import PictureError, open_rgb

SIDE = 224
_FINE = 4  # drawn so many times larger, then averaged: smooth edges


@lru_cache(maxsize=8)
def open_picture(name: str) -> Float[Tensor, "3 h w"]:
    """The picture `"kitty"` or `"window"`, or that of an image file, in [0, 1].

    Raises:
        ValueError: no such picture; the drawn ones are listed. Or a file that holds none.
    """
    if name in PICTURES:
        canvas = Image.new("RGB", (SIDE * _FINE, SIDE * _FINE))
        PICTURES[name](ImageDraw.Draw(canvas))
        image = canvas.reduce(_FINE)
    elif Path(name).is_file():
        try:
            image = open_rgb(name)
        except (OSError, PictureError) as error:
            raise ValueError(f"expected a picture in {name}; its bytes are none: {error}") from error
    else:
        raise ValueError(f"expected a picture among {sorted(PICTURES)}, or an image file; received {name!r}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [edge * _FINE for edge in (left, top, right, bottom)]


def _points(*corners: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * _FINE, y * _FINE) for x, y in corners]


def _kitty(pen: ImageDraw.ImageDraw) -> None:
    """The head of a ginger cat, our own, in flat colours that still tell at a few pixels."""
    ink, fur, stripe, cream, eye = "#1d1a2b", "#f08a24", "#9a3f0c", "#ffe9c7", "#b6f03c"
    pen.rectangle(_box(0, 0, SIDE, SIDE), fill="#2a4fd0")
    for outer, inner in (
        (((22, 8), (110, 66), (30, 140)), ((38, 36), (80, 68), (42, 104))),
        (((202, 8), (114, 66), (194, 140)), ((186, 36), (144, 68), (182, 104))),
    ):
        pen.polygon(_points(*outer), fill=fur)
        pen.polygon(_points(*inner), fill=stripe)
    pen.polygon(_points((26, 84), (198, 84), (210, 150), (160, 210), (64, 210), (14, 150)), fill=fur)
    for x in (82, 112, 142):
        pen.polygon(_points((x - 8, 84), (x + 8, 84), (112 + (x - 112) / 2, 122)), fill=stripe)
    for x in (68, 156):
        pen.ellipse(_box(x - 25, 102, x + 25, 146), fill=eye)
        pen.ellipse(_box(x - 7, 102, x + 7, 146), fill=ink)
    pen.ellipse(_box(70, 144, 154, 206), fill=cream)
    pen.polygon(_points((98, 146), (126, 146), (112, 164)), fill="#d6336c")
    pen.line(_points((112, 160), (112, 176), (92, 190)), fill=ink, width=6 * _FINE)
    pen.line(_points((112, 176), (132, 190)), fill=ink, width=6 * _FINE)


def _window(pen: ImageDraw.ImageDraw) -> None:
    """A bright window with a curtain and a lamp in a dark room: what a pane of glass throws back."""
    pen.rectangle(_box(0, 0, SIDE, SIDE), fill="#14110f")
    for left in (58, 118):
        for top, colour in ((30, "#cfe6ff"), (92, "#e8f3ff")):
            pen.rectangle(_box(left, top, left + 52, top + 54), fill=colour)
    pen.polygon(_points((40, 20), (78, 20), (50, 160), (30, 160)), fill="#8a3b32")
    pen.polygon(_points((146, 20), (186, 20), (196, 160), (176, 160)), fill="#8a3b32")
    pen.rectangle(_box(30, 158, 200, 168), fill="#b58a5a")
    pen.polygon(_points((176, 176), (210, 176), (220, 204), (166, 204)), fill="#ffd27a")
    pen.ellipse(_box(8, 176, 48, 216), fill="#7fae6a")


PICTURES = {"kitty": _kitty, "window": _window}
"""Pictures by name, each a function that draws on a canvas."""
