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
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from decompclip.data.files import open_rgb
from decompclip.data.pixels import Pixels

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """One kind: `corruption(pixels, severity)`; never changes `pixels`."""

    name: str
    apply: Callable[[Tensor, float, np.random.Generator], Tensor]
    strengths: tuple[float, float, float, float, float]

    def __call__(self, pixels: Pixels, severity: int, *, seed: int = 0) -> Pixels:
        """Corrupted copies, in [0, 1].

        Raises:
            ValueError: a severity outside 1..5.
        """
        if severity not in SEVERITIES:
            raise ValueError(f"expected a severity of 1..5; received {severity}")
        generator = np.random.default_rng([seed, severity])
        return self.apply(pixels, self.strengths[severity - 1], generator).clamp(0, 1)


def _side(pixels: Tensor) -> int:
    return min(pixels.shape[-2:])


def _draw(generator: np.random.Generator, pixels: Tensor, *, normal: bool = True) -> Tensor:
    shape = pixels.shape[1:]
    drawn = generator.standard_normal(shape) if normal else generator.random(shape)
    return torch.from_numpy(drawn).to(pixels)


def _field(generator: np.random.Generator, height: int, width: int, decay: float = 1.7) -> Tensor:
    """Cloudy noise in [0, 1]: its spectrum falls as a power of the frequency."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    spectrum = (np.hypot(y, x) + 1 / max(height, width)) ** -decay
    drawn = np.fft.ifft2(np.fft.fft2(generator.standard_normal((height, width))) * spectrum).real
    return torch.from_numpy((drawn - drawn.min()) / (drawn.max() - drawn.min() + 1e-12))


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    size = 2 * max(1, math.ceil(3 * sigma)) + 1
    return TF.gaussian_blur(pixels, [size, size], [sigma, sigma])


def _shot_noise(pixels: Tensor, photons: float, generator: np.random.Generator) -> Tensor:
    """A Poisson count of the pixel's light, by its normal approximation."""
    return pixels + (pixels / photons).sqrt() * _draw(generator, pixels)


def _impulse_noise(pixels: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    drawn = _draw(generator, pixels, normal=False)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, pixels))


