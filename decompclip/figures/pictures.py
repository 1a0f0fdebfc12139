"""Pictures, and maps of patches to lay over them, as PNG data that a page can hold."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from plotly.colors import hex_to_rgb, sample_colorscale, unlabel_rgb
from torch import Tensor

from decompclip.figures.theme import DIVERGING, SEQUENTIAL

OPACITY, FAINT = 0.78, 0.25
"""Of the strongest colour, and of attention that is zero: the picture's dark parts stay apart from it."""


def picture(pixels: UInt8[Tensor, "h w 3"]) -> str:
    """A data URI of a picture."""
    return _uri(Image.fromarray(pixels.numpy()))


def attention_overlay(weights: Float[Tensor, "rows columns"], top: float) -> str:
    """A data URI, one pixel a patch: dark and faint at zero, Cividis' yellow and opaque at `top`."""
    return _overlay(weights, signed=False, top=top)


def contribution_overlay(values: Float[Tensor, "rows columns"], top: float) -> str:
    """A data URI, one pixel a patch: clear at zero, vermillion at `top`, blue at `-top`."""
    return _overlay(values, signed=True, top=top)


def lay_over(
    pixels: UInt8[Tensor, "h w 3"], values: Float[Tensor, "h w"], *, signed: bool, top: float
) -> UInt8[Tensor, "h w 3"]:
    """A picture under a map of its own size, in the colours of `contribution_overlay` (signed) or `attention_overlay`."""
    over = tint(values.numpy(), signed=signed, top=top)
    opacity = over[..., 3:] / 255
    mixed = opacity * over[..., :3] + (1 - opacity) * pixels.numpy()
    return torch.from_numpy(mixed.round().astype(np.uint8))


def tint(values: np.ndarray, *, signed: bool, top: float) -> np.ndarray:
    """Red, green, blue and opacity, 0..255, of each number."""
    share = (values / (top or 1.0)).clip(-1 if signed else 0, 1)
    colours = _colours("diverging" if signed else "sequential")
    place = (share + 1) / 2 if signed else share
    opacity = OPACITY * np.abs(share) if signed else FAINT + share * (OPACITY - FAINT)
    rgb = colours[(place * (len(colours) - 1)).round().astype(int)]
    return np.concatenate([rgb, 255 * opacity[..., None]], axis=-1)


@lru_cache(maxsize=2)
def _colours(which: Literal["diverging", "sequential"]) -> np.ndarray:
    """The scale in 513 steps, an odd number: zero has its own."""
    scale: Any = DIVERGING if which == "diverging" else SEQUENTIAL
    found: Any = sample_colorscale(scale, np.linspace(0, 1, 513).tolist())
    return np.array(
        [unlabel_rgb(colour) if colour.startswith("rgb") else hex_to_rgb(colour) for colour in found]
    )


def _overlay(values: Float[Tensor, "rows columns"], *, signed: bool, top: float) -> str:
    return _uri(Image.fromarray(tint(values.numpy(), signed=signed, top=top).round().astype(np.uint8)))


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
