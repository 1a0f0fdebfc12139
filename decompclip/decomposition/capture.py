"""decompose: one forward pass that leaves an exact decomposition behind.

Hooks copy what the pooled rows receive (a head's z, an MLP's output, the embedding, the last scale): the tower
runs as it does without them, and nothing of size [batch, token] is kept unless tokens are asked for, or the
weights of the rows are known only at the end (a LayerNorm of every row before the pooling, or an attention
pool). Of such a tower the batch is run in as few parts as the memory at hand allows.

decompose_pool: heads of an attention pool (SigLIP, PE, CoCa), the same feature as a sum over what each of them gathers.
`decompose` follows what blocks' heads and MLPs wrote through the pool; there the pool is a block of its own, the only one:

    R = sum_q sum_n attention[q, n] (v[q, n] - v_0[q]) / s @ W_O[q] P  +  MLP P / s  +  constants

with the values `v` of the normalised rows, `v_0` what they are whatever the image (value bias, and the bias of the last
LayerNorm through W_V), and `s` the scale of CoCa's LayerNorm behind the pool (1 elsewhere).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.decomposition.components import Components, heads as all_heads, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import (
    Convention,
    TermMaps,
    frozen,
    full,
    full_precision,
    pieces,
    room,
    wide,
)
from decompclip.decomposition.terms import AttentionCapture, DecompositionError, Rows, TokenTerms, terms_of
from decompclip.tower.vit import Hook, HookedViT, hooked

# They spare the rounding of the tower's own arithmetic, several times over: unrecorded writes smaller than these
# pass unseen. In bf16 a ViT-B-32 misses by about 9e-3.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def decompose(
    visual: HookedViT,
    images: Float[Tensor, "batch 3 h w"],
    *,
    convention: Convention = "centred",
    normalize: bool = False,
    tokens: Components | bool | None = None,
    tolerance: float | None = None,
) -> Decomposition:
    """Terms of every component, for a batch of images. No gradient is kept.

    Under active hooks (`visual.hooks(...)`) the edited run is decomposed. Terms are in fp32 at least.

    Args:
        visual: the tower.
        images: as the tower takes them.
        convention: "centred": each term past its own mean, constants apart; "paper": He et al.'s code, which
            shares mean and bias out among the terms.
        normalize: divide all terms by the length of the feature, so that they sum to the unit feature.
        tokens: heads whose tokens to keep, for `Decomposition.tokens`; True for all.
        tolerance: largest `sum_error` allowed; default by the dtype that the tower runs in (1e-4 in fp32).

    Raises:
        DecompositionError: the terms miss the feature: a hook wrote to the stream past the components.
        TypeError: `tokens` is neither heads nor a truth value.
        IndexError: `tokens` names a layer or head that the tower does not have.
        ValueError: images of another size, or an unknown convention.
    """
    kept = _kept(visual, tokens)
    if tolerance is None:
        tolerance = TOLERANCE[dtype_of(visual)]
    # Others' hooks may hold something for each image of the batch: it must stay whole.
    free = not any(hooked(module) for module in visual.modules())
    held = _held(visual, images, kept) if free and images.ndim == 4 else 0
    slices = pieces(len(images), held, room(visual.device)) if held else ()
    parts = [images[piece] for piece in slices] or [images]
    return Decomposition.cat(
        [_decompose(visual, part, convention, normalize, kept, tolerance) for part in parts]
    )


def _decompose(
    visual: HookedViT,
    images: Tensor,
    convention: Convention,
    normalize: bool,
    kept: Bool[Tensor, "layer head"] | None,
    tolerance: float,
) -> Decomposition:
    attention = None if kept is None else AttentionCapture(visual, kept)
    rows = Rows(visual, with_mean=convention == "paper")
    # Hooks that others set in the last block may read any token there; ours read the pooled row alone.
    alone = not visual.last_block_hooked
    hooks: list[Hook] = rows.hooks() + (attention.hooks() if attention else [])
    with visual.hooks(fwd_hooks=hooks):
        feature = wide(visual(images, pooled_rows=alone))
    with full_precision(feature):
        return _exact(visual, rows, attention, feature, convention, normalize, tolerance)


def _exact(
    visual: HookedViT,
    rows: Rows,
    attention: AttentionCapture | None,
    feature: Float[Tensor, "batch d_embed"],
    convention: Convention,
    normalize: bool,
    tolerance: float,
) -> Decomposition:
    """The decomposition of what was seen."""
    fixed = frozen(visual, convention)
    rows.length = feature.norm(dim=-1) if normalize else None
    terms = terms_of(fixed, rows, convention)
    of_images: dict[str, Any] = terms.of_images
    target = feature if rows.length is None else feature / rows.length[:, None]
    d = Decomposition(**of_images, maps=fixed.maps, normalized=normalize, target=target)
    _check_sum(
        d,
        tolerance,
        "decompose",
        "the stream where no term records it (hook_result, hook_attn_out, hook_resid_*, ln_final.hook_normalized); edit "
        "hook_z, hook_mlp_out or hook_ln_pre",
    )
    if attention is None:
        return d
    return replace(d, token_terms=attention.terms(fixed, rows, terms.z, convention, tolerance))


def _check_sum(d: Decomposition, tolerance: float, function: str, unrecorded: str) -> None:
    """Raises DecompositionError where terms miss their feature: `unrecorded` says which hooks may do so, and what to edit."""
    if d.sum_error <= tolerance:
        return
    assert d.target is not None
    if not d.target.isfinite().all():
        raise DecompositionError(
            "expected finite features; received infinite ones or nan from the tower; check the images, and run "
            "the model in float32"
        )
    raise DecompositionError(
        f"expected terms that sum to the feature within {tolerance:.1e} of its largest entry; received a miss "
        f"of {d.sum_error:.1e}: a hook edits {unrecorded}, or call "
        f"`decompclip.decomposition.capture.{function}(model.visual, images, tolerance=...)`"
    )


def _held(visual: HookedViT, images: Tensor, kept: Bool[Tensor, "layer head"] | None) -> int:
    """How many bytes an image holds until the run ends; the result is not counted."""
    cfg, heads = visual.cfg, 0 if kept is None else sum(kept.flatten().tolist())
    rows = len(range(cfg.n_tokens)[cfg.pooled_rows]) if Rows.all_rows(cfg) else 0
    writes = (2 * cfg.n_layers + 1) * cfg.d_model * rows * dtype_of(visual).itemsize
    return writes + AttentionCapture.held(cfg, heads) * full(images.dtype).itemsize


def dtype_of(visual: HookedViT) -> torch.dtype:
    """What the tower computes in: its weights' type, or autocast's."""
    kind = visual.device.type
    if visual.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return visual.dtype


def _kept(visual: HookedViT, tokens: Components | bool | None) -> Bool[Tensor, "layer head"] | None:
    if tokens is None or tokens is False:
        return None
    chosen = all_heads if tokens is True else tokens
    if not isinstance(chosen, Components):
        raise TypeError(f"expected tokens=True, or heads such as heads[-1]; received {tokens!r}")
    kept = resolve(chosen, visual).heads
    if not any(kept.flatten().tolist()):
        raise TypeError(
            f"expected tokens=True, or heads such as heads[-1]; received {tokens!r}, which names none"
        )
    return kept


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
        DecompositionError: the terms miss the feature: a hook edits what no term records; or it is not finite.
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
    whole = frozen(visual, "centred")
    read = whole.read
    assert read.out is not None
    with full_precision(feature):
        count = feature.new_ones(len(feature))  # how often a constant counts, image by image
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
        mark = whole.maps.fingerprint
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
        _check_sum(
            d,
            TOLERANCE[dtype_of(visual)] if tolerance is None else tolerance,
            "decompose_pool",
            "what no term records (hook_attn_out of the pool, ln_final.hook_normalized); edit pool.hook_z or hook_mlp_out",
        )
    return d
