"""Pictures of extreme proportions: cut before they are scaled, or a few bytes become gigabytes.

Scaling a picture until its shorter side fits makes the longer side of one of 1 x 60,000 pixels 13 million long, of which
the crop that follows keeps the middle 224.

From a picture to the pixels that a tower takes: the one place that carries out a model's own preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
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


Transform = Callable[[Image.Image], Float[Tensor, "3 h w"]]


@dataclass(frozen=True)
class Steps:
    """How transformers' image processors bring a picture to a size, where open_clip knows one size only.

    Attributes:
        resize: the shorter side to scale to; or height and width, whatever the proportions; None leaves the picture.
        crop: height and width of the middle that is kept, with black around a picture that is smaller; None keeps all.
        resample: Pillow's number of the interpolation.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.resize is not None:
            picture = self._cut(self.resize)(picture)
            height, width = self._size(picture.height, picture.width)
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        if self.crop is None:
            return picture
        # as transformers rounds: towards the upper left, of what is cut and of what is added
        top, left = (
            (have - want) // 2 if have >= want else -((want - have) // 2)
            for have, want in zip((picture.height, picture.width), self.crop, strict=True)
        )
        return picture.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def _cut(self, resize: int | tuple[int, int]) -> CutExtremes:
        how = "bilinear" if self.resample == Image.Resampling.BILINEAR else "bicubic"
        return (
            CutExtremes((resize, resize), "shortest", how)
            if isinstance(resize, int)
            else CutExtremes(resize, "squash", how)
        )

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            assert self.resize is not None
            return self.resize
        short, long = sorted((height, width))
        other = max(1, int(self.resize * long / short))
        return (self.resize, other) if height <= width else (other, self.resize)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of what comes out, where that is one size for all pictures."""
        whole = self.resize if isinstance(self.resize, tuple) else None
        return self.crop or whole

    def scaled(self, factor: tuple[float, float]) -> Steps:
        """The same for a tower of another image size."""

        def both(size: tuple[int, int]) -> tuple[int, int]:
            return round(size[0] * factor[0]), round(size[1] * factor[1])

        resize = round(self.resize * min(factor)) if isinstance(self.resize, int) else self.resize
        return replace(
            self,
            resize=both(resize) if isinstance(resize, tuple) else resize,
            crop=None if self.crop is None else both(self.crop),
        )


@dataclass
class Preprocessing(PreprocessCfg):
    """open_clip's fields, and `steps` where a processor of transformers' goes another way than open_clip's transform."""

    steps: Steps | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if isinstance(self.steps, dict):  # out of JSON
            given: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in self.steps.items()
            }
            self.steps = Steps(**given)

    def pixels(self) -> Transform:
        """From an RGB picture to pixels in [0, 1] of the tower's size, before any normalisation."""
        plain = replace(self, mean=(0, 0, 0), std=(1, 1, 1))
        if self.steps is None:
            return without_extremes(image_transform_v2(plain, is_train=False), plain)
        return _Stepped(self.steps, (int(self.input_size[1]), int(self.input_size[2])))

    def transform(self) -> Transform:
        """From an RGB picture to the tower's input."""
        if self.steps is None:
            return without_extremes(image_transform_v2(self, is_train=False), self)
        return _Normalised(self.pixels(), tuple(self.mean), tuple(self.std))


@dataclass(frozen=True)
class _Stepped:
    steps: Steps
    size: tuple[int, int]

    def __call__(self, picture: Image.Image) -> Float[Tensor, "3 h w"]:
        made = self.steps(picture.convert("RGB"))
        if (made.height, made.width) != self.size:
            raise ValueError(
                f"expected a picture of {self.size[0]} x {self.size[1]} pixels, since this model's preprocessing scales "
                f"none; received {made.height} x {made.width}; bring pictures to that size first"
            )
        return torch.from_numpy(np.array(made)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class _Normalised:
    pixels: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Float[Tensor, "3 h w"]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (self.pixels(picture) - mean) / std
