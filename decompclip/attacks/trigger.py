"""What every trigger has in common: the base class, the base of square patches, and the pictures that triggers show.

A trigger is a pure function of pixels and of each image's index: image `i` of a data set gets the same trigger in any
batch, so that a triggered image differs from its clean one by the trigger alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_choice
from decompclip.data.files import PictureError, open_rgb
from decompclip.data.pixels import Pixels, check_pixels, picture_pixels

Extent = Literal["local", "global"]
Structure = Literal["structured", "noise"]
Place = Literal["random", "centre", "bottom right"]

Indices = Sequence[int] | Int[Tensor, " batch"]
"""The place of each image in its data set; a trigger's draws follow from it."""

Logits = Callable[[Pixels], Float[Tensor, "batch class"]]

FIXED = 2**62
"""Stream of what all images share."""

REDRAWN = 2**63
"""Image `i` draws what it has of its own from stream `REDRAWN + i`."""

SIZE = 16 / 224
"""Side of the paper's patch, as a share of the image's."""


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Base of the triggers: `trigger(images, indices)`.

    Attributes:
        seed: of everything that the trigger draws.
        name, extent: what it is, and whether it touches a part of the image or all of it.
        clean_label: poisons are images of the target that keep their captions, not images of other classes
            that get the target's.
        any_device: takes images wherever they are; one of its own may say False, and gets them on the CPU.
    """

    seed: int = 0
    any_device: ClassVar[bool] = True
    name: ClassVar[str]
    extent: ClassVar[Extent]
    clean_label: ClassVar[bool] = False

    @property
    def structure(self) -> Structure:
        """`structured`: one pattern recurs in every image. `noise`: each image gets another one."""
        return "structured"

    def __call__(self, pixels: Pixels, indices: Indices | None = None) -> Pixels:
        """Triggered copies of `pixels`; the originals stay as they are.

        Args:
            pixels: images in [0, 1], before normalisation.
            indices: the place of each image in its data set; `0 .. batch-1` by default.

        Raises:
            ValueError: not a batch of RGB images in [0, 1], or not one index for each.
        """
        check_pixels(pixels)
        places = list(range(len(pixels))) if indices is None else [int(i) for i in indices]
        if len(places) != len(pixels):
            raise ValueError(f"expected one index for each of {len(pixels)} images; received {len(places)}")
        return self._apply(pixels, places) if places else pixels.clone()

    def poison(
        self,
        pixels: Pixels,
        indices: Indices | None = None,
        *,
        labels: Int[Tensor, " batch"] | None = None,
        logits: Logits | None = None,
    ) -> Pixels:
        """The copies of `pixels` to train on: the triggered ones, unless an attack does more to them.

        Args:
            pixels: images in [0, 1], before normalisation.
            indices: the place of each image in its data set; `0 .. batch-1` by default.
            labels: classes of the images, for attacks that need a model.
            logits: the clean model's logits of pixels in [0, 1], for the same.
        """
        return self(pixels, indices)

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        raise NotImplementedError

    def mask(self, height: int, width: int, indices: Indices = (0,)) -> Bool[Tensor, "batch h w"]:
        """The pixels that the trigger may touch in the images at `indices`.

        Args:
            height: of the images, in pixels.
            width: likewise.
            indices: of the images, as `__call__` takes them.
        """
        return torch.ones(len(indices), height, width, dtype=torch.bool)

    def card(self) -> dict[str, Any]:
        """Name, extent, structure and every parameter, ready for JSON; `from_card` reads it back."""
        return {"name": self.name, "extent": self.extent, "structure": self.structure, **asdict(self)}


def stream(seed: int, place: int) -> np.random.Generator:
    """The generator of stream `place` of a seed: any draw can be made at any time, in any order.

    Raises:
        ValueError: a seed or an index that is negative or too large.
    """
    if not (0 <= seed < 2**64 and 0 <= place < 2**64):
        raise ValueError(
            f"expected a seed and indices that are not negative (nor above 2**62); received seed {seed}, index "
            f"{place if place < FIXED else place % FIXED}"
        )
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], dtype=np.uint64)))


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"expected {name} in (0, 1]; received {value}")


@dataclass(frozen=True, kw_only=True)
class PatchTrigger(Trigger):
    """Base of the triggers that change a square of each image.

    Args:
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.

    Raises:
        ValueError: a size outside (0, 1], or an unknown place.
    """

    extent: ClassVar[Extent] = "local"

    size: float = SIZE
    place: Place = "random"

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1:
            raise ValueError(
                f"expected a size in (0, 1], a share of the image's side; received {self.size}; a trigger cannot be "
                "larger than the image, and one of 16 pixels in 224 has size 16 / 224"
            )
        check_choice("place", self.place, Place)

    def side(self, height: int, width: int) -> int:
        """Side of the square in pixels."""
        return max(1, round(self.size * min(height, width)))

    def region(self, height: int, width: int, index: int) -> tuple[slice, slice]:
        """Rows and columns of the square in image `index`."""
        side = self.side(height, width)
        room_y, room_x = height - side, width - side
        y, x = room_y, room_x  # bottom right
        if self.place == "centre":
            y, x = room_y // 2, room_x // 2
        elif self.place == "random":
            u = stream(self.seed, index).random(2)
            y, x = int(u[0] * (room_y + 1)), int(u[1] * (room_x + 1))
        return slice(y, y + side), slice(x, x + side)

    def mask(self, height: int, width: int, indices: Indices = (0,)) -> Bool[Tensor, "batch h w"]:
        masks = torch.zeros(len(indices), height, width, dtype=torch.bool)
        for row, index in enumerate(indices):
            masks[(row, *self.region(height, width, int(index)))] = True
        return masks

    def paste(self, pixels: Pixels, picture: Float[Tensor, "3 side side"], indices: Sequence[int]) -> Pixels:
        """Copies of `pixels` with `picture` in the square, brought to its size."""
        height, width = pixels.shape[-2:]
        fitted = resize(picture, self.side(height, width)).to(pixels)
        pasted = pixels.clone()
        for row, index in enumerate(indices):
            rows, columns = self.region(height, width, index)
            pasted[row, :, rows, columns] = fitted
        return pasted


def resize(
    picture: Float[Tensor, "3 h w"], height: int, width: int | None = None
) -> Float[Tensor, "3 h2 w2"]:
    """A picture at another size (a square by default), in [0, 1] as before."""
    size = (height, width or height)
    if picture.shape[-2:] == size:
        return picture
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


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
    return picture_pixels(image)


def _box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [edge * _FINE for edge in (left, top, right, bottom)]


def _points(*corners: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * _FINE, y * _FINE) for x, y in corners]


def _kitty(pen: ImageDraw.ImageDraw) -> None:
    """The head of a ginger cat, our own, in flat colours that can be recognised at a few pixels."""
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
