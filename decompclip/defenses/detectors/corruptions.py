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

from decompclip.data.pictures import open_rgb

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
