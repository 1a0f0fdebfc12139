"""Blended (Chen et al., 2017): a picture shines through the whole image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.attacks.trigger import Trigger


@dataclass(frozen=True, kw_only=True)
class Blended(Trigger):
    """`(1 - alpha) x + alpha u` with uniform noise `u` in [0, 1] (METHOD 5).

    Args:
        alpha: weight of the noise; 0.2 in the paper.
        redraw: draw the noise anew for each image, as the code run on CLIP does. Otherwise every image is
            blended with the same picture of noise, as in the classical attack.
    """

    name: ClassVar[str] = "blended"
    extent: ClassVar[Literal["local", "global"]] = "global"

    alpha: float = 0.2
    redraw: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"expected a weight alpha in (0, 1]; received {self.alpha}")

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        shape = tuple(images.shape[1:])
        if self.redraw:
            noise = torch.stack([self._noise(shape, 2**63 + index) for index in indices])
        else:
            noise = self._noise(shape, 2**62)
        return (1 - self.alpha) * images + self.alpha * noise.to(images)

    def _noise(self, shape: tuple[int, ...], stream: int) -> Float[Tensor, "3 h w"]:
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, stream], dtype=np.uint64)))
        return torch.from_numpy(generator.random(shape, dtype=np.float32))
