"""Terms: what hooks saw of the pooled rows, times the fixed maps; and what each source token sends through a head.

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

from decompclip.decomposition.maps import Convention, Frozen, wide
from decompclip.tower.config import ViTConfig
from decompclip.tower.layers import blocks
from decompclip.tower.vit import Hook, HookedViT


class Rows:
    """Hooks that record what components write at the rows that are pooled, and with what weight each row counts."""

    def __init__(self, visual: HookedViT, *, with_mean: bool) -> None:
        self.visual, self.cfg, self.with_mean = visual, visual.cfg, with_mean
        self.seen: dict[str, Tensor] = {}
        self.each = Rows.all_rows(visual.cfg)

    @staticmethod
    def all_rows(cfg: ViTConfig) -> bool:
        """Whether rows count differently, by weights known only at the end."""
        scaled = cfg.norm == "post" or cfg.attn_norm
        return cfg.pool == "attention" or (cfg.pool == "mean" and (cfg.ln_final == "rows" or scaled))

    def hooks(self) -> list[Hook]:
        """To be set for one forward pass."""
        layers, ends = range(self.cfg.n_layers), ["ln_final.hook_scale"]
        names = ["blocks.0.hook_resid_pre"]
        for layer in layers:
            names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
            names += [f"blocks.{layer}.{self._scale}"] if self._scale else []
        if self.with_mean:
            names += [f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"]
        if self.cfg.pool == "attention":
            ends += ["pool.hook_pattern"]
            ends += ["pool.hook_mlp_out"] if self.cfg.pool_mlp else []
            ends += ["pool.ln_post.hook_scale"] if self.cfg.pool_norm else []
        return [*((name, self._keep_rows) for name in names), *((name, self._keep) for name in ends)]

    @property
    def _scale(self) -> str | None:
        if self.cfg.attn_norm:
            return "attn.ln.hook_scale"
        return "ln1.hook_scale" if self.cfg.norm == "post" else None

    def _keep(self, x: Tensor, hook: Any) -> None:
        self.seen[hook.name] = wide(x)

    def _keep_rows(self, x: Tensor, hook: Any) -> None:
        # Copies: a view of a row would keep every token's activation alive.
        if self.cfg.pool == "cls":
            self.seen[hook.name] = wide(x[:, :1]).clone()
        elif self.each:
            self.seen[hook.name] = wide(x[:, self.cfg.pooled_rows]).clone()
        else:
            self.seen[hook.name] = wide(x[:, self.cfg.pooled_rows]).mean(1, keepdim=True)

    # What was seen

    @property
    def weights(self) -> Float[Tensor, "batch pool_head row"]:
        """`a`: how much of each row each head of the pooling reads, over the scales of the LayerNorms behind."""
        weights = 1 / self.seen["ln_final.hook_scale"].mT
        if self.cfg.pool == "attention":
            weights = self.seen["pool.hook_pattern"].squeeze(2) * weights
        elif self.each:
            weights = weights.expand(-1, -1, self._n_rows) / self._n_rows
        return weights if self.last is None else weights / self.last[:, None, None]

    @property
    def row_weights(self) -> Float[Tensor, "batch pool_head row"]:
        """The same for each row of the stream, where `weights` are of the rows' mean."""
        spread = self.cfg.pool == "mean" and not self.each
        return self.weights.expand(-1, -1, self._n_rows) / self._n_rows if spread else self.weights

    @property
    def _n_rows(self) -> int:
        return len(range(self.cfg.n_tokens)[self.cfg.pooled_rows])

    @property
    def last(self) -> Float[Tensor, " batch"] | None:
        """The scale of the LayerNorm behind an attention pool, where there is one."""
        return self.seen["pool.ln_post.hook_scale"].flatten() if self.cfg.pool_norm else None

    @property
    def scales(self) -> list[Float[Tensor, "batch row 1"]] | None:
        """By layer, the scale of the LayerNorm behind the heads, where there is one."""
        if self._scale is None:
            return None
        return [self.seen[f"blocks.{layer}.{self._scale}"] for layer in range(self.cfg.n_layers)]

    def pooled(self, weights: Tensor, name: str) -> Float[Tensor, "batch layer pool_head *part"]:
        """The weighted sums of rows of one kind of write, of every layer."""
        kept = [self.seen[f"blocks.{layer}.{name}"] for layer in range(self.cfg.n_layers)]
        if name == "attn.hook_z" and self.scales is not None:
            kept = [z / scale[..., None] for z, scale in zip(kept, self.scales, strict=True)]
        return torch.stack([_weighted(weights, x) for x in kept], dim=1)


