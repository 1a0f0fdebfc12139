"""Where a square patch lies in an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.trigger import stream

Place = Literal["random", "centre", "bottom right"]

SIZE = 16 / 224
"""Side of the paper's patch, as a share of the image's."""


@dataclass(frozen=True)
class Patch:
    """A square of `size` times the image's shorter side.

    Args:
        size: share of the shorter side, so that it keeps its proportion at every resolution.
        place: where; `"random"` draws a place for each image from `seed` and the image's index.

    Raises:
        ValueError: a size outside (0, 1], or an unknown place.
    """

    size: float
    place: Place
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1:
            raise ValueError(
                f"expected a size in (0, 1], a share of the image's side; received {self.size}; a trigger cannot be "
                "larger than the image, and one of 16 pixels in 224 has size 16 / 224"
            )
        if self.place not in get_args(Place):
            raise ValueError(f"place {self.place!r} is not one of {get_args(Place)}")

    def side(self, height: int, width: int) -> int:
        return max(1, round(self.size * min(height, width)))

    def corner(self, height: int, width: int, index: int) -> tuple[int, int]:
        """Top and left edge in image `index`."""
        side = self.side(height, width)
        room_y, room_x = height - side, width - side
        match self.place:
            case "centre":
                return room_y // 2, room_x // 2
            case "bottom right":
                return room_y, room_x
            case _:
                u = stream(self.seed, index).random(2)
                return int(u[0] * (room_y + 1)), int(u[1] * (room_x + 1))

    def region(self, height: int, width: int, index: int) -> tuple[slice, slice]:
        """Rows and columns in image `index`."""
        side, (y, x) = self.side(height, width), self.corner(height, width, index)
        return slice(y, y + side), slice(x, x + side)

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"]
    ) -> Bool[Tensor, "batch h w"]:
        masks = torch.zeros(len(indices), height, width, dtype=torch.bool)
        for row, index in enumerate(indices):
            masks[(row, *self.region(height, width, int(index)))] = True
        return masks

    def paste(
        self,
        images: Float[Tensor, "batch 3 h w"],
        picture: Float[Tensor, "3 side side"],
        indices: Sequence[int],
    ) -> Float[Tensor, "batch 3 h w"]:
        """Copies of `images` with `picture` in the patch, brought to its size."""
        height, width = images.shape[-2:]
        fitted = resize(picture, self.side(height, width)).to(images)
        pasted = images.clone()
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
