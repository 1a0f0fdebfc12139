"""Ablation: components replaced by their mean over clean images, or by nothing; and what all replacements share.

Source: docs/method.md, section 2; He et al. (ICML 2025), section 3.2 (mean) and their "w/ Abandon" (zero).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.decomposition.components import ComponentMask, Components, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import term_maps
from decompclip.decomposition.moments import Moments
from decompclip.operators.intervention import Chosen, Intervention, Where
from decompclip.tower.config import ViTConfig
from decompclip.tower.layers import blocks
from decompclip.tower.vit import Hook, HookedViT

Named = Literal["all", "pooled", "patches"]
TokenChoice = Named | tuple[int, ...] | Bool[Tensor, "*batch token"]
"""Which tokens a causal edit reaches: by name, by number, or by a mask `[token]` or `[batch token]`."""

POOL_OUT = "pool.hook_mlp_out"


@dataclass(frozen=True, eq=False, repr=False)
class Replacement(Intervention):
    """Components replaced by something: what all ablations share.

    Attributes:
        components: which, e.g. `mlps[-5:]`.
        rows: which tokens a causal edit reaches: "all", the "pooled" ones, "patches", numbers or a mask.
    """

    components: Components
    _: KW_ONLY
    rows: TokenChoice = "all"

    def __post_init__(self) -> None:
        check_rows(self.rows)

    @abstractmethod
    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        """What stands in for the terms."""

    @abstractmethod
    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        """What stands in for the stream's writes."""

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        mask = resolve(self.components, d)
        return edit_terms(d, mask, self.term_fill(d, mask), where)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        mask = resolve(self.components, visual)
        if mask.empty:
            return []
        return edit_stream(visual, mask, self.stream_fill(visual, mask), rows=self.rows, where=where)

    def _about(self) -> str:
        """What stands in, as the repr says it."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.components!r}{self._about()}{show_rows(self.rows)})"


def check_moments(moments: object) -> None:
    """Raises TypeError where something else stands in the place of moments."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"expected Moments of clean images; received {type(moments).__name__}; fit them with "
            "Moments.fit(model, batches), on images that are not measured"
        )


@dataclass(frozen=True, eq=False)
class Fill:
    """What stands in for heads, MLPs, the embedding and the pool's MLP: of terms (direct) or of the stream (causal).

    Axes of terms: `[*batch layer head coord]`, `[*batch layer d_embed]`, `[*batch d_embed]` for the embedding, and
    `[*batch pool d_embed]`. Of the stream: `[layer *batch token head d_head]`, `[layer *batch token d_model]`,
    `[*batch token d_model]` and `[*batch row d_pool]`, where a token axis of length 1 serves for all (only the layers
    that are edited need be there). What is shorter is broadcast. None: unknown.
    """

    heads: Float[Tensor, "*heads"] | Mapping[int, Tensor]
    mlps: Float[Tensor, "*mlps"] | Mapping[int, Tensor]
    embed: Float[Tensor, "*embed"]
    pool: Float[Tensor, "*pool"] | None = None


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
    replace("pool", chosen.pool, fill.pool, 2)
    return d.edit(**edited)


def edit_stream(
    visual: HookedViT, mask: ComponentMask, fill: Fill, *, rows: TokenChoice, where: Where | None
) -> list[Hook]:
    """Hooks that replace z, MLP outputs, the input of block 0 and the pool's MLP at the chosen tokens."""
    tokens = token_mask(rows, visual.cfg.n_tokens, visual.cfg)
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


def token_mask(
    rows: TokenChoice, n_tokens: int, cfg: ViTConfig | None = None
) -> Bool[Tensor, "*batch token"]:
    """Which of `n_tokens` tokens are meant; names are those of a tower's tokens.

    Raises:
        ValueError: a mask over another number of tokens.
        IndexError: there is no such token.
    """
    if isinstance(rows, Tensor):
        if rows.shape[-1] != n_tokens:
            raise ValueError(
                f"expected a mask over {n_tokens} tokens; received {list(rows.shape)}; a mask of patches lacks the "
                "class token and registers"
            )
        return rows
    mask = torch.zeros(n_tokens, dtype=torch.bool)
    if isinstance(rows, tuple):
        for row in rows:
            if not -n_tokens <= row < n_tokens:
                raise IndexError(f"expected tokens in 0..{n_tokens - 1}; received {row} in {rows}")
        mask[list(rows)] = True
        return mask
    assert cfg is not None
    mask[{"all": slice(None), "pooled": cfg.pooled_rows, "patches": slice(cfg.n_prefix, None)}[rows]] = True
    return mask


def check_rows(rows: object, name: str = "rows", named: tuple[str, ...] = get_args(Named)) -> None:
    """Raises ValueError unless `rows` is a known choice."""
    numbers = isinstance(rows, tuple) and bool(rows) and all(isinstance(row, int) for row in rows)
    masked = isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.ndim in (1, 2)
    if not (numbers or masked or (isinstance(rows, str) and rows in named)):
        known = f" of {named}," if named else " as"
        raise ValueError(
            f"expected {name}{known} a tuple of token numbers, at least one, or a boolean mask [token] or [batch "
            f"token]; received {rows!r}"
        )


def show_rows(rows: TokenChoice) -> str:
    """As it stands in the repr of an intervention; nothing for the default."""
    if isinstance(rows, Tensor):
        return f", rows=mask of {int(rows.sum())} tokens"
    return "" if rows == "all" else f", rows={rows!r}"


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Replacement):
    """Components replaced by their means.

    Direct: by mean terms. Causal: by the stream means of each token position (`Moments.fit(stream=True)`). Single
    neurons have means of their own: `AblateNeurons(neurons[3], fill=mean_neurons(visual, batches, neurons[3]))`.

    Attributes:
        components, rows: as in `Replacement`.
        moments: of clean images, under the same model, convention and normalization.
    """

    moments: Moments

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self.moments)

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        self.moments.check(d)
        return Fill(self.moments.coords, self.moments.mlps, self.moments.embed, self.moments.pool)

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        self.moments.check_model(term_maps(visual, self.moments.maps.convention))
        streams = self.moments.streams
        if streams is None:
            raise ValueError(
                "expected moments with stream means, which causal mean-ablation fills in; received moments of terms "
                "alone; fit them with Moments.fit(model, batches, stream=True)"
            )
        return Fill(streams.z, streams.mlp_out, streams.embed, streams.pool)

    def _about(self) -> str:
        return f", {self.moments!r}"


@dataclass(frozen=True, eq=False, repr=False)
class ZeroAblate(Replacement):
    """Components removed.

    Direct: their terms are zero. Causal: MLPs add nothing, and heads their value bias alone (z = b_V), which in the
    centred convention is no part of a head's term: so the two modes remove the same thing.

    Attributes:
        components, rows: as in `Replacement`.
    """

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        zero = d.embed.new_zeros(())
        return Fill(zero, zero, zero, zero)

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        z = value_biases(visual)
        zero = z.new_zeros(1, 1)
        return Fill(z, zero.expand(len(z), -1, -1), zero, zero)


def value_biases(visual: HookedViT) -> Float[Tensor, "layer 1 head d_head"]:
    """What heads leave in z when they are silent."""
    return torch.stack([block.attn.b_V.detach() for block in blocks(visual)])[:, None]
