"""Common corruptions of images, in five severities (after Hendrycks and Dietterich, 2019, ImageNet-C).

Sizes are shares of the image's shorter side, stated there for 224 pixels. What is drawn (noise, flakes, ice) is drawn once
for a size of image and a seed and is the same for all images, so that a corrupted image depends on nothing but itself.
Snow, fog and ice are ours: drawn, where the source pastes photographs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from decompclip.data.files import open_rgb

SEVERITIES = (1, 2, 3, 4, 5)
Images = Float[Tensor, "batch 3 h w"]


@dataclass(frozen=True)
class Corruption:
    """One kind: `corruption(images, severity)`; never changes `images`."""

    name: str
    apply: Callable[[Tensor, float, np.random.Generator], Tensor]
    strengths: tuple[float, float, float, float, float]

    def __call__(self, images: Images, severity: int, *, seed: int = 0) -> Images:
        """Corrupted copies, in [0, 1].

        Raises:
            ValueError: a severity outside 1..5.
        """
        if severity not in SEVERITIES:
            raise ValueError(f"expected a severity of 1..5; received {severity}")
        generator = np.random.default_rng([seed, severity])
        return self.apply(images, self.strengths[severity - 1], generator).clamp(0, 1)


def _side(images: Tensor) -> int:
    return min(images.shape[-2:])


def _draw(generator: np.random.Generator, images: Tensor, *, normal: bool = True) -> Tensor:
    shape = images.shape[1:]
    drawn = generator.standard_normal(shape) if normal else generator.random(shape)
    return torch.from_numpy(drawn).to(images)


def _field(generator: np.random.Generator, height: int, width: int, decay: float = 1.7) -> Tensor:
    """Cloudy noise in [0, 1]: its spectrum falls as a power of the frequency."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    spectrum = (np.hypot(y, x) + 1 / max(height, width)) ** -decay
    drawn = np.fft.ifft2(np.fft.fft2(generator.standard_normal((height, width))) * spectrum).real
    return torch.from_numpy((drawn - drawn.min()) / (drawn.max() - drawn.min() + 1e-12))


def _blur(images: Tensor, sigma: float) -> Tensor:
    size = 2 * max(1, math.ceil(3 * sigma)) + 1
    return TF.gaussian_blur(images, [size, size], [sigma, sigma])


def _gaussian_noise(images: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    return images + strength * _draw(generator, images)


def _shot_noise(images: Tensor, photons: float, generator: np.random.Generator) -> Tensor:
    """A Poisson count of the pixel's light, by its normal approximation."""
    return images + (images / photons).sqrt() * _draw(generator, images)


def _impulse_noise(images: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    drawn = _draw(generator, images, normal=False)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, images))


