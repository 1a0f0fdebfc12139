"""What a leaderboard measures: repairs by name, images to fit and to measure on, and the plan of runs, checked before any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.attacks.trigger import Extent, Trigger
from decompclip.data.pairs import Pairs, permuted
from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.decomposition.moments import Moments
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.decomp import DecompRep, fixed_heads, random_heads
from decompclip.defenses.detectors import DETECTORS
from decompclip.models.bundled import bundled, card
from decompclip.operators.ablation import MeanAblate
from decompclip.zoo.recipes import World

Edit = Callable[[Decomposition], Decomposition]


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What a repair is fitted on.

    Attributes:
        clean: terms of unit features, in the repair's convention.
        classifier: of the zero-shot classes.
        extent: of the model's own trigger, the hint of the paper's repair; None for a clean model.
        seed: of what a repair draws.
    """

    clean: Decomposition
    classifier: Float[Tensor, "class d_embed"]
    extent: Extent | None
    seed: int


@dataclass(frozen=True)
class RepairRecipe:
    """How a repair is fitted, and the convention of terms that it reads."""

    fit: Callable[[FitInputs], Edit]
    convention: Convention = "centred"


def _paper(inputs: FitInputs) -> Edit:
    return DecompRep.paper(trigger=inputs.extent or "local").fit(inputs.clean)


def _misled(inputs: FitInputs) -> Edit:
    other: Extent = "local" if inputs.extent == "global" else "global"
    return _paper(replace(inputs, extent=other))


def _judged(inputs: FitInputs) -> DecompRep:
    return DecompRep(similarity="cosine", threshold="quantile").fit(inputs.clean)


def _random_heads(inputs: FitInputs) -> Edit:
    repair = _judged(inputs)
    selector, edit = repair.selector_, MeanAblate(heads[-1], repair.selector_.moments_)
    return lambda d: edit.on(random_heads(repair.flags(d), selector.mask_, seed=inputs.seed))(d)


def _fixed_heads(inputs: FitInputs) -> Edit:
    """In every image, as many heads as images have flagged on average; those that clean images flag most often."""
    repair = _judged(inputs)
    edit, clean = MeanAblate(heads[-1], repair.selector_.moments_), repair.flags(inputs.clean)
    ever = int(clean.any(0).sum())

    def apply(d: Decomposition) -> Decomposition:
        count = min(ever, round(float(repair.flags(d).sum((1, 2)).float().mean())))
        if not count:
            return d
        return edit.on(fixed_heads(clean, count).expand(len(d), -1, -1))(d)

    return apply


REPAIRS: dict[str, RepairRecipe] = {
    "none": RepairRecipe(lambda inputs: lambda d: d),
    "Decomp-Rep (paper, right hint)": RepairRecipe(_paper, "paper"),
    "Decomp-Rep (paper, wrong hint)": RepairRecipe(_misled, "paper"),
    "Decomp-Rep (cosine, quantile)": RepairRecipe(_judged),
    "random heads": RepairRecipe(_random_heads),
    "fixed heads": RepairRecipe(_fixed_heads),
    "last 5 MLPs": RepairRecipe(lambda inputs: MeanAblate(mlps[-5:], Moments.of(inputs.clean, second=False))),
    "agnostic": RepairRecipe(lambda inputs: AgnosticRep(inputs.classifier, budget=0.01).fit(inputs.clean)),
}
"""Adding a repair is adding a line. Without a hint, on a clean model, the paper's takes "local" for right."""


FIT, EVALUATION = 9_101, 9_201
"""First seeds of the streams, one for each seed of a run. No twin was trained on them, and no choice made."""

MOST_SEEDS = EVALUATION - FIT

FRESH = 2**40
"""Places of triggered images start here, so that what a trigger draws anew was in no training image."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What one run sees.

    Attributes:
        fits: clean images that detectors (on the first) and repairs (on each in turn) are fitted on.
        clean: clean images that they are measured on.
        other: as many more, which take the place of triggered ones in the control.
        labels: classes of `clean`.
        other_labels: classes of `other`.
    """

    fits: tuple[Float[Tensor, "image 3 h w"], ...]
    clean: Float[Tensor, "image 3 h w"]
    other: Float[Tensor, "image 3 h w"]
    labels: Int[Tensor, " image"]
    other_labels: Int[Tensor, " image"]

    @property
    def fit(self) -> Float[Tensor, "image 3 h w"]:
        """The first of `fits`."""
        return self.fits[0]

    def triggered(self, trigger: Trigger, target: int) -> Float[Tensor, "triggered 3 h w"]:
        """Triggered copies of the clean images that are not of the target's class."""
        places = (self.labels != target).nonzero()[:, 0]
        return trigger(self.clean[places], FRESH + places)

    def first(self, n: int) -> Samples:
        """The first `n` images of each kind."""
        fits = tuple(fit[:n] for fit in self.fits)
        return Samples(fits, self.clean[:n], self.other[:n], self.labels[:n], self.other_labels[:n])


