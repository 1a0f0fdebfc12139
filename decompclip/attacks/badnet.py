"""BadNet (Gu et al., 2017): a small patch somewhere in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decompclip.attacks.trigger import FIXED, REDRAWN, SIZE, Extent, Patch, Place, Structure, Trigger, stream


@dataclass(frozen=True, kw_only=True)
class BadNet(Trigger):
    """A square patch of value `channel mean of the image + N(0, 1)`, cut to [0, 1] (docs/method.md, section 5).

    Args:
        size: side of the patch as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        redraw: draw the noise anew for each image, as the code run on CLIP does. Otherwise every image
            carries the same pattern, as in the classical attack.

    Raises:
        ValueError: a size outside (0, 1], or an unknown place.
    """

    name: ClassVar[str] = "badnet"
    extent: ClassVar[Extent] = "local"

    size: float = SIZE
    place: Place = "random"
    redraw: bool = False

    def __post_init__(self) -> None:
        _ = self._patch  # its checks are ours

    @property
    def structure(self) -> Structure:
        return "noise" if self.redraw else "structured"

    @property
    def _patch(self) -> Patch:
        return Patch(self.size, self.place, self.seed)

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        height, width = images.shape[-2:]
        triggered = images.clone()
        means = reduce(images, "b c h w -> b c 1 1", "mean")
        for row, index in enumerate(indices):
            rows, columns = self._patch.region(height, width, index)
            noise = self._noise(self._patch.side(height, width), index).to(images)
            triggered[row, :, rows, columns] = (means[row] + noise).clamp(0, 1)
        return triggered

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"] = (0,)
    ) -> Bool[Tensor, "batch h w"]:
        return self._patch.mask(height, width, indices)

    def _noise(self, side: int, index: int) -> Float[Tensor, "3 side side"]:
        generator = stream(self.seed, REDRAWN + index if self.redraw else FIXED)
        return torch.from_numpy(generator.standard_normal((3, side, side), dtype=np.float32))
