"""WaNet (Nguyen and Tran, 2021): a smooth warp, one for all images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.trigger import FIXED, REDRAWN, Extent, Pixels, Trigger, stream

WarpUnit = Literal["share", "pixel"]

REFERENCE = 32
"""Side of the images that the source states its strength for."""


@dataclass(frozen=True, kw_only=True)
class WaNet(Trigger):
    """Images sampled at places moved by a smooth field that is drawn once (docs/method.md, section 5: k = 4, s = 0.5).

    The field is `k x k` uniform draws, brought to a mean size of one, enlarged bicubically, times
    `s / side` in the coordinates -1..1 of the image: a mean move along each axis of `s / 2` pixels.

    Args:
        seed: as `Trigger`.
        k: points of the field's control grid along each axis.
        s: strength.
        unit: `"share"` keeps the warp's proportions at every resolution: `s` counts pixels of the 32 x 32
            images that the source states it for. `"pixel"` counts pixels of the image at hand, as the
            released code does: at 224 pixels a warp seven times as weak.
        cover: add the source's "noise mode", moves of up to half of such a pixel that are drawn anew for each
            pixel and image: for images that keep their captions, so that only the one warp is learnt.

    Raises:
        ValueError: fewer than two control points, a strength that is not positive, or an unknown unit.
    """

    name: ClassVar[str] = "wanet"
    extent: ClassVar[Extent] = "global"

    k: int = 4
    s: float = 0.5
    unit: WarpUnit = "share"
    cover: bool = False

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"expected k >= 2 control points along an axis; received {self.k}")
        if not 0 < self.s < math.inf:
            raise ValueError(f"expected a strength s above 0; received {self.s}")
        if self.unit not in get_args(WarpUnit):
            raise ValueError(f"unit {self.unit!r} is not one of {get_args(WarpUnit)}")

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        height, width = pixels.shape[-2:]
        grid = self._grid(height, width).to(pixels).expand(len(pixels), -1, -1, -1)
        if self.cover:
            jitter = np.stack([stream(self.seed, REDRAWN + i).random((height, width, 2)) for i in indices])
            grid = (grid + (2 * torch.from_numpy(jitter).to(pixels) - 1) / self._side(height, width)).clamp(
                -1, 1
            )
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=True).clamp(0, 1)

    def _side(self, height: int, width: int) -> int:
        return REFERENCE if self.unit == "share" else min(height, width)

    def _grid(self, height: int, width: int) -> Float[Tensor, "1 h w 2"]:
        """Where each pixel of a warped image comes from, (x, y) in -1..1."""
        draws = 2 * torch.from_numpy(stream(self.seed, FIXED).random((1, 2, self.k, self.k))) - 1
        control = draws / draws.abs().mean()
        field = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
        y, x = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
        identity = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        moved = identity + self.s / self._side(height, width) * field.permute(0, 2, 3, 1)
        return moved.clamp(-1, 1)
