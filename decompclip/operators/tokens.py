"""Tokens: what heads receive from some source tokens, removed; say, from the patches that a trigger covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.decomposition.components import ComponentMask, Components
from decompclip.decomposition.decomposition import Decomposition
from decompclip.operators.ablation import resolve
from decompclip.operators.intervention import Chosen, Intervention, Where
from decompclip.operators.splits import Measured, apart
from decompclip.tower.vit import Hook, HookedViT, blocks


@dataclass(frozen=True, eq=False, repr=False)
class AblateTokens(Intervention):
    """Heads deaf to some source tokens; what they attend to stays as it is.

    Direct: the tokens' shares are taken out of the heads' terms (decompose with `tokens=`). Causal: at these tokens
    the heads' values are their bias alone, for every token that listens.

    Attributes:
        components: which heads.
        tokens: numbers (0 is the class token, where there is one), or a mask `[token]` or `[batch token]`.
    """

    components: Components
    tokens: tuple[int, ...] | Bool[Tensor, "*batch token"]

    def __post_init__(self) -> None:
        tokens = self.tokens
        numbers = (
            isinstance(tokens, tuple) and bool(tokens) and all(isinstance(token, int) for token in tokens)
        )
        if not numbers and not (
            isinstance(tokens, Tensor) and tokens.dtype == torch.bool and tokens.ndim in (1, 2)
        ):
            raise ValueError(
                "expected tokens as a tuple of numbers, at least one, or a boolean mask [token] or [batch token]; "
                f"received {_show(tokens)}; e.g. AblateTokens(heads, (1, 2))"
            )

    def __call__(self, d: Measured, *, where: Where | None = None) -> Decomposition:
        d = apart(None, d)
        chosen = Chosen.of(self._heads(d), where, len(d)).heads
        coords = d.coords.clone()
        for layer, head in chosen.any(0).nonzero().tolist():
            shares = _shares(d, layer, head)
            silenced = self._mask(shares.shape[1], len(d)).to(shares.device) & chosen[
                :, layer, head, None
            ].to(shares.device)
            coords[:, layer, head, : shares.shape[2]] -= (shares * silenced[..., None]).sum(1)
        return d.edit(coords=coords) if chosen.any() else d

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        mask = self._heads(visual)

        def silence(v: Tensor, hook: Any, layer: int) -> Tensor:
            of_heads = Chosen.of(mask, where, len(v)).heads[:, None, layer].to(v.device)
            silenced = self._mask(v.shape[1], len(v)).to(v.device)[..., None] & of_heads
            return torch.where(silenced[..., None], blocks(visual)[layer].attn.b_V.detach().to(v), v)

        return [
            (f"blocks.{layer}.attn.hook_v", lambda v, hook, layer=layer: silence(v, hook, layer))
            for layer in mask.heads.any(1).nonzero().flatten().tolist()
        ]

    def _heads(self, of: Decomposition | HookedViT) -> ComponentMask:
        """Which are meant; raises ValueError where the expression names more than heads."""
        mask = resolve(self.components, of)
        if mask.mlps.any() or mask.embed or mask.pool:
            raise ValueError(f"expected heads, for they alone read tokens; received {self.components!r}")
        return mask

    def _mask(self, n_tokens: int, batch: int) -> Bool[Tensor, "#batch token"]:
        tokens = self.tokens
        if isinstance(tokens, tuple):
            outside = [token for token in tokens if not -n_tokens <= token < n_tokens]
            if outside:
                raise IndexError(f"expected tokens in 0..{n_tokens - 1}; received {outside[0]}")
            return torch.zeros(1, n_tokens, dtype=torch.bool).index_fill(
                1, torch.tensor(tokens) % n_tokens, True
            )
        if tokens.shape[-1] != n_tokens:
            raise ValueError(
                f"expected a boolean mask over {n_tokens} tokens; received {tokens.dtype} {list(tokens.shape)}; a mask "
                "of patches lacks the class token"
            )
        tokens = tokens if tokens.ndim == 2 else tokens[None]
        if len(tokens) not in (1, batch):
            raise ValueError(
                f"expected a mask for each of {batch} images, or one for all; received {list(tokens.shape)}; give one "
                "row for each image of this very batch"
            )
        return tokens

    def __repr__(self) -> str:
        of = f"mask of {int(self.tokens.sum())}" if isinstance(self.tokens, Tensor) else repr(self.tokens)
        return f"AblateTokens({self.components!r}, {of})"


def _show(tokens: object) -> str:
    return f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)


def _shares(d: Decomposition, layer: int, head: int) -> Float[Tensor, "batch token coord"]:
    """The tokens' shares of a head's coordinates, constants aside."""
    terms, position, _, _ = d._kept(layer, head)
    weighted, maps = terms.weighted(position), d.maps
    if maps.tokens is None or maps.out is None:
        return weighted[:, :, 0]
    return torch.einsum("bnqe,qed->bnd", weighted, maps.tokens[layer, head] @ maps.out)
