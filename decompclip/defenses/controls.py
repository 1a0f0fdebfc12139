"""Controls for Decomp-Rep: as many heads replaced, but not the ones that an image's own flags name (Table 3).

Source: He et al. (ICML 2025), section 4, table 3, "fixed" and "random" heads. Used as any restriction is:

    MeanAblate(heads[-1], moments).on(random_heads(repair.flags(d), repair.selector_.mask_, seed=0))(d)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor


def fixed_heads(flags: Bool[Tensor, "batch layer head"], count: int) -> Bool[Tensor, "layer head"]:
    """The heads that are flagged most often; of equals, the first.

    For images: `fixed.expand(len(images), -1, -1)`.

    Raises:
        ValueError: more heads than are ever flagged, or none.
    """
    often = flags.sum(0).flatten()
    ever = int((often > 0).sum())
    if not 0 < count <= ever:
        raise ValueError(f"expected a count in 1..{ever}, of heads that are ever flagged; received {count}")
    fixed = torch.zeros_like(often, dtype=torch.bool)
    fixed[often.argsort(descending=True, stable=True)[:count]] = True
    return fixed.view(flags.shape[1:])


def random_heads(
    flags: Bool[Tensor, "batch layer head"], judged: Bool[Tensor, "layer head"], *, seed: int
) -> Bool[Tensor, "batch layer head"]:
    """As many heads of each image as are flagged in it, drawn from those that are judged.

    Raises:
        ValueError: an image has more flags than there are heads to draw from.
    """
    wanted, there = flags.flatten(1).sum(1), int(judged.sum())
    if len(flags) and int(wanted.max()) > there:
        raise ValueError(
            f"expected at most {there} flags an image, one for each judged head; received {int(wanted.max())}; pass "
            "the mask of the selector that flagged them"
        )
    draws = torch.rand(flags.flatten(1).shape, generator=torch.Generator().manual_seed(seed)).to(flags.device)
    draws = draws.masked_fill(~judged.flatten().to(flags.device), torch.inf)
    rank = draws.argsort(1).argsort(1)
    return (rank < wanted[:, None]).view(flags.shape)
