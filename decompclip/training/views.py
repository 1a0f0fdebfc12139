"""A second view of each image and each text, for CleanCLIP's self-supervised loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SHIFT = 0.125
"""Largest shift of a view, as a share of the image's side."""

JITTER = 0.3
"""Largest change of contrast and of each channel's gain."""

EDIT = 0.1
"""Share of a text's words that each of the text edits touches, at least one."""


def image_view(images: Float[Tensor, "batch 3 h w"], *, seed: int) -> Float[Tensor, "batch 3 h w"]:
    """Flip half, shift with reflected borders, zoom a little, change contrast and colour.

    A small local trigger is moved and recoloured by this, hence tied less to its caption.
    """
    g = torch.Generator().manual_seed(seed)
    n, device = len(images), images.device
    draw = torch.rand(n, 8, generator=g)
    signed = 2 * draw - 1
    theta = torch.zeros(n, 2, 3)
    zoom = 1 - SHIFT * draw[:, 0]
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(draw[:, 1] < 0.5, -zoom, zoom), zoom
    theta[:, :, 2] = SHIFT * signed[:, 2:4]
    grid = F.affine_grid(theta.to(device, images.dtype), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = (1 + JITTER * signed[:, 4:7]).to(device, images.dtype)[:, :, None, None]
    contrast = (1 + JITTER * signed[:, 7]).to(device, images.dtype)[:, None, None, None]
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    return ((moved - mean) * contrast + mean * gain).clamp(0, 1)


def text_view(text: str, *, seed: int, synonyms: Mapping[str, Sequence[str]] | None = None) -> str:
    """One of the four easy data augmentations (Wei and Zou 2019), drawn at random: synonym replacement, insertion of
    a synonym, swap, deletion.

    Args:
        synonyms: other words for a word, in lower case; without any for the text, its two first edits swap or
            delete instead.
    """
    g = np.random.default_rng(seed)
    words = text.split()
    known = [place for place, word in enumerate(words) if (synonyms or {}).get(word.lower())]
    times = max(1, round(EDIT * len(words)))
    kind = int(g.integers(4))
    if kind < 2 and not known:
        kind += 2
    for _ in range(times):
        if kind < 2 and synonyms is not None:
            place = known[int(g.integers(len(known)))]
            others = synonyms[words[place].lower()] if words[place].lower() in synonyms else [words[place]]
            other = str(others[int(g.integers(len(others)))])
            if kind == 0:
                words[place] = other
            else:
                words.insert(int(g.integers(len(words) + 1)), other)
                known = [i for i, word in enumerate(words) if synonyms.get(word.lower())]
        elif len(words) > 1:
            if kind == 2:
                a, b = (int(x) for x in g.choice(len(words), 2, replace=False))
                words[a], words[b] = words[b], words[a]
            else:
                del words[int(g.integers(len(words)))]
    return " ".join(words)


def text_views(
    texts: Sequence[str], *, seed: int, synonyms: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """`text_view` of each, with draws of its own."""
    seeds = np.random.SeedSequence(seed).generate_state(max(1, len(texts)))
    return [text_view(text, seed=int(s), synonyms=synonyms) for text, s in zip(texts, seeds, strict=False)]
