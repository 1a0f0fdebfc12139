"""A fingerprint of a tower's weights: which model statistics belong to.

Two numbers a weight matrix: its product with two fixed random vectors, over its own length, and the logarithm of
that length. They stay the same up to rounding when a model is moved or cast, and change with any training.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.models.vit import HookedViT

# Casting to half precision moves a number by up to 5e-3; an epoch of fine-tuning at 1e-6 by more than 1e-1.
TOLERANCE = 1e-2


@torch.no_grad()
def fingerprint(visual: HookedViT) -> Float[Tensor, " weight"]:
    """The numbers of all parameters of the tower, on the CPU, in fp64."""
    draws = torch.Generator().manual_seed(0)
    longest = max(max(len(p), p[0].numel()) for p in visual.parameters())
    left, right = torch.randn(2, longest, generator=draws)
    numbers = []
    for p in visual.parameters():
        flat = p.detach().flatten(1) if p.ndim > 1 else p.detach()[:, None]
        flat = flat if flat.dtype == torch.float64 else flat.float()
        u, v = left[: flat.shape[0]].to(flat), right[: flat.shape[1]].to(flat)
        length = flat.norm().clamp_min(1e-12)
        numbers += [u @ (flat @ v) / length, length.log()]
    return torch.stack(numbers).double().cpu()


def same_model(ours: Float[Tensor, " weight"], theirs: Float[Tensor, " weight"]) -> bool:
    """Whether two fingerprints are of one model, in whatever precision."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE)
