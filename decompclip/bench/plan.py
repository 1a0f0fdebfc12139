"""What a leaderboard is made of, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from decompclip.bench.repairs import REPAIRS
from decompclip.bench.samples import check_seed
from decompclip.defenses.detectors import DETECTORS
from decompclip.models.zoo import bundled, card

SCHEMA = 2
"""Of a run's JSON: raised when a field changes its meaning, so that old runs are measured again."""

SLOW = ("STRIP", "TeCo")
"""Detectors of dozens of forward passes an image, which see fewer images."""

FPR = 0.05
"""The share of clean images that detectors may flag."""

LEAST_IMAGES = 40

NEEDED = {"STRIP": 128, "k-distance": 66, "SLOF": 66, "LID": 66, "DAO": 66}
"""Clean images that detectors need to be fitted on, half of them to learn from: 64 overlays, 32 neighbours of each."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """{models} x {detectors, repairs} x {seeds}.

    Args:
        models: names of bundled models, clean ones too.
        detectors: of `DETECTORS`.
        repairs: of `REPAIRS`.
        images: to fit on, to measure on, and for the control: so many of each.
        slow_images: the same, for the detectors of `SLOW`.
        draws: of the images that repairs are fitted on, which their intervals hold.
        seeds: of the images, and of what repairs draw.

    Raises:
        ValueError: nothing to do, an unknown name, something twice, too few images, or a seed out of range.
    """

    models: tuple[str, ...]
    detectors: tuple[str, ...] = tuple(DETECTORS)
    repairs: tuple[str, ...] = tuple(REPAIRS)
    images: int = 1_000
    slow_images: int = 200
    draws: int = 5
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _check("model", self.models, bundled())
        _check("detector", self.detectors, DETECTORS)
        _check("repair", self.repairs, REPAIRS)
        if not (self.models and self.seeds and (self.detectors or self.repairs)):
            raise ValueError("expected models, seeds, and detectors or repairs to measure; received none")
        for seed in self.seeds:
            check_seed(seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"expected each seed once; received {', '.join(map(str, self.seeds))}")
        if self.draws < 2:
            raise ValueError(
                f"expected at least 2 draws of the images to fit on, whose difference intervals hold; received {self.draws}"
            )
        for option, n in (("images", self.images), ("slow images", self.slow_images)):
            if n < LEAST_IMAGES:
                raise ValueError(f"expected at least {LEAST_IMAGES} {option} of each kind; received {n}")

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Every model with every seed."""
        return [(model, seed) for model in self.models for seed in self.seeds]

    def images_of(self, detector: str) -> int:
        return min(self.images, self.slow_images) if detector in SLOW else self.images

    def check_enough(self) -> None:
        """Raises ValueError where a detector would not have images enough to be fitted on."""
        for detector in self.detectors:
            given, needed = self.images_of(detector), NEEDED.get(detector, 0)
            if given < needed:
                option = "--slow and --images" if detector in SLOW else "--images"
                raise ValueError(
                    f"expected at least {needed} images to fit {detector} on, half of them to learn from; received {given}; "
                    f"raise {option}, or choose --detectors without it"
                )

    def config(self, seed: int) -> dict[str, Any]:
        """All that a run depends on beside the model's weights."""
        return {
            "schema": SCHEMA,
            "detectors": list(self.detectors),
            "repairs": list(self.repairs),
            "images": self.images,
            "slow_images": min(self.images, self.slow_images),
            "draws": self.draws,
            "fpr": FPR,
            "seed": seed,
        }


def default_models(base: str = "shapes") -> tuple[str, ...]:
    """The clean model and all of its twins."""
    return tuple(name for name in bundled() if base_of(name) == base)


def base_of(model: str) -> str:
    """The clean model that a model was made from; a clean one's is itself."""
    facts = card(model)
    return facts["training"]["base"] if facts["backdoor"] else model


def _check(kind: str, given: tuple[str, ...], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"expected a {kind} among {', '.join(known)}; received {unknown[0]!r}")
    if twice := [name for name in set(given) if given.count(name) > 1]:
        raise ValueError(f"expected each {kind} once; received {twice[0]!r} {given.count(twice[0])} times")
