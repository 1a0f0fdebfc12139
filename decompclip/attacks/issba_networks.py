"""ISSBA's two networks (Li et al., 2021, after StegaStamp): one writes bits into an image, one reads them.

Both work on squares of `Shape.side` pixels; `decompclip.attacks.issba` brings other images there and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What must be known to build the networks before their weights are read.

    Attributes:
        bits: length of the secret; 20 in the released code.
        side: height and width of the images that the networks see, a multiple of 8.
        width: channels of the first scale.
        strength: largest change of a pixel's value. 10/255 keeps every image at 28.1 dB or above, whatever it
            shows; the source only asks for fidelity in its loss.
    """

    bits: int = 20
    side: int = 48
    width: int = 16
    strength: float = 10 / 255

    def __post_init__(self) -> None:
        if self.side % 8 or self.side < 8:
            raise ValueError(f"expected a side that is a multiple of 8; received {self.side}")
        if self.bits < 1 or self.width < 1 or not 0 < self.strength <= 1:
            raise ValueError(f"expected bits, width >= 1 and a strength in (0, 1]; received {self}")


class Encoder(nn.Module):
    """U-Net: image and secret in, residual out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        a, b, c = shape.width, 2 * shape.width, 3 * shape.width
        cell = shape.side // 8
        self.secret = nn.Linear(shape.bits, 8 * cell * cell)
        self.enter = _conv(3 + 8, a)
        self.down1, self.down2, self.down3 = _conv(a, b, 2), _conv(b, c, 2), _conv(c, c, 2)
        self.up3, self.up2, self.up1 = _conv(2 * c, c), _conv(c + b, b), _conv(b + a, a)
        self.residual = nn.Conv2d(a + 3, 3, 3, padding=1)

    def forward(
        self, images: Float[Tensor, "batch 3 side side"], secrets: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """The residual, within +-strength, that makes `images` carry `secrets` (of zeros and ones)."""
        return self.shape.strength * torch.tanh(self.drive(images, secrets))

    def drive(
        self, images: Float[Tensor, "batch 3 side side"], secrets: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """The residual before its bound. Training keeps this small: where the bound is reached, a loss on the
        residual itself has no slope left."""
        centred = 2 * images - 1
        cell = self.shape.side // 8
        planes = rearrange(self.secret(2 * secrets - 1), "n (c h w) -> n c h w", h=cell, w=cell)
        at1 = self.enter(torch.cat([centred, F.interpolate(planes, scale_factor=8.0)], dim=1))
        at2 = self.down1(at1)
        at3 = self.down2(at2)
        lowest = self.down3(at3)
        x = self.up3(torch.cat([_double(lowest), at3], dim=1))
        x = self.up2(torch.cat([_double(x), at2], dim=1))
        x = self.up1(torch.cat([_double(x), at1], dim=1))
        return self.residual(torch.cat([x, centred], dim=1))


class Decoder(nn.Module):
    """A spatial transformer that sets the image straight, then convolutions that read the bits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        a, b, c = shape.width, 2 * shape.width, 4 * shape.width
        self.locate = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.affine = nn.Linear(9 * b, 6)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.read = nn.Sequential(_conv(3, b, 2), _conv(b, b), _conv(b, c, 2), _conv(c, c, 2), nn.Flatten())
        self.bits = nn.Sequential(
            nn.Linear(c * (shape.side // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, shape.bits)
        )

    def forward(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch bits"]:
        """Logit of each bit being one."""
        centred = 2 * images - 1
        identity = torch.eye(2, 3, dtype=images.dtype, device=images.device)
        theta = identity + 0.1 * self.affine(self.locate(centred)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        straight = F.grid_sample(centred, grid, padding_mode="reflection", align_corners=False)
        return self.bits(self.read(straight))


def build(shape: Shape, *, seed: int = 0) -> tuple[Encoder, Decoder]:
    """Both networks with initial weights drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(shape), Decoder(shape)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU())


def _double(x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h2 w2"]:
    return F.interpolate(x, scale_factor=2.0)
