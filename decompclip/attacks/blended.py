"""Over the whole image: noise or a picture shines through it (Blended; Chen et al., 2017), or a sinusoid (SIG; Barni et al., 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.attacks.trigger import (
    FIXED,
    REDRAWN,
    Extent,
    Pixels,
    Structure,
    Trigger,
    check_share,
    open_picture,
    resize,
    stream,
)


@dataclass(frozen=True, kw_only=True)
class Blended(Trigger):
    """`(1 - alpha) x + alpha u` with uniform noise `u` in [0, 1], or a picture (docs/method.md, section 5).

    Args:
        seed: as `Trigger`.
        alpha: weight of the noise; 0.2 in the paper.
        redraw: draw the noise anew for each image, as the code run on CLIP does. Otherwise every image is
            blended with the same picture of noise, as in the classical attack.
        picture: blend this in place of noise: `"kitty"`, `"window"`, or the path of an image file.

    Raises:
        ValueError: a weight outside (0, 1], or a picture that is to be redrawn.
    """

    name: ClassVar[str] = "blended"
    extent: ClassVar[Extent] = "global"

    alpha: float = 0.2
    redraw: bool = False
    picture: str | None = None

    def __post_init__(self) -> None:
        check_share("a weight alpha", self.alpha)
        if self.redraw and self.picture is not None:
            raise ValueError(
                f"expected redraw=False with a picture; received redraw=True and {self.picture!r}: only noise can be "
                "drawn anew"
            )

    @property
    def structure(self) -> Structure:
        return "noise" if self.redraw else "structured"

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        shape = tuple(pixels.shape[1:])
        if self.picture is not None:
            noise = resize(open_picture(self.picture), *shape[1:])
        elif self.redraw:
            noise = torch.stack([self._noise(shape, REDRAWN + index) for index in indices])
        else:
            noise = self._noise(shape, FIXED)
        return (1 - self.alpha) * pixels + self.alpha * noise.to(pixels)

    def _noise(self, shape: tuple[int, ...], place: int) -> Float[Tensor, "3 h w"]:
        return torch.from_numpy(stream(self.seed, place).random(shape, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class SIG(Trigger):
    """`x + amplitude sin(2 pi frequency column / width)`, cut to [0, 1] (docs/method.md, section 5).

    Args:
        seed: as `Trigger`; nothing is drawn.
        amplitude: of the sinusoid; 20/255 to 60/255 in the source.
        frequency: periods in the image's width, at every resolution.

    Raises:
        ValueError: an amplitude outside (0, 1], or a frequency that is not positive; when used, a frequency
            of half the width or above.
    """

    name: ClassVar[str] = "sig"
    extent: ClassVar[Extent] = "global"

    amplitude: float = 40 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        check_share("an amplitude", self.amplitude)
        if not 0 < self.frequency < math.inf:
            raise ValueError(f"expected a frequency above 0; received {self.frequency}")

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        width = pixels.shape[-1]
        if 2 * self.frequency >= width:
            raise ValueError(
                f"expected images of more than {2 * self.frequency:g} columns, two for each period of the sinusoid; "
                f"received {width}; lower the frequency"
            )
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.amplitude * torch.sin(2 * math.pi * self.frequency * columns / width)
        return (pixels + wave.to(pixels)).clamp(0, 1)
