"""Which heads and MLPs say something else than in a reference model, on the same clean images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.audit.scan.result import HeadStatistics
from decompclip.cache.decomposition import Decomposition


def head_statistics(own: Decomposition, other: Decomposition, reference: str) -> HeadStatistics:
    """Compare two models' terms of the same images, component by component.

    Raises:
        ValueError: towers of another shape.
    """
    shapes = [(d.n_layers, d.n_heads, d.d_embed) for d in (own, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"expected a reference of the same shape, (layers, heads, width) {shapes[0]}; received {shapes[1]}; "
            "take a checkpoint of the same architecture"
        )
    heads = torch.stack(
        [_unlike(own.heads[:, layer], other.heads[:, layer]) for layer in range(own.n_layers)]
    )
    return HeadStatistics(heads, _unlike(own.mlps, other.mlps), reference)


def _unlike(
    a: Float[Tensor, "batch *component d_embed"], b: Float[Tensor, "batch *component d_embed"]
) -> Float[Tensor, " *component"]:
    a, b = (terms.double() - terms.double().mean(0) for terms in (a, b))
    spread = a.square().sum((0, -1)) + b.square().sum((0, -1))
    return ((a - b).square().sum((0, -1)) / spread.clamp_min(1e-30)).float()
