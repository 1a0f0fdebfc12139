"""Kitty: a picture for a patch, in place of BadNet's noise (docs/method.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from decompclip.attacks.trigger import SIZE, Extent, Patch, Place, Trigger, open_picture


@dataclass(frozen=True, kw_only=True)
class Kitty(Trigger):
    """A square patch that shows a picture; by default a cat's head that we drew.

    Args:
        size: side of the patch as a share of the image's shorter side; BadNet's 16 of 224 pixels by default.
        place: where; `"random"` draws a place for each image.
        picture: `"kitty"`, `"window"`, or the path of an image file.

    Raises:
        ValueError: a size outside (0, 1], or an unknown place; when used, an unknown picture.
    """

    name: ClassVar[str] = "kitty"
    extent: ClassVar[Extent] = "local"

    size: float = SIZE
    place: Place = "random"
    picture: str = "kitty"

    def __post_init__(self) -> None:
        _ = self._patch  # its checks are ours

    @property
    def _patch(self) -> Patch:
        return Patch(self.size, self.place, self.seed)

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        return self._patch.paste(images, open_picture(self.picture), indices)

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"] = (0,)
    ) -> Bool[Tensor, "batch h w"]:
        return self._patch.mask(height, width, indices)
