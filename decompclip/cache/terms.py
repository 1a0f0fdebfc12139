"""Terms: what hooks saw of the pooled rows, times the fixed maps."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.cache.maps import Convention, Frozen
from decompclip.cache.readout import wide
from decompclip.models.config import ViTConfig
from decompclip.models.vit import Hook, HookedViT


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
    """Coordinates, MLPs, embedding, pool and bias coordinates, each over `length` (formulas: `decompclip.cache.maps`)."""
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
