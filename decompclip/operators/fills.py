"""Fills: what stands in for components, and how it is written into terms or into the stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.cache.components import Components
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.masks import ComponentMask
from decompclip.models.config import ViTConfig
from decompclip.models.vit import Hook, HookedViT
from decompclip.operators.intervention import Chosen, Where

Named = Literal["all", "pooled", "patches"]
Rows = Named | tuple[int, ...] | Bool[Tensor, "*batch token"]
"""Which tokens a causal edit reaches: by name, by number, or by a mask `[token]` or `[batch token]`."""

POOL_OUT = "pool.hook_mlp_out"


@dataclass(frozen=True, eq=False)
class Fill:
    """What stands in for heads, MLPs, the embedding and the pool's MLP: of terms (direct) or of the stream (causal).

    Axes of terms: `[*batch layer head coord]`, `[*batch layer d_embed]`, `[*batch d_embed]` for the embedding, and
    `[*batch pool d_embed]`. Of the stream: `[layer *batch token head d_head]`, `[layer *batch token d_model]`,
    `[*batch token d_model]` and `[*batch row d_pool]`, where a token axis of length 1 serves for all (only the layers
    that are edited need be there). None: unknown.
    """

    heads: Float[Tensor, "*heads"] | Mapping[int, Tensor]
    mlps: Float[Tensor, "*mlps"] | Mapping[int, Tensor]
    embed: Float[Tensor, "*embed"]
    pool: Float[Tensor, "*pool"] | None = None


def resolve(components: Components, of: Decomposition | HookedViT) -> ComponentMask:
    """The mask of an expression over what a decomposition or a tower has, neurons aside.

    Raises:
        IndexError: it names a component that is not there.
        ValueError: it names neurons.
    """
    if isinstance(of, Decomposition):
        mask = components.resolve(of.n_layers, of.n_heads, pool=has_pool(of))
    else:
        mask = components.resolve(of.cfg.n_layers, of.cfg.n_heads, pool=has_pool(of))
    if mask.neurons is not None:
        raise ValueError(
            f"expected heads, MLPs, embed or pool; received {components!r}, which names neurons; edit those with "
            "AblateNeurons, and compose the two with | (their means: AblateNeurons(..., fill=mean_neurons(...)))"
        )
    return mask


def has_pool(of: Decomposition | HookedViT) -> bool:
    """Whether the tower's attention pooling has an MLP of its own."""
    return bool(of.pool.shape[1]) if isinstance(of, Decomposition) else bool(of.cfg.pool_mlp)


def edit_terms(d: Decomposition, mask: ComponentMask, fill: Fill, where: Where | None) -> Decomposition:
    """Terms of `d` replaced where `mask` and `where` say so.

    Raises:
        ValueError: `where` is no mask of this batch.
    """
    chosen = Chosen.of(mask, where, len(d))
    edited: dict[str, Tensor] = {}

    def replace(name: str, at: Tensor, new: object, trailing: int) -> None:
        old = getattr(d, name)
        if at.any():
            assert isinstance(new, Tensor)
            at = at.to(old.device)[(..., *[None] * trailing)]
            edited[name] = torch.where(at, new.to(old), old)

    replace("coords", chosen.heads, fill.heads, 1)
    replace("mlps", chosen.mlps, fill.mlps, 1)
    replace("embed", chosen.embed, fill.embed, 1)
    if chosen.pool.any():
        replace("pool", chosen.pool, fill.pool, 2)
    return d.edit(**edited)


