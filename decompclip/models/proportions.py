"""Pictures of extreme proportions: cut before they are scaled, or a few bytes become gigabytes.

Scaling a picture until its shorter side fits makes the longer side of one of 1 x 60,000 pixels 13 million long, of which
the crop that follows keeps the middle 224.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from torchvision.transforms import Compose

MOST = 8
"""How many times the window a scaled side may be long; what lies further out has no part in the window's pixels."""


class CutExtremes:
    """Cuts the middle out of a picture whose longer side, scaled as its shorter one, would be far longer than the window.

    The window that is cropped afterwards shows the same, to within rounding; other pictures pass as they are.

    Args:
        size: height and width that the picture is scaled to.
        resize_mode: as open_clip names it. For `"squash"`, which shows all of a picture, a long height is scaled first:
            Pillow begins with the width, whatever the height. `"longest"` would leave no pixel of the shorter side.
        interpolation: as open_clip names it.
    """

    def __init__(self, size: tuple[int, int], resize_mode: str, interpolation: str) -> None:
        self.size, self.resize_mode, self.interpolation = size, resize_mode, interpolation

    def __call__(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        if self.resize_mode == "shortest":
            scale = max(height / picture.height, width / picture.width)
            rows, columns = (_kept(length, scale, self.size) for length in (picture.height, picture.width))
        elif self.resize_mode == "longest":
            rows = min(picture.height, picture.width * height)
            columns = min(picture.width, picture.height * width)
        elif picture.height > MOST * height and picture.width < width:
            resample = (
                Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
            )
            return picture.resize((picture.width, height), resample)
        else:
            return picture
        if (rows, columns) == (picture.height, picture.width):
            return picture
        top, left = (picture.height - rows) // 2, (picture.width - columns) // 2
        return picture.crop((left, top, left + columns, top + rows))


def _kept(length: int, scale: float, size: tuple[int, int]) -> int:
    """How much of a side to keep, so that rounding puts the window where it would lie on the whole side.

    What is cut away is even, half at each end; and the scaled lengths leave the same rest, for cropping halves them.
    """
    least = int(MOST * max(size) / scale)
    first = least + (length - least) % 2
    if first >= length:
        return length
    scaled = int if size[0] == size[1] else round  # torchvision's way, and open_clip's
    whole = scaled(length * scale)
    return min(range(first, min(first + 64, length), 2), key=lambda kept: (whole - scaled(kept * scale)) % 4)


def without_extremes(transform: Any, cfg: Any) -> Callable[[Image.Image], Any]:
    """open_clip's `transform`, which follows its `PreprocessCfg`, after `CutExtremes`."""
    size = (cfg.size, cfg.size) if isinstance(cfg.size, int) else tuple(cfg.size)
    return Compose([CutExtremes(size, cfg.resize_mode, cfg.interpolation), transform])
