"""Multi-head self-attention, with everything that towers do to queries, scores and heads."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from decompclip.tower.config import Rope, ViTConfig
from decompclip.tower.mlp import LayerNorm


class Attention(nn.Module):
    """Multi-head self-attention, fused unless somebody reads the scores or the pattern.

    Attributes:
        ln: a LayerNorm across the concatenated heads (EVA02), or None.
        rel_pos: the source's own module of relative position biases, or None.
    """

    ln: LayerNorm | None
    rel_pos: nn.Module | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, self.n_heads, self.d_head = config.d_model, config.n_heads, config.d_head
        self.rope: Rope | None = config.rope
        self.n_prefix = config.n_prefix
        self.W_QKV = nn.Parameter(torch.empty(3 * d, d))
        self.b_QKV = nn.Parameter(torch.zeros(3 * d))
        self.W_out = nn.Parameter(torch.empty(d, d))
        self.b_O = nn.Parameter(torch.zeros(d))
        nn.init.xavier_uniform_(self.W_QKV)
        nn.init.xavier_uniform_(self.W_out)
        self.ln = LayerNorm(d, config.ln_eps) if config.attn_norm else None
        self.rel_pos = None
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        if self.rope:
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    # Weights by head

    def _split(self, which: int) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(self.W_QKV, "(three h e) d -> three h d e", three=3, h=self.n_heads)[which]

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self._split(0)

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        return self._split(1)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        return self._split(2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return rearrange(self.W_out, "d (h e) -> h e d", h=self.n_heads)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        return rearrange(self.b_QKV, "(three h e) -> three h e", three=3, h=self.n_heads)[2]

    @property
    def W_written(self) -> Float[Tensor, "head d_head d_model"]:
        """What a head's z, over the scale of `ln`, adds to the output: `W_O`, where there is no `ln`.

        `ln` subtracts the mean of all heads together, so that a head also writes through the others' `W_O`.
        """
        if self.ln is None:
            return self.W_O
        scaled = self.W_out * self.ln.w
        return rearrange(scaled - scaled.mean(1, keepdim=True), "d (h e) -> h e d", h=self.n_heads)

    @property
    def b_written(self) -> Float[Tensor, " d_model"]:
        """What is added whatever the heads do."""
        return self.b_O if self.ln is None else self.b_O + self.W_out @ self.ln.b

    # Forward

    def forward(
        self,
        x: Float[Tensor, "batch token d_model"],
        rope: Float[Tensor, "2 patch d_head"] | None = None,
        *,
        pooled_row_only: bool = False,
    ) -> Float[Tensor, "batch row d_model"]:
        """Attention's output for every token, or for token 0 alone."""
        q, k, v = self._project(x, pooled_row_only)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        q, k, v = (rearrange(t, "b n h e -> b h n e") for t in (q, k, v))
        if self.rope and rope is not None:
            q = self._hooked(self.hook_rot_q, rotate(q, rope, self.n_prefix, self.rope))
            k = self._hooked(self.hook_rot_k, rotate(k, rope, self.n_prefix, self.rope))
        bias = self.position_bias()
        bias = None if bias is None else bias[:, :, : q.shape[2]].to(q.dtype)
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            scores = q @ k.transpose(-2, -1) * self.d_head**-0.5
            scores = self.hook_attn_scores(scores if bias is None else scores + bias)
            z = self.hook_pattern(scores.softmax(dim=-1)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self._write(self.hook_z(rearrange(z, "b h n e -> b n h e")))

    def _write(self, z: Float[Tensor, "batch row head d_head"]) -> Float[Tensor, "batch row d_model"]:
        flat = rearrange(z, "b n h e -> b n (h e)")
        if self.hook_result.has_hooks():
            return self.hook_result(self._results(z, flat)).sum(dim=2) + self.b_written
        return F.linear(flat if self.ln is None else self.ln(flat), self.W_out, self.b_O)

    def _results(self, z: Tensor, flat: Tensor) -> Float[Tensor, "batch row head d_model"]:
        """What each head adds to the output."""
        if self.ln is None:
            return torch.einsum("bnhe,hed->bnhd", z, self.W_O)
        centred, scale = self.ln.split(flat)
        result = torch.einsum("bnhe,hed->bnhd", z / scale[..., None].to(z.dtype), self.W_written)
        if self.ln.hook_normalized.has_hooks():  # an edit behind the scale is each head's own
            normalized = (centred / scale).to(self.ln.w.dtype)
            edit = (self.ln.hook_normalized(normalized.clone()) - normalized) * self.ln.w
            result = result + torch.einsum("bnhe,hed->bnhd", edit.view_as(z), self.W_O)
        return result

    def _project(self, x: Tensor, pooled_row_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        split = {"h": self.n_heads, "e": self.d_head}
        if not pooled_row_only:
            qkv = F.linear(x, self.W_QKV, self.b_QKV)
            q, k, v = rearrange(qkv, "b n (three h e) -> three b n h e", three=3, **split).unbind(0)
            return q, k, v
        d = x.shape[-1]
        q = rearrange(F.linear(x[:, :1], self.W_QKV[:d], self.b_QKV[:d]), "b n (h e) -> b n h e", **split)
        kv = F.linear(x, self.W_QKV[d:], self.b_QKV[d:])
        k, v = rearrange(kv, "b n (two h e) -> two b n h e", two=2, **split).unbind(0)
        return q, k, v

    def position_bias(self) -> Float[Tensor, "1 head token token"] | None:
        """What is added to the scores by relative position, where the tower does so."""
        module: Any = self.rel_pos
        return None if module is None else module.get_bias()

    @staticmethod
    def _hooked(point: HookPoint, x: Tensor) -> Tensor:
        """`x [b h n e]` through a hook point that shows it as `[b n h e]`, as those of q and k do."""
        return point(x.transpose(1, 2)).transpose(1, 2)


def rotate(
    x: Float[Tensor, "batch head row d_head"],
    rope: Float[Tensor, "2 patch d_head"],
    n_prefix: int,
    layout: Rope,
) -> Float[Tensor, "batch head row d_head"]:
    """Rotary positions (Su et al., 2021) for the patches' rows; prefix tokens keep their place."""
    prefix, patches = x[:, :, :n_prefix], x[:, :, n_prefix:]
    sin, cos = rope.to(x.dtype)
    rows = patches.shape[2]  # none where the pooled row alone is asked for
    if layout == "half":
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([prefix, patches * cos[:rows] + turned * sin[:rows]], dim=2)