def _weighted(weights: Float[Tensor, "batch pool_head row"], x: Float[Tensor, "batch row *part"]) -> Tensor:
    return (weights @ x.flatten(2)).unflatten(-1, x.shape[2:])


def terms_of(
    fixed: Frozen, rows: Rows, length: Float[Tensor, " batch"], convention: Convention
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Coordinates, MLPs, embedding, pool and bias coordinates, each over `length` (formulas: `decompclip.decomposition.maps`)."""
    read, write = fixed.read, fixed.write
    weights, one = rows.weights / length[:, None, None], 1 / length[:, None]
    count = weights.sum(-1)  # [batch pool_head]
    each = [(weights / scale.mT).sum(-1) for scale in rows.scales] if rows.scales else [count] * len(write.W)
    count_heads = torch.stack(each, dim=1)
    z = rows.pooled(weights, "attn.hook_z")
    scaled = one if rows.last is None else one / rows.last[:, None]
    constants = [scaled if name in read.scaled else one for name in read.constants]
    mlps = _term(fixed, rows.pooled(weights, "hook_mlp_out"))
    embed = _term(fixed, _weighted(weights, rows.seen["blocks.0.hook_resid_pre"]))
    pool = _pool_term(rows, one)
    if convention == "centred":
        z = z - count_heads[..., None, None] * write.b_V[:, None]
        kinds = [count_heads.flatten(1)] if write.scaled else []
        kinds += [count[:, None].expand(-1, len(write.W), -1).flatten(1)]
        bias_coords = torch.cat([*kinds, *constants], 1)
        return {
            "coords": _coords(fixed, z),
            "mlps": mlps,
            "embed": embed,
            "pool": pool,
            "bias_coords": bias_coords,
        }
    n_layers = len(write.W)
    stream = rows.seen[f"blocks.{n_layers - 1}.hook_resid_post"]
    mean = _weighted(weights, stream.mean(-1, keepdim=True))[..., 0]
    shared = sum(c * row for c, row in zip(constants, read.constants.values(), strict=True))
    share = (shared - read.finish(mean[..., None] * fixed.into.sum(1))) / (2 * n_layers + 1)
    return {
        "coords": _shared_coords(fixed, z, count_heads, count, mean, one, share),
        "mlps": mlps + share[:, None],
        "embed": embed + share,
        "pool": pool,
        "bias_coords": count.new_empty(len(count), 0),
    }


def _term(
    fixed: Frozen, stream: Float[Tensor, "batch *layer pool_head d_model"]
) -> Float[Tensor, "batch *layer d_embed"]:
    return fixed.read.finish(torch.einsum("...qd,qdp->...qp", stream, fixed.into))


def _pool_term(rows: Rows, one: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch pool d_embed"]:
    if not rows.cfg.pool_mlp:
        return one.new_empty(len(one), 0, rows.cfg.d_embed)
    written = rows.seen["pool.hook_mlp_out"] * one[..., None]
    return written if rows.visual.proj is None else written @ wide(rows.visual.proj)


def _shared_coords(
    fixed: Frozen,
    z: Float[Tensor, "batch layer pool_head head d_head"],
    count_heads: Float[Tensor, "batch layer pool_head"],
    count: Float[Tensor, "batch pool_head"],
    mean: Float[Tensor, "batch pool_head"],
    one: Float[Tensor, "batch 1"],
    share: Float[Tensor, "batch d_embed"],
) -> Float[Tensor, "batch layer head coord"]:
    """Heads' coordinates in the paper's convention, with their shares of biases, mean and constants."""
    write = fixed.write
    n_layers, n_heads = write.W.shape[:2]
    if fixed.maps.direct:
        of_heads = torch.einsum("blq,ld->blqd", count_heads, write.head_bias) if write.scaled else 0
        biases = _term(fixed, of_heads + torch.einsum("bq,ld->blqd", count, write.bias)) + share[:, None]
        return _coords(fixed, z) + biases[:, :, None] / n_heads
    extras = [count_heads[..., 0]] if write.scaled else []
    extras += [x.expand(-1, n_layers) for x in (count, mean, one)]
    constants = torch.stack(extras, dim=-1)[:, :, None].expand(-1, -1, n_heads, -1)
    return torch.cat([z[:, :, 0], constants], dim=-1)


def _coords(
    fixed: Frozen, z: Float[Tensor, "batch layer pool_head head d_head"]
) -> Float[Tensor, "batch layer head coord"]:
    if fixed.maps.tokens is None:
        return z[:, :, 0]
    return fixed.read.finish(torch.einsum("blqhe,lhqep->blhqp", z, fixed.maps.tokens))


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
            return self.seen.pop((layer, "pattern"))
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