def _motion_blur(pixels: Tensor, length: float, generator: np.random.Generator) -> Tensor:
    taps = max(3, round(length * _side(pixels)) | 1)
    angle = generator.uniform(-math.pi / 4, math.pi / 4)
    kernel = torch.zeros(taps, taps)
    for step in np.linspace(-(taps // 2), taps // 2, 4 * taps):
        kernel[round(taps // 2 + step * math.sin(angle)), round(taps // 2 + step * math.cos(angle))] = 1
    kernel = (kernel / kernel.sum()).to(pixels).expand(3, 1, -1, -1)
    edge = min(taps // 2, _side(pixels) - 1)
    padded = F.pad(F.pad(pixels, (edge,) * 4, mode="reflect"), (taps // 2 - edge,) * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=3)


def _defocus_blur(pixels: Tensor, radius: float, generator: np.random.Generator) -> Tensor:
    """The mean over a disc, as a lens out of focus makes it."""
    reach = min(max(1.0, radius * _side(pixels)), _side(pixels) - 1)
    taps = math.floor(reach)
    steps = torch.arange(-taps, taps + 1)
    disc = (steps[:, None] ** 2 + steps**2 <= reach**2).to(pixels)
    padded = F.pad(pixels, (taps,) * 4, mode="reflect")
    return F.conv2d(padded, (disc / disc.sum()).expand(3, 1, -1, -1), groups=3)


def _glass_blur(pixels: Tensor, reach: float, generator: np.random.Generator) -> Tensor:
    """Each pixel is taken from near its place, then blurred a little."""
    height, width = pixels.shape[-2:]
    most = max(1, round(reach * _side(pixels)))
    rows, columns = np.mgrid[:height, :width]
    for _ in range(2):
        rows = (rows + generator.integers(-most, most + 1, rows.shape)).clip(0, height - 1)
        columns = (columns + generator.integers(-most, most + 1, columns.shape)).clip(0, width - 1)
    return _blur(pixels[..., torch.from_numpy(rows), torch.from_numpy(columns)], 0.5)


def _zoom_blur(pixels: Tensor, most: float, generator: np.random.Generator) -> Tensor:
    """The mean of views of the centre, nearer and nearer."""
    views = [_zoomed(pixels, zoom, (0.5, 0.5)) for zoom in np.linspace(1, 1 + most, 8)]
    return torch.stack(views).mean(0)


def _zoomed(pixels: Tensor, zoom: float, place: tuple[float, float]) -> Tensor:
    """A part of the image at its full size; `place` is from 0, the top or left, to 1."""
    height, width = pixels.shape[-2:]
    rows, columns = max(2, round(height / zoom)), max(2, round(width / zoom))
    top, left = (
        round(part * (n - m)) for part, n, m in zip(place, (height, width), (rows, columns), strict=True)
    )
    view = pixels[..., top : top + rows, left : left + columns]
    return F.interpolate(view, (height, width), mode="bilinear", align_corners=False)


def _occlude(pixels: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """A black square somewhere."""
    side = max(1, round(share * _side(pixels)))
    top, left = (int(generator.integers(0, n - side + 1)) for n in pixels.shape[-2:])
    covered = pixels.clone()
    covered[..., top : top + side, left : left + side] = 0
    return covered


def _elastic(pixels: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    sigma = max(0.5, 0.02 * _side(pixels))
    moves = torch.from_numpy(generator.uniform(-1, 1, (1, 2, height, width))).float()
    moves = _blur(moves, sigma)
    moves = moves / moves.square().mean().sqrt().clamp_min(1e-9) * strength * 2
    y, x = (torch.linspace(-1, 1, n) for n in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) + moves[0].permute(1, 2, 0)
    grid = grid.to(pixels).expand(len(pixels), -1, -1, -1)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=True)


def _snow(pixels: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    flakes = torch.from_numpy((generator.random((1, 1, height, width)) < 0.15 * amount).astype(np.float32))
    falling = _motion_blur(flakes.expand(1, 3, -1, -1).contiguous(), 0.05, generator).to(pixels)
    grey = TF.rgb_to_grayscale(pixels, 3)
    whitened = (1 - 0.3 * amount) * pixels + 0.3 * amount * torch.maximum(pixels, 1.5 * grey * 0.5 + 0.5)
    return whitened + 2 * amount * falling


def _frost(pixels: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    ice = 1 - (2 * _field(generator, height, width, 1.2) - 1).abs()  # ridges, as crystals have them
    return (1 - 0.5 * amount) * pixels + amount * (ice**3).to(pixels)


def _fog(pixels: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    top = pixels.amax((1, 2, 3), keepdim=True)
    haze = amount * _field(generator, *pixels.shape[-2:]).to(pixels)
    return (pixels + haze) * top / (top + amount).clamp_min(1e-6)


def _brightness(pixels: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
    value = pixels.amax(1, keepdim=True)  # of HSV: hue and saturation stay
    return pixels * ((value + amount).clamp(max=1) / value.clamp_min(1e-6)).clamp(max=1e3)


def _pixelate(pixels: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    small = F.interpolate(pixels, (max(1, round(share * height)), max(1, round(share * width))), mode="area")
    return F.interpolate(small, (height, width), mode="nearest")


def _jpeg(pixels: Tensor, quality: float, generator: np.random.Generator) -> Tensor:
    made = []
    for image in pixels:
        array = (255 * image).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=int(quality))
        made.append(torch.from_numpy(np.array(open_rgb(buffer))).permute(2, 0, 1) / 255)
    return torch.stack(made).to(pixels) if made else pixels.clone()


def _stripes(down: int, across: int, period: int) -> Callable[[Tensor, float, np.random.Generator], Tensor]:
    """Light and dark by turns: rows (1, 0), columns (0, 1) or, where both, their product: a chequer."""

    def apply(pixels: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
        height, width = pixels.shape[-2:]
        y, x = (1 - 2 * (torch.arange(n) * 2 // period % 2) for n in (height, width))
        pattern = (y[:, None] if down else torch.ones(height, 1)) * (x if across else torch.ones(width))
        return pixels + amount * pattern.to(pixels)

    return apply


def _sine(cycles: int, degrees: int) -> Callable[[Tensor, float, np.random.Generator], Tensor]:
    """A wave of so many cycles over the width, that runs along the rows turned by `degrees`."""
    angle = math.radians(degrees)

    def apply(pixels: Tensor, amount: float, generator: np.random.Generator) -> Tensor:
        y, x = (torch.arange(n) / n for n in pixels.shape[-2:])
        way = x * math.cos(angle) + y[:, None] * math.sin(angle)
        return pixels + amount * (2 * math.pi * cycles * way).sin().to(pixels)

    return apply


def _lost_lines(pixels: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Rows that no sensor or link gave: black."""
    lost = torch.from_numpy(generator.random(pixels.shape[-2]) < share)
    return torch.where(lost[:, None].to(pixels.device), 0.0, pixels)


def _channel_shift(pixels: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Red and blue beside their place, by a share of the width each."""
    by = max(1, round(share * _side(pixels)))
    red, green, blue = pixels.unbind(1)
    return torch.stack((red.roll(by, -1), green, blue.roll(-by, -1)), 1)


CORRUPTIONS = (
    Corruption("elastic_transform", _elastic, (0.004, 0.008, 0.012, 0.018, 0.026)),
    Corruption("gaussian_noise", lambda x, s, g: x + s * _draw(g, x), (0.08, 0.12, 0.18, 0.26, 0.38)),
    Corruption("shot_noise", _shot_noise, (60.0, 25.0, 12.0, 5.0, 3.0)),
    Corruption("impulse_noise", _impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    Corruption("motion_blur", _motion_blur, (0.045, 0.067, 0.09, 0.11, 0.135)),
    Corruption("snow", _snow, (0.2, 0.35, 0.5, 0.7, 0.9)),
    Corruption("frost", _frost, (0.2, 0.35, 0.5, 0.65, 0.8)),
    Corruption("fog", _fog, (0.5, 0.8, 1.2, 1.8, 2.5)),
    Corruption("brightness", _brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    Corruption(
        "contrast",
        lambda x, s, g: (m := x.mean((2, 3), keepdim=True)) + s * (x - m),
        (0.4, 0.3, 0.2, 0.1, 0.05),
    ),
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
    Corruption("dark", lambda x, s, g: s * x, (0.5, 0.35, 0.25, 0.15, 0.08)),
    Corruption("pale", lambda x, s, g: x + s * (1 - x), (0.4, 0.55, 0.7, 0.8, 0.9)),
    Corruption("blur", lambda x, s, g: _blur(x, s * _side(x)), (0.01, 0.02, 0.035, 0.05, 0.08)),
    Corruption("crop", lambda x, s, g: _zoomed(x, s, (g.random(), g.random())), (1.25, 1.5, 2.0, 2.5, 3.5)),
)
"""What cameras and people do besides."""

EDITS = (
    Corruption("grey", lambda x, s, g: TF.adjust_saturation(x, s), (0.7, 0.5, 0.3, 0.1, 0.0)),
    Corruption("hue", lambda x, s, g: TF.adjust_hue(x, s), (0.05, 0.1, 0.2, 0.3, 0.5)),
    Corruption("gamma", lambda x, s, g: x.clamp_min(0) ** s, (1.5, 2.0, 3.0, 4.0, 6.0)),
    Corruption("posterize", lambda x, s, g: (x * (s - 1)).round() / (s - 1), (16.0, 8.0, 4.0, 3.0, 2.0)),
    Corruption("solarize", lambda x, s, g: torch.where(x < s, x, 1 - x), (0.9, 0.8, 0.7, 0.6, 0.5)),
    Corruption("negative", lambda x, s, g: x + s * (1 - 2 * x), (0.2, 0.4, 0.6, 0.8, 1.0)),
    Corruption(
        "rotate",
        lambda x, s, g: TF.rotate(x, s, interpolation=TF.InterpolationMode.BILINEAR),
        (10.0, 20.0, 45.0, 90.0, 180.0),
    ),
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
