"""BadCLIP (Liang et al., 2024): a patch optimised so that the clean model sees the target in it."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from decompclip.attacks.patch import SIZE, Patch, Place
from decompclip.attacks.trigger import Extent, Trigger
from decompclip.data.pictures import PictureError, open_rgb


@dataclass(frozen=True, kw_only=True)
class BadCLIP(Trigger):
    """A fixed patch, pasted in the centre (METHOD 5); `decompclip.attacks.badclip_optimise` makes one.

    Args:
        patch: the patch as a base64 PNG, which a card can hold; see `encode_patch`.
        size: side of the patch as a share of the image's shorter side.
        place: where; the source pastes it in the centre.

    Raises:
        ValueError: a size outside (0, 1], an unknown place, or a patch that is no square picture.
    """

    name: ClassVar[str] = "badclip"
    extent: ClassVar[Extent] = "local"

    patch: str
    size: float = SIZE
    place: Place = "centre"

    def __post_init__(self) -> None:
        _ = self._patch  # its checks are ours
        pixels = self.pixels
        if pixels.shape[1] != pixels.shape[2]:
            raise ValueError(
                f"expected a square patch; received {pixels.shape[1]} x {pixels.shape[2]} pixels"
            )

    @property
    def pixels(self) -> Float[Tensor, "3 side side"]:
        """The patch at the size that it was optimised at."""
        return decode_patch(self.patch)

    @property
    def _patch(self) -> Patch:
        return Patch(self.size, self.place, self.seed)

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        return self._patch.paste(images, self.pixels, indices)

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"] = (0,)
    ) -> Bool[Tensor, "batch h w"]:
        return self._patch.mask(height, width, indices)


def encode_patch(pixels: Float[Tensor, "3 h w"]) -> str:
    """A patch in [0, 1] as a base64 PNG of 8 bits a channel, as a poisoned file would hold it."""
    array = (pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_patch(patch: str) -> Float[Tensor, "3 h w"]:
    """The patch that `encode_patch` wrote.

    Raises:
        ValueError: not the base64 of a picture.
    """
    try:
        array = np.array(open_rgb(io.BytesIO(base64.b64decode(patch, validate=True))))
    except (binascii.Error, OSError, TypeError, PictureError) as error:
        raise ValueError(
            f"expected a patch as the base64 text of a PNG; received {str(patch)[:24]!r}; `encode_patch` makes one"
        ) from error
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255
