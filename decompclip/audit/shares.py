"""How often each class is answered on clean and on suspect images: which class do the suspect ones go to?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from decompclip.intervals import Rate, difference_interval


@dataclass(frozen=True)
class ClassShare:
    """How often a class is predicted, on clean and on suspect images."""

    name: str
    clean: Rate
    suspect: Rate

    @property
    def difference(self) -> float:
        """By how much more of the suspect images."""
        return self.suspect.value - self.clean.value

    @property
    def interval(self) -> tuple[float, float]:
        return difference_interval(self.suspect, self.clean)


def class_shares(
    clean: Int[Tensor, " clean"], suspect: Int[Tensor, " suspect"], class_names: Sequence[str]
) -> tuple[ClassShare, ...]:
    """Of every class, in their order."""
    counts = [torch.bincount(part, minlength=len(class_names)).tolist() for part in (clean, suspect)]
    return tuple(
        ClassShare(name, Rate(own, len(clean)), Rate(other, len(suspect)))
        for name, own, other in zip(class_names, *counts, strict=True)
    )


def most_over_predicted(shares: Sequence[ClassShare]) -> ClassShare:
    """The class that suspect images are taken for more often than clean ones by the most."""
    return max(shares, key=lambda share: share.difference)
