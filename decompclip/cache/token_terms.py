"""TokenTerms: what each source token sends through a head, kept small and contracted late.

A head's term is a sum over tokens of `attention[n] * value[n]` times the head's map. Kept are the pooled
row's attention and the values; a map toward texts contracts the head's map with the texts first, so that
no `[batch, layer, head, token, d_embed]` is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.cache.maps import Convention, blocks, wide
from decompclip.models.vit import Hook, HookedViT


class DecompositionError(ArithmeticError):
    """The terms do not sum to what they are terms of."""


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Attention and values of the kept heads.

    Attributes:
        kept: which heads; the `kept_head` axis of the others goes through them in order.
        attention: the pooled row's, over source tokens.
        values: past the value bias in the centred convention (a constant of the layer, no token's).
        scale: what an image's coordinates are multiplied by: 1 / sigma, and 1 / ||R|| where normalized.
    """

    kept: Bool[Tensor, "layer head"]
    attention: Float[Tensor, "batch kept_head token"]
    values: Float[Tensor, "batch kept_head token d_head"]
    scale: Float[Tensor, " batch"]

    def position(self, layer: int, head: int) -> int:
        """Where a head stands on the `kept_head` axis.

        Raises:
            LookupError: its tokens were not kept.
        """
        if not self.kept[layer, head]:
            raise LookupError(
                f"expected the tokens of heads[{layer}, {head}]; received a decomposition that kept those of "
                f"other heads; ask for it: decompose(images, tokens=heads[{layer}, {head}])"
            )
        return int(self.kept.flatten()[: layer * self.kept.shape[1] + head].sum())

    def weighted(self, position: int) -> Float[Tensor, "batch token d_head"]:
        """The tokens' shares of a kept head's coordinates."""
        weights = self.attention[:, position] * self.scale[:, None]
        return weights[..., None] * self.values[:, position]

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenTerms:
        """The function applied to all that belongs to images."""
        attention, values, scale = map(function, (self.attention, self.values, self.scale))
        return replace(self, attention=attention, values=values, scale=scale)


class AttentionCapture:
    """Hooks that record the pooled row's attention, and the values, of some heads in one forward pass."""

    def __init__(self, visual: HookedViT, kept: Bool[Tensor, "layer head"]) -> None:
        self.visual, self.kept = visual, kept
        self.layers = [layer for layer in range(len(kept)) if kept[layer].any()]
        self.seen: dict[tuple[int, str], Tensor] = {}

    def hooks(self) -> list[Hook]:
        return [hook for layer in self.layers for hook in self._hooks(layer)]

    def _hooks(self, layer: int) -> list[Hook]:
        names, chosen = f"blocks.{layer}.attn.hook_", self.kept[layer]

        def keep(name: str, choose: Callable[[Tensor], Tensor]) -> Hook:
            def hook_function(x: Tensor, hook: Any) -> None:
                self.seen[layer, name] = wide(choose(x))

            return names + name, hook_function

        values = keep("v", lambda x: rearrange(x[:, :, chosen], "b n h e -> b h n e"))
        hooks = [values, keep("z", lambda x: x[:, 0, chosen])]
        # Where somebody may edit the pattern, it is read; elsewhere made again, for the one row.
        if any(self.visual.hook_dict[names + name].has_hooks() for name in ("attn_scores", "pattern")):
            return [*hooks, keep("pattern", lambda x: x[:, chosen, 0])]
        queries, keys = keep("q", lambda x: x[:, 0, chosen]), keep("k", lambda x: x[:, :, chosen])
        return [*hooks, queries, keys]

    def _attention(self, layer: int) -> Float[Tensor, "batch head token"]:
        if (layer, "pattern") in self.seen:
            return self.seen[layer, "pattern"]
        q, k = self.seen.pop((layer, "q")), self.seen.pop((layer, "k"))
        return (torch.einsum("bhe,bnhe->bhn", q, k) * q.shape[-1] ** -0.5).softmax(-1)

    def terms(self, scale: Float[Tensor, " batch"], convention: Convention, tolerance: float) -> TokenTerms:
        """What was recorded, once it is seen to sum to what the heads put out.

        Raises:
            DecompositionError: it does not, because a hook edits a head's z or breaks its attention.
        """
        attention = torch.cat([self._attention(layer) for layer in self.layers], dim=1)
        values = torch.cat([self.seen.pop((layer, "v")) for layer in self.layers], dim=1)
        z = torch.cat([self.seen.pop((layer, "z")) for layer in self.layers], dim=1)
        error = (torch.einsum("bhn,bhne->bhe", attention, values) - z).abs().max() / z.abs().max()
        if not error <= tolerance:
            raise DecompositionError(
                f"expected the tokens of each head to sum to its z within {tolerance:.1e}; received a miss of "
                f"{error:.1e}: a hook edits hook_z; decompose that run without tokens"
            )
        if convention == "centred":
            if not (attention.sum(-1) - 1).abs().max() <= tolerance:
                raise DecompositionError(
                    "expected attention that sums to one over tokens, so that the value bias is no token's; "
                    "received rows that a hook on hook_pattern changed; renormalise them there, or take "
                    'convention="paper"'
                )
            b_V = torch.stack([wide(block.attn.b_V) for block in blocks(self.visual)])
            values = values - b_V[self.kept.to(b_V.device)][:, None]
        return TokenTerms(self.kept, attention, values, scale)
