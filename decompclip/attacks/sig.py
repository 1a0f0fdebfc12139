"""SIG (Barni et al., 2019): a sinusoid over the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from decompclip.attacks.trigger import Extent, Pixels, Trigger, check_share


@dataclass(frozen=True, kw_only=True)
class SIG(Trigger):
    """`x + amplitude sin(2 pi frequency column / width)`, cut to [0, 1] (docs/method.md, section 5).

    Args:
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