def draw_samples(world: World, *, images: int, seed: int, draws: int = 1) -> Samples:
    """`images` images of each kind, to fit on `draws` times as many: no image serves in two draws.

    Raises:
        ValueError: a world without a rule, more images than there are, or a seed out of range.
        FileNotFoundError: the photographs of `cifar10` are not there.
    """
    if world.base not in SPLITS:
        raise ValueError(f"expected a world among {', '.join(SPLITS)}; received {world.base!r}")
    check_seed(seed)
    return SPLITS[world.base](world, images, seed, draws)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed whose images to fit on would be another one's to measure on."""
    if not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"expected a seed in 0..{MOST_SEEDS - 1}; received {seed}")


def _drawn(world: World, images: int, seed: int, draws: int) -> Samples:
    fit = Shapes(draws * images, seed=FIT + seed).draw(range(draws * images)).images
    evaluation = Shapes(2 * images, seed=EVALUATION + seed).draw(range(2 * images))
    return _halves(fit.split(images), evaluation.images, evaluation.labels)


def _photographs(world: World, images: int, seed: int, draws: int) -> Samples:
    """To fit on: the training photographs that no twin was trained on, then what is left of the test part."""
    known, report = world.validation(), world.report()
    assert isinstance(known, Pairs) and isinstance(report, Pairs)
    order = permuted(len(report), EVALUATION + seed).tolist()
    own = permuted(len(known), FIT + seed).tolist()
    left = len(known) + max(0, len(report) - 2 * images)
    if 2 * images > len(report) or draws * images > left:
        raise ValueError(
            f"expected at most {len(report) // 2} images of each kind, {draws} times as many of them to fit on among {left} "
            f"photographs; {images} were asked for; lower --count or --draws"
        )
    parts = [_read(known, own[: draws * images])[0]]
    if draws * images > len(known):
        parts.append(_read(report, order[2 * images : (2 + draws) * images - len(known)])[0])
    return _halves(torch.cat(parts).split(images), *_read(report, order[: 2 * images]))


def _read(source: Pairs, places: list[int]) -> tuple[Tensor, Tensor]:
    batch = source.read(places)
    assert batch.labels is not None
    return batch.images, batch.labels


def _halves(fits: tuple[Tensor, ...], images: Tensor, labels: Tensor) -> Samples:
    half = len(images) // 2
    return Samples(
        fits, images[:half], images[half:], torch.as_tensor(labels[:half]), torch.as_tensor(labels[half:])
    )


SPLITS: dict[str, Callable[[World, int, int, int], Samples]] = {
    "shapes": _drawn,
    "cifar10": _photographs,
    "photos": _photographs,
}
"""By the clean model's name."""


SCHEMA = 2
"""Of a run's JSON: raised when a field changes its meaning, so that old runs are measured again."""

SLOW = ("STRIP", "TeCo")
"""Detectors of dozens of forward passes an image, which see fewer images."""

FPR = 0.05
"""The share of clean images that detectors may flag."""

LEAST_IMAGES = 40

NEEDED = {"STRIP": 128, "k-distance": 66, "SLOF": 66, "LID": 66, "DAO": 66, "token": 100}
"""Clean images that detectors need to be fitted on, half of them to learn from: 64 overlays, 32 neighbours of each, 50 images."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """{models} x {detectors, repairs} x {seeds}.

    Args:
        models: names of bundled models, clean ones too.
        detectors: of `DETECTORS`.
        repairs: of `REPAIRS`.
        images: how many to fit on; as many to measure on, and for the control.
        slow_images: the same, for the detectors of `SLOW`.
        draws: sets of images that each repair is fitted on; the spread between them is in its intervals.
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
                f"expected at least 2 draws of the images to fit on, for intervals show the spread between them; received {self.draws}"
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
                option = "--slow and --count" if detector in SLOW else "--count"
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


def default_models() -> tuple[str, ...]:
    """The clean model `shapes` and all of its twins."""
    return tuple(name for name in bundled() if base_of(name) == "shapes")


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
