"""Splits kept apart by type: a `Validation` gives the means, an `Evaluation` is measured, and none serves as both."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments


@dataclass(frozen=True, eq=False, repr=False)
class Validation:
    """Moments of clean images, and which images those were.

    Attributes:
        moments: their means, which ablations fill in.
        ids: a name for each image: a path, or its number in the data set.
    """

    moments: Moments
    ids: frozenset[Hashable]

    @staticmethod
    def of(moments: Moments, ids: Iterable[Hashable]) -> Validation:
        """Moments with the names of their images.

        Raises:
            ValueError: not one name for each image.
        """
        names = frozenset(_plain(ids))
        if len(names) != moments.count:
            raise ValueError(
                f"expected a name for each of the {moments.count} images of the moments; received {len(names)} "
                "different ones; name images by path, or by number in the data set"
            )
        return Validation(moments, names)

    def __repr__(self) -> str:
        return f"Validation({self.moments!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Decomposed images that are measured, and which those are.

    Interventions and sweeps take it in place of a decomposition, and hold it apart from their `Validation`.

    Attributes:
        decomposition: of a batch.
        ids: the batch's names, of the same kind as those of the validation images.
    """

    decomposition: Decomposition
    ids: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _plain(self.ids))
        if len(self.ids) != len(self.decomposition):
            raise ValueError(
                f"expected a name for each of {len(self.decomposition)} images; received {len(self.ids)}; name "
                "images by path, or by number in the data set"
            )

    def __repr__(self) -> str:
        return f"Evaluation({self.decomposition!r})"


Measured = Decomposition | Evaluation


def moments_of(fitted: Moments | Validation) -> Moments:
    """The moments alone.

    Raises:
        TypeError: images that are to be measured stand where validation statistics belong.
    """
    if isinstance(fitted, Validation):
        return fitted.moments
    if not isinstance(fitted, Moments):
        raise TypeError(
            f"expected Moments or a Validation, fitted on validation images; received {type(fitted).__name__}; fit "
            "Moments on images that are not measured"
        )
    return fitted


def apart(fitted: Moments | Validation | None, measured: Measured) -> Decomposition:
    """The decomposition to measure, once it is known to share no image with what was fitted, where both tell.

    Raises:
        ValueError: an image is in both, or the two name images in different ways, so that nobody could tell.
    """
    if not isinstance(measured, Evaluation):
        return measured
    if isinstance(fitted, Validation):
        ours, theirs = (sorted({_kind(name) for name in names}) for names in (fitted.ids, measured.ids))
        if not set(theirs) <= set(ours):
            raise ValueError(
                f"expected evaluation images named like the validation images, by {' and '.join(ours)}; received "
                f"names of type {' and '.join(theirs)}, which could not be told apart; name both in one way"
            )
        common = [name for name in measured.ids if name in fitted.ids]
        if common:
            raise ValueError(
                f"expected evaluation images that no mean was fitted on; received {len(common)} that the validation "
                f"images contain, such as {common[0]!r}; split the data set first (decompclip.data.images)"
            )
    return measured.decomposition


def _plain(ids: Iterable[Any]) -> tuple[Hashable, ...]:
    """Numbers of a tensor as numbers: tensors of equal value are no equal names."""
    return tuple(name.item() if isinstance(name, Tensor) else name for name in ids)


def _kind(name: Hashable) -> str:
    return "int" if isinstance(name, Integral) else type(name).__name__
