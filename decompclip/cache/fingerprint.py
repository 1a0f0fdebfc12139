"""A fingerprint of a tower: which model statistics belong to.

Of each weight (and buffer): its products with fixed random pairs of vectors, over its own length, and the logarithm
of that length; then the configuration, which decides what the weights compute (GELU or QuickGELU), and the
precision. The numbers stay the same up to rounding when a model is moved or cast, and change with any training.
"""

from __future__ import annotations

import json
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.models.vit import HookedViT

PAIRS = 8
"""Products a weight: an edit of one neuron among hundreds, which one product misses in one case of five, is seen."""


@torch.no_grad()
def fingerprint(visual: HookedViT) -> Float[Tensor, " number"]:
    """The numbers of a tower, on the CPU, in fp64."""
    weights = [x.detach() for x in (*visual.parameters(), *visual.buffers()) if x.is_floating_point()]
    matrices = [x.flatten(1) if x.ndim > 1 else x.reshape(-1, 1) for x in weights]
    draws = torch.Generator().manual_seed(0)
    longest = max(max(x.shape) for x in matrices)
    left, right = torch.randn(2, PAIRS, longest, generator=draws)
    numbers = []
    for matrix in matrices:
        x = matrix if matrix.dtype == torch.float64 else matrix.float()
        u, v = left[:, : x.shape[0]].to(x), right[:, : x.shape[1]].to(x)
        length = x.norm().clamp_min(1e-12)
        numbers += [torch.einsum("pm,mk,pk->p", u, x, v) / length, length.log()[None]]
    what = float(crc32(json.dumps(visual.cfg.to_dict(), sort_keys=True).encode()))
    ends = torch.tensor([what, torch.finfo(visual.dtype).eps], dtype=torch.float64)
    return torch.cat([torch.cat(numbers).cpu().double(), ends])


def same_model(ours: Float[Tensor, " number"], theirs: Float[Tensor, " number"]) -> bool:
    """Whether two fingerprints are of one model, in whatever precision."""
    if ours.shape != theirs.shape or ours[-2] != theirs[-2]:
        return False
    # Casting to fp16 moves a number by about its epsilon, 1e-3; sums in another order by 1e-6.
    allowed = max(1e-5, 4 * float(torch.maximum(ours[-1], theirs[-1])))
    return bool((ours[:-2] - theirs[:-2]).abs().max() <= allowed)
