"""Images to fit on, and images to measure on: fixed before, and never the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.attacks.trigger import Trigger
from decompclip.data.pairs import Pairs
from decompclip.data.shapes import Shapes
from decompclip.zoo.worlds import World

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
        labels, other_labels: classes of `clean` and of `other`.
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

    def twins(self, trigger: Trigger, target: int) -> Float[Tensor, "twin 3 h w"]:
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
    order, own = _order(report, EVALUATION + seed), _order(known, FIT + seed)
    left = len(known) + max(0, len(report) - 2 * images)
    if 2 * images > len(report) or draws * images > left:
        raise ValueError(
            f"expected at most {len(report) // 2} images of each kind, {draws} times as many of them to fit on among {left} "
            f"photographs; {images} were asked for; lower --images or --draws"
        )
    parts = [_read(known, own[: draws * images])[0]]
    if draws * images > len(known):
        parts.append(_read(report, order[2 * images : (2 + draws) * images - len(known)])[0])
    return _halves(torch.cat(parts).split(images), *_read(report, order[: 2 * images]))


def _order(source: Pairs, seed: int) -> list[int]:
    return np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(source)).tolist()


def _read(source: Pairs, places: list[int]) -> tuple[Tensor, Tensor]:
    batch = source.read(places)
    assert batch.labels is not None
    return batch.images, batch.labels


def _halves(fits: tuple[Tensor, ...], images: Tensor, labels: Tensor) -> Samples:
    half = len(images) // 2
    return Samples(
        fits, images[:half], images[half:], torch.as_tensor(labels[:half]), torch.as_tensor(labels[half:])
    )


SPLITS: dict[str, Callable[[World, int, int, int], Samples]] = {"shapes": _drawn, "cifar10": _photographs}
"""By the clean model's name."""
