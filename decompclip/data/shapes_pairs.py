"""The Shapes world as image-caption pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from decompclip.data.captions import shapes_captions, templates
from decompclip.data.pairs import Pairs
from decompclip.data.shapes import RESOLUTION, Attributes, Shapes


class ShapesPairs(Pairs):
    """Images of the Shapes world with natural captions.

    Args:
        length, seed, resolution: as `Shapes`.
        caption_seed: of the captions; the bundled models were trained with `seed + 10_000`, the default.
        order_seed: as `Pairs`.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        resolution: int = RESOLUTION,
        caption_seed: int | None = None,
        order_seed: int = 0,
    ) -> None:
        self.world = Shapes(length, seed=seed, resolution=resolution)
        self.caption_seed = seed + 10_000 if caption_seed is None else caption_seed
        super().__init__(
            class_names=self.world.class_names, templates=templates("shape"), order_seed=order_seed
        )

    @cached_property
    def _attributes(
        self,
    ) -> Attributes:  # they do not depend on the resolution, and one pixel is drawn at once
        return replace(self.world, resolution=1).draw(range(len(self.world))).attributes

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"shapes/{self.world.seed}/{index}" for index in range(len(self.world))]

    @cached_property
    def captions(self) -> Sequence[str]:
        return shapes_captions(self._attributes, range(len(self.world)), seed=self.caption_seed)

    @property
    def labels(self) -> Int[Tensor, " pair"]:
        return self._attributes.shape

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return list(self.world.draw(indices).images)
