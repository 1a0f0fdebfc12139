"""TokenTerms: what each source token sends through a head, kept small and contracted late.

A head's term is a sum over tokens of `attention[n] * value[n]` times the head's map. Kept are the pooled
row's attention and the values; a map toward texts contracts the head's map with the texts first, so that
no `[batch, layer, head, token, d_embed]` is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.cache.maps import Convention
from decompclip.cache.readout import wide
from decompclip.models.vit import Hook, HookedViT, blocks


class DecompositionError(ArithmeticError):
    """The terms do not sum to what they are terms of."""


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Attention and values of the kept heads.

    Attributes:
        kept: which heads; the `kept_head` axis of the others goes through them in order.
        attention: of each head of the pooling (one, but for attention pools) the mean attention of the rows
            that it reads, by their weights; of a class token's tower, the class token's attention.
        values: past the value bias in the centred convention (a constant of the layer, no token's).
        scale: the sum of these weights: for a class token 1 / sigma, and 1 / ||R|| where normalized.
    """

    kept: Bool[Tensor, "layer head"]
    attention: Float[Tensor, "batch kept_head pool_head token"]
    values: Float[Tensor, "batch kept_head token d_head"]
    scale: Float[Tensor, "batch kept_head pool_head"]

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

    def weighted(self, position: int) -> Float[Tensor, "batch token pool_head d_head"]:
        """The tokens' shares of a kept head's weighted z."""
        weights = self.attention[:, position] * self.scale[:, position, :, None]
        return weights.mT[..., None] * self.values[:, position, :, None]

    @staticmethod
    def cat(parts: Sequence[TokenTerms]) -> TokenTerms:
        """The images of several, in order; the kept heads are those of the first."""
        joined = {
            n: torch.cat([getattr(part, n) for part in parts]) for n in ("attention", "values", "scale")
        }
        return TokenTerms(parts[0].kept, **joined)

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

        rows = self.visual.cfg.pooled_rows
        values = keep("v", lambda x: rearrange(x[:, :, chosen], "b n h e -> b h n e"))
        hooks = [values, keep("z", lambda x: rearrange(x[:, rows, chosen], "b n h e -> b h n e"))]
        # Where somebody may edit the pattern, it is read; elsewhere made again, for the pooled rows.
        if any(self.visual.hook_dict[names + name].has_hooks() for name in ("attn_scores", "pattern")):
            return [*hooks, keep("pattern", lambda x: x[:, chosen, rows])]
        turned = "rot_" if self.visual.cfg.rope else ""
        queries = keep(f"{turned}q", lambda x: x[:, rows, chosen])
        return [*hooks, queries, keep(f"{turned}k", lambda x: x[:, :, chosen])]

    def _attention(self, layer: int) -> Float[Tensor, "batch head row token"]:
        if (layer, "pattern") in self.seen:
            return self.seen[layer, "pattern"]
        turned = "rot_" if self.visual.cfg.rope else ""
        q, k = self.seen.pop((layer, f"{turned}q")), self.seen.pop((layer, f"{turned}k"))
        scores = torch.einsum("bqhe,bnhe->bhqn", q, k) * q.shape[-1] ** -0.5
        bias = blocks(self.visual)[layer].attn.position_bias()
        if bias is not None:
            scores = (
                scores + wide(bias)[:, self.kept[layer].to(bias.device)][:, :, self.visual.cfg.pooled_rows]
            )
        return scores.softmax(-1)

    def terms(
        self,
        weights: Float[Tensor, "batch pool_head row"],
        scales: list[Float[Tensor, "batch row 1"]] | None,
        convention: Convention,
        tolerance: float,
    ) -> TokenTerms:
        """What was recorded, once it is seen to sum to what the heads put out.

        Args:
            weights: how much each row counts for the feature.
            scales: by layer, what a LayerNorm behind the heads divides each row by, where there is one.

        Raises:
            DecompositionError: it does not, because a hook edits a head's z or breaks its attention.
        """
        mixed, totals, values, error = [], [], [], 0.0
        for layer in self.layers:
            read = weights if scales is None else weights / scales[layer].mT
            totals.append(read.sum(-1)[:, None].expand(-1, int(self.kept[layer].sum()), -1))
            read = read / read.sum(-1, keepdim=True)
            attention, v = self._attention(layer), self.seen.pop((layer, "v"))
            self.seen.pop((layer, "pattern"), None)
            mixed.append(torch.einsum("bqr,bhrn->bhqn", read, attention))
            values.append(v)
            z = torch.einsum("bqr,bhre->bhqe", read, self.seen.pop((layer, "z")))
            if len(z):
                error = max(error, float((mixed[-1] @ v - z).abs().max() / z.abs().max()))
        if not error <= tolerance:
            raise DecompositionError(
                f"expected the tokens of each head to sum to its z within {tolerance:.1e}; received a miss of "
                f"{error:.1e}: a hook edits hook_z; decompose that run without tokens"
            )
        together, all_values = torch.cat(mixed, dim=1), torch.cat(values, dim=1)
        if convention == "centred":
            if ((together.sum(-1) - 1).abs() > tolerance).any():
                raise DecompositionError(
                    "expected attention that sums to one over tokens, so that the value bias is no token's; "
                    "received rows that a hook on hook_pattern changed; renormalise them there, or take "
                    'convention="paper"'
                )
            b_V = torch.stack([wide(block.attn.b_V) for block in blocks(self.visual)])
            all_values = all_values - b_V[self.kept.to(b_V.device)][:, None]
        return TokenTerms(self.kept, together, all_values, torch.cat(totals, dim=1))
