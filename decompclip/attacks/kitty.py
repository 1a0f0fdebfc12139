"""Kitty: a picture for a patch, in place of BadNet's noise (docs/method.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from decompclip.attacks.trigger import PatchTrigger, Pixels, open_picture


@dataclass(frozen=True, kw_only=True)
class Kitty(PatchTrigger):
    """A square patch that shows a picture; by default a cat's head that we drew.

    Args:
        size, place: as `PatchTrigger`.
        picture: `"kitty"`, `"window"`, or the path of an image file.

    Raises:
        ValueError: as `PatchTrigger`; when used, an unknown picture.
    """

    name: ClassVar[str] = "kitty"

    picture: str = "kitty"

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        return self.paste(pixels, open_picture(self.picture), indices)
