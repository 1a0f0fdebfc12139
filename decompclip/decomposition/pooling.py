"""Heads of an attention pool (SigLIP, PE, CoCa): the same feature as a sum over what each of them gathers.

`decompose` follows what blocks' heads and MLPs wrote through the pool. Here the pool is a block of its own, the only one:

    R = sum_q sum_n attention[q, n] (v[q, n] - v_0[q]) / s @ W_O[q] P  +  MLP P / s  +  constants

with the values `v` of the normalised rows, `v_0` what they are whatever the image (value bias, and the bias of the last
LayerNorm through W_V), and `s` the scale of CoCa's LayerNorm behind the pool (1 elsewhere).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.decomposition.capture import TOLERANCE, DecompositionError, dtype_of
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import TermMaps, frozen, full_precision, wide
from decompclip.decomposition.terms import TokenTerms
from decompclip.tower.vit import HookedViT


@torch.no_grad()
def decompose_pool(
    visual: HookedViT,
    images: Float[Tensor, "batch 3 h w"],
    *,
    normalize: bool = False,
    tokens: bool = False,
    tolerance: float | None = None,
) -> Decomposition:
    """Terms of the heads of an attention pool, as the heads of one layer, `heads[0, q]`; its MLP is `mlps[0]`.

    All that takes a decomposition takes this one: `attribute`, `nearest`, `contribution_maps(d, texts)`, `textspans`.

    Args:
        visual: a tower that pools by attention.
        images: as the tower takes them.
        normalize: divide all terms by the length of the feature.
        tokens: keep what each token brings, for `Decomposition.tokens`.
        tolerance: largest `sum_error` allowed; default by the dtype that the tower runs in.

    Returns:
        Terms that sum to the features; that of the embedding is zero, and so is the MLP's where the pool has none.

    Raises:
        DecompositionError: the terms miss the feature: a hook edits what no term records.
        ValueError: the tower pools otherwise, or images of another size.
    """
    pool = visual.pool
    if pool is None:
        raise ValueError(
            f"expected a tower that pools by attention, such as SigLIP's or PE's; received one with pool={visual.cfg.pool!r}; "
            "decompose it: its heads are those of its blocks"
        )
    names = ["pool.hook_z"] + ["pool.hook_mlp_out"] * (pool.mlp is not None)
    names += ["pool.ln_post.hook_scale"] * (pool.ln_post is not None)
    names += ["pool.hook_pattern", "pool.hook_v"] * tokens
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name.removeprefix("pool.")] = wide(x)

    with visual.hooks(fwd_hooks=[(name, keep) for name in names]):
        feature = wide(visual(images))
    read = frozen(visual, "centred").read
    assert read.out is not None
    with full_precision(feature):
        count = torch.ones_like(feature[:, 0])  # how often a constant counts, image by image
        length = feature.norm(dim=-1) if normalize else count
        scale = count / length
        scaled = scale / seen["ln_post.hook_scale"].flatten() if pool.ln_post is not None else scale
        fixed = torch.einsum("d,qde->qe", wide(visual.ln_final.b), wide(pool.W_V)) + wide(pool.b_V)
        coords = (seen["hook_z"][:, 0] - fixed) * scaled[:, None, None]
        mlp = torch.zeros_like(feature)
        if pool.mlp is not None:
            written = seen["hook_mlp_out"][:, 0]
            mlp = (written if visual.proj is None else written @ wide(visual.proj)) * scale[:, None]
        bias = torch.stack(list(read.constants.values()))
        counts = [scaled if name in read.scaled else scale for name in read.constants]
        mark = frozen(visual, "centred").maps.fingerprint
        maps = TermMaps(read.out[None], bias, tuple(read.constants), "centred", fingerprint=mark)
        held = None
        if tokens:
            held = TokenTerms(
                kept=torch.ones(1, pool.n_heads, dtype=torch.bool),
                attention=seen["hook_pattern"],
                values=seen["hook_v"].transpose(1, 2) - fixed[:, None],
                scale=scaled[:, None, None].expand(-1, pool.n_heads, 1),
                image_size=visual.cfg.image_size,
                patch_size=visual.cfg.patch_size,
            )
        d = Decomposition(
            coords=coords[:, None],
            mlps=mlp[:, None],
            embed=torch.zeros_like(feature),
            bias_coords=torch.stack(counts, dim=1),
            maps=maps,
            normalized=normalize,
            target=feature / length[:, None],
            token_terms=held,
        )
        if not d.sum_error <= (TOLERANCE[dtype_of(visual)] if tolerance is None else tolerance):
            raise DecompositionError(
                f"expected terms of the pool that sum to the feature; received a miss of {d.sum_error:.1e}: a hook edits what no "
                "term records (hook_attn_out of the pool, ln_final.hook_normalized); edit pool.hook_z or hook_mlp_out, or "
                "pass tolerance="
            )
    return d
