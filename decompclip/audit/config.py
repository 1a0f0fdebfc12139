"""What an audit can be asked to do otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, get_args

from decompclip.decomposition.maps import Convention

T = TypeVar("T")


class Track(Protocol):
    """Shows progress: passes `items` through while it says what is being done and how many there are."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterator[T]: ...


def silently(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The `Track` that shows nothing."""
    del description, total
    yield from items


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Options of an audit; the defaults are the paper's where it names one.

    Attributes:
        convention: bookkeeping of the decomposition's means and biases (docs/method.md, section 1).
        epsilon: fixed similarity below which Decomp-Rep and Decomp-Det flag a head (docs/method.md, section 3).
        quantile: of a head's own clean similarities, where the threshold is taken from them instead.
        false_positives: share of clean images that detection without a hint is set to flag.
        zeta: Decomp-Det calls an image suspicious when more heads than this are flagged.
        validation: share of the clean images that fits means and prototypes, and is reported nowhere.
        batch_size: images a forward pass.
        examples: suspect images over which attention and contribution maps are drawn.
        seed: of the validation split.
    """

    convention: Convention = "centred"
    epsilon: float = 0.002
    quantile: float = 0.05
    false_positives: float = 0.05
    zeta: int = 5
    validation: float = 0.2
    batch_size: int = 64
    examples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise ValueError(f"convention {self.convention!r} is not one of {get_args(Convention)}")
        if not math.isfinite(self.epsilon):
            raise ValueError(f"expected a finite epsilon, a similarity; received {self.epsilon}")
        for name in ("quantile", "false_positives", "validation"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1, a share; received {getattr(self, name)}")
        for name, least in {"batch_size": 1, "examples": 0, "zeta": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}; received {getattr(self, name)}")
