"""Answers: what the explorer's view shows of one question, small enough for a message and for a saved page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

PICTURE = 320
"""Longest side of a picture that is sent to the view, pixels."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the view shows of one question: facts that go through JSON, and arrays.

    Maps are in 8 bits, a share of the head's largest patch, whose size stands beside them.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def described(self) -> dict[str, Any]:
        """Facts, and name, type and shape of each array; their bytes go apart."""
        return {**self.facts, "arrays": [[name, x.dtype.name, x.shape] for name, x in self.arrays.items()]}

    def written(self) -> dict[str, Any]:
        """All of it as JSON."""
        arrays = [[n, x.dtype.name, x.shape, _base64(x.tobytes())] for n, x in self.arrays.items()]
        return {**self.facts, "arrays": arrays}


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def shares_of(patches: Float[Tensor, "head rows columns"]) -> dict[str, np.ndarray]:
    """Maps in 8 bits, as shares of each head's largest patch."""
    largest = patches.abs().amax((1, 2))
    shares = (127 * patches / largest.clamp_min(torch.finfo(patches.dtype).tiny)[:, None, None]).round()
    return {"patches": shares.to(torch.int8).flatten(1).cpu().numpy(), "largest": numbers(largest)}


def picture(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """As a data URI, small; small pictures without loss."""
    image = Image.fromarray(pixels)
    exact = max(image.size) <= 96
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if exact else "JPEG", **({"optimize": True} if exact else {"quality": 88}))
    return f"data:image/{'png' if exact else 'jpeg'};base64,{_base64(buffer.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
