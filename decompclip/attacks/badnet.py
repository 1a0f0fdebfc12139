"""BadNet (Gu et al., 2017): a small patch somewhere in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decompclip.attacks.trigger import Trigger

Place = Literal["random", "centre", "bottom right"]


@dataclass(frozen=True, kw_only=True)
class BadNet(Trigger):
    """A square patch of value `channel mean of the image + N(0, 1)`, cut to [0, 1] (METHOD 5).

    Args:
        size: side of the patch as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        redraw: draw the noise anew for each image, as the code run on CLIP does. Otherwise every image
            carries the same pattern, as in the classical attack.
    """

    name: ClassVar[str] = "badnet"
    extent: ClassVar[Literal["local", "global"]] = "local"

    size: float = 16 / 224
    place: Place = "random"
    redraw: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1:
            raise ValueError(f"expected a size in (0, 1], a share of the image's side; received {self.size}")
        if self.place not in get_args(Place):
            raise ValueError(f"place {self.place!r} is not one of {get_args(Place)}")

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        height, width = images.shape[-2:]
        side = self._side(height, width)
        triggered = images.clone()
        means = reduce(images, "b c h w -> b c 1 1", "mean")
        for row, index in enumerate(indices):
            y, x = self._corner(height, width, index)
            noise = self._noise(side, index).to(images)
            triggered[row, :, y : y + side, x : x + side] = (means[row] + noise).clamp(0, 1)
        return triggered

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"] = (0,)
    ) -> Bool[Tensor, "batch h w"]:
        side = self._side(height, width)
        masks = torch.zeros(len(indices), height, width, dtype=torch.bool)
        for row, index in enumerate(indices):
            y, x = self._corner(height, width, int(index))
            masks[row, y : y + side, x : x + side] = True
        return masks

    def _side(self, height: int, width: int) -> int:
        return max(1, round(self.size * min(height, width)))

    def _corner(self, height: int, width: int, index: int) -> tuple[int, int]:
        room_y, room_x = height - self._side(height, width), width - self._side(height, width)
        match self.place:
            case "centre":
                return room_y // 2, room_x // 2
            case "bottom right":
                return room_y, room_x
            case _:
                u = np.random.Generator(np.random.Philox(key=[self.seed, index])).random(2)
                return int(u[0] * (room_y + 1)), int(u[1] * (room_x + 1))

    def _noise(self, side: int, index: int) -> Float[Tensor, "3 side side"]:
        # one stream for the fixed pattern, one an image for the redrawn ones
        key = [self.seed, 2**63 + index if self.redraw else 2**62]
        generator = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
        return torch.from_numpy(generator.standard_normal((3, side, side), dtype=np.float32))
