"""A part of a set of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from decompclip.data.pairs import Pairs


class SubsetPairs(Pairs):
    """The pairs of `base` at `places`, called as they are there.

    Args:
        order_seed: as `Pairs`.

    Raises:
        IndexError: a place that `base` does not have.
    """

    def __init__(self, base: Pairs, places: Sequence[int], *, order_seed: int = 0) -> None:
        self.base, self.places = base, tuple(places)
        for place in self.places:
            if not 0 <= place < len(base):
                raise IndexError(f"expected places in 0..{len(base) - 1}; received {place}")
        super().__init__(
            class_names=base.class_names,
            templates=base.templates,
            order_seed=order_seed,
            on_error="raise" if base.on_error == "raise" else "skip",
        )

    @cached_property
    def ids(self) -> Sequence[str]:
        return [self.base.ids[place] for place in self.places]

    @cached_property
    def captions(self) -> Sequence[str]:
        return [self.base.captions[place] for place in self.places]

    @cached_property
    def labels(self) -> Int[Tensor, " pair"] | None:
        return None if self.base.labels is None else self.base.labels[list(self.places)]

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return self.base._images([self.places[index] for index in indices])