def edit_stream(
    visual: HookedViT, mask: ComponentMask, fill: Fill, *, rows: Rows, where: Where | None
) -> list[Hook]:
    """Hooks that replace z, MLP outputs, the input of block 0 and the pool's MLP at the chosen tokens."""
    tokens = token_mask(rows, visual.cfg)
    pooled = visual.cfg.pooled_rows
    hooks: list[Hook] = []

    def add(name: str, new: Tensor, part: Any, *, everywhere: bool = False) -> None:
        """`part`: what is chosen at this hook point, `[batch]` or `[batch head]`."""

        def write(x: Tensor, hook: Any) -> Tensor:
            at = part(Chosen.of(mask, where, len(x))).to(x.device)[:, None, ..., None]
            if not everywhere:
                here = fit_rows(tokens, x.shape[1], pooled, axis=-1).to(x.device)
                at = at & here.view(-1, here.shape[-1], *[1] * (x.ndim - 2))
            if new.ndim == x.ndim and len(new) not in (1, len(x)):
                raise ValueError(
                    f"expected a batch of {len(new)} images, as many as the source of the edit has; received "
                    f"{len(x)}; run both on the same batches"
                )
            return torch.where(at, fit_rows(new, x.shape[1], pooled, axis=1 - x.ndim).to(x), x)

        hooks.append((name, write))

    if mask.embed:
        add("hook_ln_pre", fill.embed, lambda c: c.embed)
    for layer in range(len(mask.mlps)):
        if mask.heads[layer].any():
            add(f"blocks.{layer}.attn.hook_z", fill.heads[layer], lambda c, i=layer: c.heads[:, i])
        if mask.mlps[layer]:
            add(f"blocks.{layer}.hook_mlp_out", fill.mlps[layer], lambda c, i=layer: c.mlps[:, i])
    if mask.pool:
        if fill.pool is None:
            raise ValueError(
                "expected what stands in for the pool's MLP; received none; fit stream means with the pool, or "
                "leave pool out of the components"
            )
        add(POOL_OUT, fill.pool, lambda c: c.pool, everywhere=True)
    return hooks


@torch.no_grad()
def stream_values(
    visual: HookedViT, images: Float[Tensor, "batch 3 h w"], mask: ComponentMask
) -> tuple[Fill, Float[Tensor, "batch d_embed"]]:
    """What the chosen components write to the stream in a run on these images, at every token; and its features."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x.detach().clone()

    z = {i: f"blocks.{i}.attn.hook_z" for i in range(len(mask.mlps)) if mask.heads[i].any()}
    out = {i: f"blocks.{i}.hook_mlp_out" for i in range(len(mask.mlps)) if mask.mlps[i]}
    names = ["hook_ln_pre", *z.values(), *out.values(), *([POOL_OUT] if mask.pool else [])]
    with visual.hooks(fwd_hooks=[(name, keep) for name in names]):
        features = visual(images)
    of_heads, of_mlps = ({i: kept[name] for i, name in names.items()} for names in (z, out))
    return Fill(of_heads, of_mlps, kept["hook_ln_pre"], kept.get(POOL_OUT)), features


def fit_rows(x: Tensor, n: int, pooled: slice, *, axis: int) -> Tensor:
    """`x` with as many tokens as there are: the last block may compute the pooled rows alone."""
    have = x.shape[axis]
    if have in (1, n):
        return x
    numbers = range(have)[pooled]
    return x.narrow(axis, numbers.start, len(numbers))


def token_mask(rows: Rows, cfg: ViTConfig) -> Bool[Tensor, "*batch token"]:
    """Which tokens of a tower are meant.

    Raises:
        ValueError: a mask over another number of tokens.
        IndexError: there is no such token.
    """
    if isinstance(rows, Tensor):
        if rows.shape[-1] != cfg.n_tokens:
            raise ValueError(
                f"expected rows as a mask over the tower's {cfg.n_tokens} tokens; received {list(rows.shape)}; a "
                f"mask of patches lacks the first {cfg.n_prefix}"
            )
        return rows
    mask = torch.zeros(cfg.n_tokens, dtype=torch.bool)
    if isinstance(rows, tuple):
        for row in rows:
            if not -cfg.n_tokens <= row < cfg.n_tokens:
                raise IndexError(f"expected a token in 0..{cfg.n_tokens - 1}; received {row} in rows={rows}")
        mask[list(rows)] = True
    else:
        mask[{"all": slice(None), "pooled": cfg.pooled_rows, "patches": slice(cfg.n_prefix, None)}[rows]] = (
            True
        )
    return mask


def check_rows(rows: object) -> None:
    """Raises ValueError unless `rows` is a known choice."""
    named = isinstance(rows, str) and rows in get_args(Named)
    numbers = isinstance(rows, tuple) and all(isinstance(row, int) for row in rows)
    masked = isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.ndim in (1, 2)
    if not (named or numbers or masked):
        raise ValueError(
            f"expected rows of {get_args(Named)}, a tuple of token numbers or a boolean mask [token] or "
            f"[batch token]; received {rows!r}"
        )


def show_rows(rows: Rows) -> str:
    """As it stands in the repr of an intervention; nothing for the default."""
    if isinstance(rows, Tensor):
        return f", rows=mask of {int(rows.sum())} tokens"
    return "" if rows == "all" else f", rows={rows!r}"
