"""Pictures, and maps of patches to lay over them, as PNG data that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from plotly.colors import hex_to_rgb, sample_colorscale, unlabel_rgb
from torch import Tensor

from decompclip.figures.theme import DIVERGING, SEQUENTIAL

OPACITY = 0.78


def picture(pixels: UInt8[Tensor, "h w 3"]) -> str:
    """A data URI of a picture."""
    return _uri(Image.fromarray(pixels.numpy()))


def attention_overlay(weights: Float[Tensor, "rows columns"], top: float) -> str:
    """A data URI, one pixel a patch: clear at zero, Cividis' yellow and opaque at `top`."""
    share = (weights.numpy() / (top or 1.0)).clip(0, 1)
    return _overlay(
        share, sample_colorscale(SEQUENTIAL, share.ravel().tolist()), 0.25 + share * (OPACITY - 0.25)
    )


def contribution_overlay(values: Float[Tensor, "rows columns"], top: float) -> str:
    """A data URI, one pixel a patch: clear at zero, vermillion at `top`, blue at `-top`."""
    share = (values.numpy() / (top or 1.0)).clip(-1, 1)
    return _overlay(
        share, sample_colorscale(DIVERGING, (0.5 + share.ravel() / 2).tolist()), OPACITY * np.abs(share)
    )


def _overlay(share: np.ndarray, colours: Iterable[Any], opacity: np.ndarray) -> str:
    rgb = [unlabel_rgb(colour) if colour.startswith("rgb") else hex_to_rgb(colour) for colour in colours]
    rgba = np.concatenate([np.array(rgb), 255 * opacity.ravel()[:, None]], axis=1)
    return _uri(Image.fromarray(rgba.round().astype(np.uint8).reshape(*share.shape, 4)))


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
