"""Over the whole image: noise or a picture shines through it (Blended; Chen et al., 2017), or a sinusoid (SIG; Barni et al., 2019).

Reflection (Refool; Liu et al., 2020) adds a scene that seems mirrored in a pane of glass before the image, and
WaNet (Nguyen and Tran, 2021) warps the image smoothly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_choice
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


ReflectionKind = Literal["random", "ghost", "out of focus"]

GAMMA = 2.2
"""Light adds up, the values of pixels do not."""

GHOSTS = 0.49
"""Share of ghosts where the kind is random."""


@dataclass(frozen=True, kw_only=True)
class Reflection(Trigger):
    """A picture's light added to the image's, as a ghost (a thick pane's two shifted mirror images) or out of
    focus (a near scene's blur, bright around one place). Formulas and ranges are those of the source's code.

    Args:
        seed: as `Trigger`.
        kind: which; `"random"` draws it.
        weakest: least share of the light that the reflection has.
        strongest: largest share.
        picture: what is mirrored: `"window"`, `"kitty"`, or the path of an image file.
        redraw: draw kind, share, shift, blur and bright place anew for each image, as the source does; otherwise
            once for all.

    Raises:
        ValueError: an unknown kind, or shares that are not in rising order in (0, 1).
    """

    name: ClassVar[str] = "reflection"
    extent: ClassVar[Extent] = "global"

    kind: ReflectionKind = "random"
    weakest: float = 0.05
    strongest: float = 0.45
    picture: str = "window"
    redraw: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ReflectionKind)
        if not 0 < self.weakest <= self.strongest < 1:
            raise ValueError(
                f"expected shares with 0 < weakest <= strongest < 1; received {self.weakest} and {self.strongest}"
            )

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        scene = resize(open_picture(self.picture), *pixels.shape[-2:]).to(pixels) ** GAMMA
        lights = zip(pixels**GAMMA, indices, strict=True)
        mirrored = torch.stack([self._one(light, scene, index) for light, index in lights])
        return mirrored.clamp(0, 1) ** (1 / GAMMA)

    def _one(
        self, light: Float[Tensor, "3 h w"], scene: Float[Tensor, "3 h w"], index: int
    ) -> Float[Tensor, "3 h w"]:
        u = stream(self.seed, REDRAWN + index if self.redraw else FIXED).random(8)
        share = self.weakest + (self.strongest - self.weakest) * float(u[0])
        if self.kind == "ghost" or (self.kind == "random" and u[1] < GHOSTS):
            return _ghost(light, scene, share, u[2:])
        return _out_of_focus(light, scene, share, u[2:])


def _ghost(
    light: Float[Tensor, "3 h w"], scene: Float[Tensor, "3 h w"], share: float, u: np.ndarray
) -> Float[Tensor, "3 h w"]:
    """The scene twice, shifted by 3 to 8 pixels of 224, one copy the weaker."""
    height, width = scene.shape[-2:]
    down, right = (
        max(1, round((3 + 5 * float(x)) / 224 * n)) for x, n in zip(u[:2], (height, width), strict=True)
    )
    weight = abs(float(u[2] > 0.5) - (0.15 + 0.35 * float(u[3])))
    first, second = F.pad(scene, (0, right, 0, down)), F.pad(scene, (right, 0, down, 0))
    both = weight * first + (1 - weight) * second
    # the source cuts off the margins that only one copy reaches, where the image is large enough for that
    if height > down and width > right:
        both = both[:, down:-down, right:-right]
    return share * resize(both, height, width) + (1 - share) * light


def _out_of_focus(
    light: Float[Tensor, "3 h w"], scene: Float[Tensor, "3 h w"], share: float, u: np.ndarray
) -> Float[Tensor, "3 h w"]:
    """The scene blurred by 1 to 5 pixels of 224, less what would be too bright, and fading from one place on."""
    height, width = scene.shape[-2:]
    blurred = _blur(scene, (1 + 4 * float(u[0])) / 224 * min(height, width))
    together = blurred + light
    bright = (together > 1).to(light)
    excess = (together * bright).sum((1, 2)) / (bright.sum((1, 2)) + 1e-6)
    blurred = (blurred - ((excess.clamp_min(1) - 1) * (1.08 + 0.1 * float(u[1])))[:, None, None]).clamp(0, 1)
    # the source crops a Gaussian of 560 pixels and sigma 93 at random
    y, x = ((torch.arange(n) + 0.5) / n - float(v) for n, v in zip((height, width), u[2:4], strict=True))
    fading = torch.exp(-0.5 * (y[:, None] ** 2 + x[None, :] ** 2) / 0.42**2).to(light)
    return fading * (1 - (1 - share) / 2) * blurred + (1 - share) * light


def _blur(scene: Float[Tensor, "3 h w"], sigma: float) -> Float[Tensor, "3 h w"]:
    reach = max(1, math.ceil(2 * sigma))
    offsets = torch.arange(-reach, reach + 1).to(scene)
    kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, dim=0)
    padded = F.pad(scene[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


WarpUnit = Literal["share", "pixel"]

REFERENCE = 32
"""Side of the images that the source states its strength for."""


@dataclass(frozen=True, kw_only=True)
class WaNet(Trigger):
    """Images sampled at places moved by a smooth field that is drawn once (docs/method.md, section 5: k = 4, s = 0.5).

    The field is `k x k` uniform draws, brought to a mean size of one, enlarged bicubically, times
    `s / side` in the coordinates -1..1 of the image: a mean move along each axis of `s / 2` pixels.

    Args:
        seed: as `Trigger`.
        k: points of the field's control grid along each axis.
        s: strength.
        unit: `"share"` keeps the warp's proportions at every resolution: `s` counts pixels of the 32 x 32
            images that the source states it for. `"pixel"` counts pixels of the image at hand, as the
            released code does: at 224 pixels a warp seven times as weak.
        cover: add the source's "noise mode", moves of up to half of such a pixel that are drawn anew for each
            pixel and image: for images that keep their captions, so that only the one warp is learnt.

    Raises:
        ValueError: fewer than two control points, a strength that is not positive, or an unknown unit.
    """

    name: ClassVar[str] = "wanet"
    extent: ClassVar[Extent] = "global"

    k: int = 4
    s: float = 0.5
    unit: WarpUnit = "share"
    cover: bool = False

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"expected k >= 2 control points along an axis; received {self.k}")
        if not 0 < self.s < math.inf:
            raise ValueError(f"expected a strength s above 0; received {self.s}")
        check_choice("unit", self.unit, WarpUnit)

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        height, width = pixels.shape[-2:]
        grid = self._grid(height, width).to(pixels).expand(len(pixels), -1, -1, -1)
        if self.cover:
            jitter = np.stack([stream(self.seed, REDRAWN + i).random((height, width, 2)) for i in indices])
            grid = (grid + (2 * torch.from_numpy(jitter).to(pixels) - 1) / self._side(height, width)).clamp(
                -1, 1
            )
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=True).clamp(0, 1)

    def _side(self, height: int, width: int) -> int:
        return REFERENCE if self.unit == "share" else min(height, width)

    def _grid(self, height: int, width: int) -> Float[Tensor, "1 h w 2"]:
        """Where each pixel of a warped image comes from, (x, y) in -1..1."""
        draws = 2 * torch.from_numpy(stream(self.seed, FIXED).random((1, 2, self.k, self.k))) - 1
        control = draws / draws.abs().mean()
        field = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
        y, x = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
        identity = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        moved = identity + self.s / self._side(height, width) * field.permute(0, 2, 3, 1)
        return moved.clamp(-1, 1)
