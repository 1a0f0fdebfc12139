"""A small patch somewhere in the image: BadNet's noise (Gu et al., 2017), or a picture in its place (docs/method.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from einops import reduce

from decompclip.attacks.trigger import FIXED, REDRAWN, PatchTrigger, Pixels, Structure, open_picture, stream


@dataclass(frozen=True, kw_only=True)
class BadNet(PatchTrigger):
    """A square patch of value `channel mean of the image + N(0, 1)`, cut to [0, 1] (docs/method.md, section 5).

    Args:
        seed: of everything that the trigger draws.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        redraw: draw the noise anew for each image, as the code run on CLIP does. Otherwise every image
            carries the same pattern, as in the classical attack.

    Raises:
        ValueError: as `PatchTrigger`.
    """

    name: ClassVar[str] = "badnet"

    redraw: bool = False

    @property
    def structure(self) -> Structure:
        return "noise" if self.redraw else "structured"

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        height, width = pixels.shape[-2:]
        shape = (3, *2 * (self.side(height, width),))
        triggered = pixels.clone()
        means = reduce(pixels, "b c h w -> b c 1 1", "mean")
        for row, index in enumerate(indices):
            rows, columns = self.region(height, width, index)
            generator = stream(self.seed, REDRAWN + index if self.redraw else FIXED)
            noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(pixels)
            triggered[row, :, rows, columns] = (means[row] + noise).clamp(0, 1)
        return triggered


@dataclass(frozen=True, kw_only=True)
class Kitty(PatchTrigger):
    """A square patch that shows a picture; by default a cat's head that we drew.

    Args:
        seed: of everything that the trigger draws.
        size: side of the square as a share of the image's shorter side; 16 of 224 pixels in the paper.
        place: where; `"random"` draws a place for each image.
        picture: `"kitty"`, `"window"`, or the path of an image file.

    Raises:
        ValueError: as `PatchTrigger`; when used, an unknown picture.
    """

    name: ClassVar[str] = "kitty"

    picture: str = "kitty"

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        return self.paste(pixels, open_picture(self.picture), indices)
