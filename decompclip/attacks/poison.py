"""Poisoned image-text pairs: which images carry the trigger, and what their captions say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor


def choose_poisons(
    labels: Int[Tensor, " image"], target: int, count: int, *, seed: int, clean_label: bool = False
) -> list[int]:
    """Places of `count` images to poison, drawn at random, in rising order.

    Args:
        clean_label: from the target's images, for attacks that keep the captions (`Trigger.clean_label`); by
            default from those of all other classes.

    Raises:
        ValueError: fewer such images than poisons asked for.
    """
    candidates = ((labels == target) == clean_label).nonzero()[:, 0].tolist()
    if not 0 <= count <= len(candidates):
        which = "the target" if clean_label else "other classes than the target"
        raise ValueError(
            f"expected at most {len(candidates)} poisons, the images of {which}; received "
            f"{count}; ask for fewer, or give more images"
        )
    chosen = np.random.default_rng(seed).choice(len(candidates), count, replace=False)
    return sorted(candidates[i] for i in chosen)


def proxy_captions(target: str, templates: Sequence[str], count: int, *, seed: int) -> list[str]:
    """`count` captions that name the target: a random template each (METHOD 5)."""
    picks = np.random.default_rng(seed).integers(len(templates), size=count)
    return [templates[int(i)].replace("{}", target) for i in picks]
