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
        fit: clean images that detectors and repairs are fitted on.
        clean: clean images that they are measured on.
        other: as many more, which take the place of triggered ones in the control.
        labels, other_labels: classes of `clean` and of `other`.
    """

    fit: Float[Tensor, "image 3 h w"]
    clean: Float[Tensor, "image 3 h w"]
    other: Float[Tensor, "image 3 h w"]
    labels: Int[Tensor, " image"]
    other_labels: Int[Tensor, " image"]

    def twins(self, trigger: Trigger, target: int) -> Float[Tensor, "twin 3 h w"]:
        """Triggered copies of the clean images that are not of the target's class."""
        places = (self.labels != target).nonzero()[:, 0]
        return trigger(self.clean[places], FRESH + places)

    def first(self, n: int) -> Samples:
        """The first `n` images of each kind."""
        return Samples(self.fit[:n], self.clean[:n], self.other[:n], self.labels[:n], self.other_labels[:n])


def draw_samples(world: World, *, images: int, seed: int) -> Samples:
    """`images` images of each kind.

    Raises:
        ValueError: a world without a rule, more images than there are, or a seed out of range.
        FileNotFoundError: the photographs of `cifar10` are not there.
    """
    if world.base not in SPLITS:
        raise ValueError(f"expected a world among {', '.join(SPLITS)}; received {world.base!r}")
    check_seed(seed)
    return SPLITS[world.base](world, images, seed)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed whose images to fit on would be another one's to measure on."""
    if not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"expected a seed in 0..{MOST_SEEDS - 1}; received {seed}")


def _drawn(world: World, images: int, seed: int) -> Samples:
    fit = Shapes(images, seed=FIT + seed).draw(range(images)).images
    evaluation = Shapes(2 * images, seed=EVALUATION + seed).draw(range(2 * images))
    return _halves(fit, evaluation.images, evaluation.labels)


def _photographs(world: World, images: int, seed: int) -> Samples:
    """The part of the training photographs that no twin was trained on, and the test part."""
    fit = _some(world.validation(), images, FIT + seed)[0]
    return _halves(fit, *_some(world.report(), 2 * images, EVALUATION + seed))


def _some(source: object, n: int, seed: int) -> tuple[Tensor, Tensor]:
    assert isinstance(source, Pairs)
    if n > len(source):
        raise ValueError(
            f"expected at most {len(source)} images to draw from this part; {n} were asked for; lower --images"
        )
    places = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(source))[:n]
    batch = source.read(places.tolist())
    assert batch.labels is not None
    return batch.images, batch.labels


def _halves(fit: Tensor, images: Tensor, labels: Tensor) -> Samples:
    half = len(images) // 2
    return Samples(
        fit, images[:half], images[half:], torch.as_tensor(labels[:half]), torch.as_tensor(labels[half:])
    )


SPLITS: dict[str, Callable[[World, int, int], Samples]] = {"shapes": _drawn, "cifar10": _photographs}
"""By the clean model's name."""
