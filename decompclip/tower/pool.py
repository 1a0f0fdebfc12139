"""AttentionPool: a learned query that reads the last stream's rows (SigLIP's MAP, PE, CoCa)."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from decompclip.tower.config import ViTConfig
from decompclip.tower.mlp import MLP, LayerNorm


class AttentionPool(nn.Module):
    """Attention of a learned query to rows; then an MLP of its own, or a LayerNorm, where the tower has one.

    Attributes:
        query: the learned queries, of which the first is the feature's.
    """

    ln_q: LayerNorm | None
    ln: LayerNorm | None
    mlp: MLP | None
    ln_post: LayerNorm | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, self.n_heads = config.d_pool, config.pool_heads
        self.d_head = d // self.n_heads
        self.query = nn.Parameter(torch.empty(config.pool_queries, d))
        self.W_Q = nn.Parameter(torch.empty(d, d))
        self.b_Q = nn.Parameter(torch.zeros(d))
        self.W_KV = nn.Parameter(torch.empty(2 * d, config.d_model))
        self.b_KV = nn.Parameter(torch.zeros(2 * d))
        self.W_out = nn.Parameter(torch.empty(d, d))
        self.b_O = nn.Parameter(torch.zeros(d))
        nn.init.normal_(self.query, std=d**-0.5)
        for matrix in (self.W_Q, self.W_KV, self.W_out):
            nn.init.xavier_uniform_(matrix)
        # CoCa normalises its queries, and what they gather; the others add an MLP.
        self.ln_q = LayerNorm(d, config.ln_eps) if config.pool_norm else None
        self.ln_post = LayerNorm(d, config.ln_eps) if config.pool_norm else None
        has_mlp = config.pool_mlp > 0
        self.ln = LayerNorm(d, config.ln_eps) if has_mlp else None
        self.mlp = MLP(d, config.pool_mlp, config.pool_activation, eps=config.ln_eps) if has_mlp else None
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_attn_out = HookPoint()
        if has_mlp:
            self.hook_mlp_out = HookPoint()

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(self.W_KV, "(two h e) d -> two h d e", two=2, h=self.n_heads)[1]

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_pool"]:
        return rearrange(self.W_out, "d (h e) -> h e d", h=self.n_heads)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        return rearrange(self.b_KV, "(two h e) -> two h e", two=2, h=self.n_heads)[1]

    def forward(self, x: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch d_pool"]:
        split = {"h": self.n_heads, "e": self.d_head}
        query = self.query[:1]
        if self.ln_q is not None:
            query = self.ln_q(query.expand(len(x), -1, -1))  # a batch axis, as at every other hook
        q = rearrange(F.linear(query, self.W_Q, self.b_Q), "... n (h e) -> ... n h e", **split)
        kv = rearrange(F.linear(x, self.W_KV, self.b_KV), "b n (two h e) -> two b n h e", two=2, **split)
        q, k, v = self.hook_q(q.expand(len(x), -1, -1, -1)), self.hook_k(kv[0]), self.hook_v(kv[1])
        q, k, v = (rearrange(t, "b n h e -> b h n e") for t in (q, k, v))
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            scores = self.hook_attn_scores(q @ k.transpose(-2, -1) * self.d_head**-0.5)
            z = self.hook_pattern(scores.softmax(dim=-1)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        z = self.hook_z(rearrange(z, "b h n e -> b n h e"))
        out = self.hook_attn_out(F.linear(rearrange(z, "b n h e -> b n (h e)"), self.W_out, self.b_O))
        if self.mlp is not None and self.ln is not None:
            out = out + self.hook_mlp_out(self.mlp(self.ln(out)))
        return (out if self.ln_post is None else self.ln_post(out))[:, 0]
