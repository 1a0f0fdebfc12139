"""Attention rollout (Abnar and Zuidema, 2020): the baseline that knows of attention alone.

The patterns of all layers are multiplied, each averaged over its heads and mixed with the identity for the
residual stream. It cannot tell heads apart, nor what they write: beside it, contribution maps show what
that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from decompclip.models.vit import Hook, HookedViT
from decompclip.operators.attention import BATCH, lay_out, pictures_of, tower
from decompclip.operators.batches import Images, image_batches
from decompclip.operators.token_maps import TokenMaps

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP

Fuse = Literal["mean", "max", "min"]


@torch.no_grad()
def rollout(
    model: HookedViT | HookedCLIP,
    images: Images,
    *,
    fuse: Fuse = "mean",
    residual: float = 0.5,
    names: Sequence[str] | None = None,
    pictures: bool = True,
    batch_size: int = BATCH,
) -> TokenMaps:
    """How much of each token flows into the pooled rows; one map an image, which with its prefix sums to one.

    Layers are multiplied as they come: one `[token, token]` an image is held, whatever the depth. Where
    several rows are pooled, they count alike.

    Args:
        fuse: how the heads of a layer become one pattern; rows are normalised again.
        residual: share of a token that stays where it is, in [0, 1].
        names, pictures, batch_size: as `attention_maps`.

    Raises:
        ValueError: an unknown `fuse`, a residual outside [0, 1], no images, or names of another number.
    """
    if fuse not in get_args(Fuse):
        raise ValueError(f"expected fuse of {get_args(Fuse)}; received {fuse!r}")
    if not 0 <= residual <= 1:
        raise ValueError(f"expected a residual in [0, 1], a share; received {residual}")
    visual = tower(model)
    parts = (
        (_flow(model, batch, fuse, residual)[None], pictures_of(model, batch) if pictures else None)
        for batch in image_batches(images, batch_size=batch_size)
    )
    return lay_out(visual.cfg, parts, "rollout", names)


def _flow(
    model: HookedViT | HookedCLIP, images: Tensor, fuse: Fuse, residual: float
) -> Float[Tensor, "batch token"]:
    visual = tower(model)
    flow: Tensor | None = None

    def mix(pattern: Tensor, hook: Any) -> None:
        nonlocal flow
        one = reduce(pattern.float(), "b h q k -> b q k", fuse)
        one = (1 - residual) * one / one.sum(-1, keepdim=True)
        one.diagonal(dim1=-2, dim2=-1).add_(residual)
        flow = one if flow is None else one @ flow

    hooks: list[Hook] = [(f"blocks.{layer}.attn.hook_pattern", mix) for layer in range(visual.cfg.n_layers)]
    with visual.hooks(fwd_hooks=hooks):
        visual(images) if isinstance(model, HookedViT) else model.encode_image(images)
    assert flow is not None
    return flow[:, visual.cfg.pooled_rows].mean(1).cpu()