def _motion_blur(images: Tensor, length: float, generator: np.random.Generator) -> Tensor:
    taps = max(3, round(length * _side(images)) | 1)
    angle = generator.uniform(-math.pi / 4, math.pi / 4)
    kernel = torch.zeros(taps, taps)
    for step in np.linspace(-(taps // 2), taps // 2, 4 * taps):
        kernel[round(taps // 2 + step * math.sin(angle)), round(taps // 2 + step * math.cos(angle))] = 1
    kernel = (kernel / kernel.sum()).to(images).expand(3, 1, -1, -1)
    edge = min(taps // 2, _side(images) - 1)
    padded = F.pad(F.pad(images, (edge,) * 4, mode="reflect"), (taps // 2 - edge,) * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=3)


def _defocus_blur(images: Tensor, radius: float, generator: np.random.Generator) -> Tensor:
    """The mean over a disc, as a lens out of focus makes it."""
    reach = min(max(1.0, radius * _side(images)), _side(images) - 1)
    taps = math.floor(reach)
    steps = torch.arange(-taps, taps + 1)
    disc = (steps[:, None] ** 2 + steps**2 <= reach**2).to(images)
    padded = F.pad(images, (taps,) * 4, mode="reflect")
    return F.conv2d(padded, (disc / disc.sum()).expand(3, 1, -1, -1), groups=3)


def _glass_blur(images: Tensor, reach: float, generator: np.random.Generator) -> Tensor:
    """Each pixel is taken from near its place, then blurred a little."""
    height, width = images.shape[-2:]
    most = max(1, round(reach * _side(images)))
    rows, columns = np.mgrid[:height, :width]
    for _ in range(2):
        rows = (rows + generator.integers(-most, most + 1, rows.shape)).clip(0, height - 1)
        columns = (columns + generator.integers(-most, most + 1, columns.shape)).clip(0, width - 1)
    return _blur(images[..., torch.from_numpy(rows), torch.from_numpy(columns)], 0.5)


def _zoom_blur(images: Tensor, most: float, generator: np.random.Generator) -> Tensor:
    """The mean of views of the centre, nearer and nearer."""
    views = [_zoomed(images, zoom, (0.5, 0.5)) for zoom in np.linspace(1, 1 + most, 8)]
    return torch.stack(views).mean(0)


def _zoomed(images: Tensor, zoom: float, place: tuple[float, float]) -> Tensor:
    """A part of the image at its full size; `place` is from 0, the top or left, to 1."""
    height, width = images.shape[-2:]
    rows, columns = max(2, round(height / zoom)), max(2, round(width / zoom))
    top, left = (
        round(part * (n - m)) for part, n, m in zip(place, (height, width), (rows, columns), strict=True)
    )
    view = images[..., top : top + rows, left : left + columns]
    return F.interpolate(view, (height, width), mode="bilinear", align_corners=False)


def _dark(images: Tensor, factor: float, generator: np.random.Generator) -> Tensor:
    return factor * images


def _pale(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    return images + amount * (1 - images)


def _gaussian_blur(images: Tensor, sigma: float, generator: np.random.Generator) -> Tensor:
    return _blur(images, sigma * _side(images))


def _crop(images: Tensor, zoom: float, generator: np.random.Generator) -> Tensor:
    return _zoomed(images, zoom, (generator.random(), generator.random()))


def _grey(images: Tensor, left: float, generator: np.random.Generator) -> Tensor:
    return TF.adjust_saturation(images, left)


def _hue(images: Tensor, turn: float, generator: np.random.Generator) -> Tensor:
    return TF.adjust_hue(images, turn)


def _gamma(images: Tensor, power: float, generator: np.random.Generator) -> Tensor:
    return images.clamp_min(0) ** power


def _posterize(images: Tensor, levels: float, generator: np.random.Generator) -> Tensor:
    return (images * (levels - 1)).round() / (levels - 1)


def _solarize(images: Tensor, threshold: float, generator: np.random.Generator) -> Tensor:
    return torch.where(images < threshold, images, 1 - images)


def _negative(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    return images + amount * (1 - 2 * images)


def _rotate(images: Tensor, degrees: float, generator: np.random.Generator) -> Tensor:
    return TF.rotate(images, degrees, interpolation=TF.InterpolationMode.BILINEAR)


def _occlude(images: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """A black square somewhere."""
    side = max(1, round(share * _side(images)))
    top, left = (int(generator.integers(0, n - side + 1)) for n in images.shape[-2:])
    covered = images.clone()
    covered[..., top : top + side, left : left + side] = 0
    return covered


def _elastic(images: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    height, width = images.shape[-2:]
    sigma = max(0.5, 0.02 * _side(images))
    moves = torch.from_numpy(generator.uniform(-1, 1, (1, 2, height, width))).float()
    moves = _blur(moves, sigma)
    moves = moves / moves.square().mean().sqrt().clamp_min(1e-9) * strength * 2
    y, x = (torch.linspace(-1, 1, n) for n in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) + moves[0].permute(1, 2, 0)
    grid = grid.to(images).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)


def _snow(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    height, width = images.shape[-2:]
    flakes = torch.from_numpy((generator.random((1, 1, height, width)) < 0.15 * amount).astype(np.float32))
    falling = _motion_blur(flakes.expand(1, 3, -1, -1).contiguous(), 0.05, generator).to(images)
    grey = TF.rgb_to_grayscale(images, 3)
    whitened = (1 - 0.3 * amount) * images + 0.3 * amount * torch.maximum(images, 1.5 * grey * 0.5 + 0.5)
    return whitened + 2 * amount * falling


def _frost(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    height, width = images.shape[-2:]
    ice = 1 - (2 * _field(generator, height, width, 1.2) - 1).abs()  # ridges, as crystals have them
    return (1 - 0.5 * amount) * images + amount * (ice**3).to(images)


def _fog(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    top = images.amax((1, 2, 3), keepdim=True)
    haze = amount * _field(generator, *images.shape[-2:]).to(images)
    return (images + haze) * top / (top + amount).clamp_min(1e-6)


def _brightness(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    value = images.amax(1, keepdim=True)  # of HSV: hue and saturation stay
    return images * ((value + amount).clamp(max=1) / value.clamp_min(1e-6)).clamp(max=1e3)


def _contrast(images: Tensor, factor: float, generator: np.random.Generator) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return mean + factor * (images - mean)


def _pixelate(images: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    height, width = images.shape[-2:]
    small = F.interpolate(images, (max(1, round(share * height)), max(1, round(share * width))), mode="area")
    return F.interpolate(small, (height, width), mode="nearest")


def _jpeg(images: Tensor, quality: float, generator: np.random.Generator) -> Tensor:
    made = []
    for image in images:
        array = (255 * image).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=int(quality))
        made.append(torch.from_numpy(np.array(open_rgb(buffer))).permute(2, 0, 1) / 255)
    return torch.stack(made).to(images) if made else images.clone()


def _stripes(down: int, across: int, period: int) -> Callable[[Tensor, float, np.random.Generator], Tensor]:
    """Light and dark by turns: rows (1, 0), columns (0, 1) or, where both, their product: a chequer."""

    def apply(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
        height, width = images.shape[-2:]
        y, x = (1 - 2 * (torch.arange(n) * 2 // period % 2) for n in (height, width))
        pattern = (y[:, None] if down else torch.ones(height, 1)) * (x if across else torch.ones(width))
        return images + amount * pattern.to(images)

    return apply


def _sine(cycles: int, degrees: int) -> Callable[[Tensor, float, np.random.Generator], Tensor]:
    """A wave of so many cycles over the width, that runs along the rows turned by `degrees`."""
    angle = math.radians(degrees)

    def apply(images: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
        y, x = (torch.arange(n) / n for n in images.shape[-2:])
        way = x * math.cos(angle) + y[:, None] * math.sin(angle)
        return images + amount * (2 * math.pi * cycles * way).sin().to(images)

    return apply


def _lost_lines(images: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Rows that no sensor or link gave: black."""
    lost = torch.from_numpy(generator.random(images.shape[-2]) < share)
    return torch.where(lost[:, None].to(images.device), 0.0, images)


def _channel_shift(images: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Red and blue beside their place, by a share of the width each."""
    by = max(1, round(share * _side(images)))
    red, green, blue = images.unbind(1)
    return torch.stack((red.roll(by, -1), green, blue.roll(-by, -1)), 1)


CORRUPTIONS = (
    Corruption("elastic_transform", _elastic, (0.004, 0.008, 0.012, 0.018, 0.026)),
    Corruption("gaussian_noise", _gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    Corruption("shot_noise", _shot_noise, (60.0, 25.0, 12.0, 5.0, 3.0)),
    Corruption("impulse_noise", _impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    Corruption("motion_blur", _motion_blur, (0.045, 0.067, 0.09, 0.11, 0.135)),
    Corruption("snow", _snow, (0.2, 0.35, 0.5, 0.7, 0.9)),
    Corruption("frost", _frost, (0.2, 0.35, 0.5, 0.65, 0.8)),
    Corruption("fog", _fog, (0.5, 0.8, 1.2, 1.8, 2.5)),
    Corruption("brightness", _brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    Corruption("contrast", _contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    Corruption("pixelate", _pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    Corruption("jpeg_compression", _jpeg, (25.0, 18.0, 15.0, 10.0, 7.0)),
)
"""The twelve of the paper, appendix D.3."""

COMMON = (
    *CORRUPTIONS,
    Corruption("defocus_blur", _defocus_blur, (0.014, 0.018, 0.027, 0.036, 0.045)),
    Corruption("glass_blur", _glass_blur, (0.005, 0.01, 0.015, 0.02, 0.03)),
    Corruption("zoom_blur", _zoom_blur, (0.11, 0.16, 0.21, 0.26, 0.31)),
)
"""The fifteen of Hendrycks and Dietterich."""

EVERYDAY = (
    Corruption("dark", _dark, (0.5, 0.35, 0.25, 0.15, 0.08)),
    Corruption("pale", _pale, (0.4, 0.55, 0.7, 0.8, 0.9)),
    Corruption("blur", _gaussian_blur, (0.01, 0.02, 0.035, 0.05, 0.08)),
    Corruption("crop", _crop, (1.25, 1.5, 2.0, 2.5, 3.5)),
)
"""What cameras and people do besides."""

EDITS = (
    Corruption("grey", _grey, (0.7, 0.5, 0.3, 0.1, 0.0)),
    Corruption("hue", _hue, (0.05, 0.1, 0.2, 0.3, 0.5)),
    Corruption("gamma", _gamma, (1.5, 2.0, 3.0, 4.0, 6.0)),
    Corruption("posterize", _posterize, (16.0, 8.0, 4.0, 3.0, 2.0)),
    Corruption("solarize", _solarize, (0.9, 0.8, 0.7, 0.6, 0.5)),
    Corruption("negative", _negative, (0.2, 0.4, 0.6, 0.8, 1.0)),
    Corruption("rotate", _rotate, (10.0, 20.0, 45.0, 90.0, 180.0)),
    Corruption("occlude", _occlude, (0.2, 0.3, 0.4, 0.5, 0.6)),
)
"""What programs that edit pictures do."""

AMOUNTS = (0.05, 0.1, 0.2, 0.35, 0.5)
"""What a pattern adds and takes away at its crests, as a share of white."""

PATTERNS = (
    *(
        Corruption(f"{name}_{period}", _stripes(down, across, period), AMOUNTS)
        for name, down, across in (("rows", 1, 0), ("columns", 0, 1), ("chequer", 1, 1))
        for period in (2, 4, 8)
    ),
    *(
        Corruption(f"sine_{cycles}_at_{degrees}", _sine(cycles, degrees), AMOUNTS)
        for cycles in (3, 6, 12)
        for degrees in (0, 45, 90)
    ),
    Corruption("lost_lines", _lost_lines, (0.02, 0.05, 0.1, 0.2, 0.4)),
    Corruption("channel_shift", _channel_shift, (0.01, 0.02, 0.04, 0.08, 0.15)),
)
"""What sensors, screens and links do: stripes by their period in pixels, waves by their cycles over the width and their angle."""
