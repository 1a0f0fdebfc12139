"""decompose: one forward pass that leaves an exact decomposition behind.

Hooks copy what the pooled row receives (a head's z, an MLP's output, the embedding, the last scale): the
tower runs as it does without them, and nothing of size [batch, token] is kept unless tokens are asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.cache.components import Components
from decompclip.cache.components import heads as all_heads
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention, blocks, final_map, term_maps, wide
from decompclip.cache.token_terms import AttentionCapture, DecompositionError
from decompclip.models.vit import Hook, HookedViT

# The least that catches an unrecorded write and spares the rounding of the tower's own arithmetic.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


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
        convention: "centred": each term past its own mean, constants apart; "paper": He et al.'s code, which
            shares mean and bias out among the terms.
        normalize: divide all terms by the length of the feature, so that they sum to the unit feature.
        tokens: heads whose tokens to keep, for `Decomposition.tokens`; True for all.
        tolerance: largest `sum_error` allowed; default by the tower's dtype (1e-4 in fp32).

    Raises:
        DecompositionError: the terms miss the feature: a hook wrote to the stream past the components.
        TypeError: `tokens` is neither heads nor a truth value.
        IndexError: `tokens` names a layer or head that the tower does not have.
        ValueError: images of another size, or an unknown convention.
    """
    maps = term_maps(visual, convention)
    if tolerance is None:
        tolerance = TOLERANCE[visual.proj.dtype]
    attention = _attention(visual, tokens)
    rows: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        # A copy: a view of the row would keep every token's activation alive.
        rows[hook.name] = wide(x[:, 0]).clone()

    # Hooks that others set in the last block may read any token there; ours read the pooled row alone.
    free = not any(point.has_hooks() for point in visual._last_block_hooks)
    hooks: list[Hook] = [(name, keep) for name in _names(visual)]
    with visual.hooks(fwd_hooks=hooks + (attention.hooks() if attention else [])):
        feature = wide(visual(images, pooled_rows=free))
    if not feature.isfinite().all():
        raise DecompositionError(
            "expected finite features; received infinite ones or nan from the tower; check the images, and run "
            "the model in float32"
        )
    length = feature.norm(dim=-1, keepdim=True) if normalize else torch.ones_like(feature[:, :1])
    terms = _terms(visual, rows, length, convention)
    d = Decomposition(*terms, maps=maps, normalized=normalize, target=feature / length)
    if not d.sum_error <= tolerance:
        raise DecompositionError(
            f"expected terms that sum to the feature within {tolerance:.1e} of its largest entry; received a miss "
            f"of {d.sum_error:.1e}: a hook edits the stream where no term records it (hook_result, "
            "hook_attn_out, hook_resid_*, ln_final.hook_normalized); edit hook_z, hook_mlp_out or hook_ln_pre, "
            "or pass tolerance="
        )
    if attention is None:
        return d
    scale = 1 / (rows["ln_final.hook_scale"] * length)[:, 0]
    return replace(d, token_terms=attention.terms(scale, convention, tolerance))


def _attention(visual: HookedViT, tokens: Components | bool | None) -> AttentionCapture | None:
    if tokens is None or tokens is False:
        return None
    chosen = all_heads if tokens is True else tokens
    if not isinstance(chosen, Components):
        raise TypeError(f"expected tokens=True, or heads such as heads[-1]; received {tokens!r}")
    kept: Bool[Tensor, "layer head"] = chosen.resolve(visual.cfg.n_layers, visual.cfg.n_heads).heads
    return AttentionCapture(visual, kept) if kept.any() else None


def _names(visual: HookedViT) -> list[str]:
    """Hook points whose first row makes up the feature."""
    last = visual.cfg.n_layers - 1
    each = [f"blocks.{layer}.{name}" for name in ("attn.hook_z", "hook_mlp_out") for layer in range(last + 1)]
    return ["blocks.0.hook_resid_pre", *each, f"blocks.{last}.hook_resid_post", "ln_final.hook_scale"]


def _terms(
    visual: HookedViT, rows: dict[str, Tensor], length: Float[Tensor, "batch 1"], convention: Convention
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates, MLPs, embedding and bias coordinates (formulas: `decompclip.cache.maps`)."""
    embed, *of_layers, stream, sigma = (rows[name] for name in _names(visual))
    z = torch.stack(of_layers[: visual.cfg.n_layers], dim=1)
    mlps = torch.stack(of_layers[visual.cfg.n_layers :], dim=1)
    final = final_map(visual, convention)
    scale, one = 1 / (sigma * length), 1 / length
    mlps, embed = (mlps * scale[..., None]) @ final, (embed * scale) @ final
    if convention == "centred":
        coords = (z - torch.stack([wide(block.attn.b_V) for block in blocks(visual)])) * scale[
            ..., None, None
        ]
        bias_coords = torch.cat([scale.expand(-1, visual.cfg.n_layers), one], dim=1)
        return coords, mlps, embed, bias_coords
    mean = stream.mean(-1, keepdim=True) * scale
    beta = wide(visual.ln_final.b) @ wide(visual.proj)
    share = (beta * one - mean * final.sum(0)) / (2 * visual.cfg.n_layers + 1)
    constants = torch.cat([scale, mean, one], dim=1)[:, None, None].expand(-1, *z.shape[1:3], -1)
    coords = torch.cat([z * scale[..., None, None], constants], dim=-1)
    return coords, mlps + share[:, None], embed + share, scale.new_empty(len(scale), 0)
