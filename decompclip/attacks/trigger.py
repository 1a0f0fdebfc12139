"""What every trigger has in common.

A trigger is a pure function of images in [0, 1] and of their indices: image `i` of a data set gets the same
trigger in any batch, so that triggered twins differ from their clean images by the trigger alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Extent = Literal["local", "global"]
Structure = Literal["structured", "noise"]
Logits = Callable[[Float[Tensor, "batch 3 h w"]], Float[Tensor, "batch class"]]

FIXED = 2**62
"""Stream of what all images share."""

REDRAWN = 2**63
"""Stream of what image 0 has of its own; that of image `i` is so many further on."""


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Base of the triggers: `trigger(images, indices)`.

    Attributes:
        seed: of everything that the trigger draws.
        name, extent: what it is, and whether it touches a part of the image or all of it.
        clean_label: poisons are images of the target that keep their captions, not images of other classes
            that get the target's.
    """

    seed: int = 0
    name: ClassVar[str]
    extent: ClassVar[Extent]
    clean_label: ClassVar[bool] = False

    @property
    def structure(self) -> Structure:
        """`structured`: one pattern recurs in every image. `noise`: each image gets another one."""
        return "structured"

    def __call__(
        self,
        images: Float[Tensor, "batch 3 h w"],
        indices: Sequence[int] | Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch 3 h w"]:
        """Triggered copies of `images`; the originals stay as they are.

        Args:
            images: pixels in [0, 1], before normalisation.
            indices: place of each image in its data set, from which its draws follow; `0 .. batch-1` by default.

        Raises:
            ValueError: not a batch of RGB images in [0, 1], or not one index for each.
        """
        check_pixels(images)
        places = list(range(len(images))) if indices is None else [int(i) for i in indices]
        if len(places) != len(images):
            raise ValueError(f"expected one index for each of {len(images)} images; received {len(places)}")
        return self._apply(images, places)

    def poison(
        self,
        images: Float[Tensor, "batch 3 h w"],
        indices: Sequence[int] | Int[Tensor, " batch"] | None = None,
        *,
        labels: Int[Tensor, " batch"] | None = None,
        logits: Logits | None = None,
    ) -> Float[Tensor, "batch 3 h w"]:
        """The copies of `images` to train on: the triggered ones, unless an attack does more to them.

        Args:
            labels, logits: classes of the images, and the clean model's logits from pixels in [0, 1]; read by
                the attacks that need a model.
        """
        return self(images, indices)

    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: list[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        raise NotImplementedError

    def mask(
        self, height: int, width: int, indices: Sequence[int] | Int[Tensor, " batch"] = (0,)
    ) -> Bool[Tensor, "batch h w"]:
        """The pixels that the trigger may touch in the images at `indices`."""
        return torch.ones(len(indices), height, width, dtype=torch.bool)

    def card(self) -> dict[str, Any]:
        """Name, extent, structure and every parameter, ready for JSON; `from_card` reads it back."""
        return {"name": self.name, "extent": self.extent, "structure": self.structure, **asdict(self)}


def stream(seed: int, place: int) -> np.random.Generator:
    """The generator of stream `place` of a seed: any draw can be made at any time, in any order.

    Raises:
        ValueError: a seed or an index that is negative or too large.
    """
    if not (0 <= seed < 2**64 and 0 <= place < 2**64):
        raise ValueError(
            f"expected a seed and indices that are not negative (nor above 2**62); received seed {seed}, index "
            f"{place if place < FIXED else place % FIXED}"
        )
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], dtype=np.uint64)))


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"expected {name} in (0, 1]; received {value}")


def check_pixels(images: Tensor) -> None:
    """Raises ValueError unless `images` are `[batch, 3, h, w]` in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [batch, 3, h, w]; received {list(images.shape)}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"expected pixels in [0, 1]; received {images.min():.2f}..{images.max():.2f}; apply a trigger before "
            "the model's normalisation"
        )
