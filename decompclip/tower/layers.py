"""The layers of a tower: attention, LayerNorm with a live scale, MLP, attention pool, and the block made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from decompclip.tower.config import Activation, Rope, ViTConfig


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


class LayerNorm(nn.Module):
    """LayerNorm with a live scale: editing `hook_scale` changes what is divided by."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        if not (self.hook_scale.has_hooks() or self.hook_normalized.has_hooks()):
            return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        centred, scale = self.split(x)
        # In the weights' dtype: half for a half model, full under autocast, as the fused kernel has it.
        normalized = self.hook_normalized((centred / scale).to(self.w.dtype))
        return normalized * self.w + self.b

    def split(
        self, x: Float[Tensor, "*rows width"]
    ) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows 1"]]:
        """The rows past their means, and the scale that they are divided by; in fp32 at least."""
        # Two passes: E[x^2] - E[x]^2 cancels in half precision.
        wide = x if x.dtype == torch.float64 else x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        return centred, self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIPs were trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by the hyperbolic tangent."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
}


class MLP(nn.Module):
    """Two linear maps with an activation between; gated: `act(x W_gate) * (x W_in)`.

    Where it is gated, `W_in` holds the gate's map above the other's, so that both are one product.
    """

    def __init__(
        self,
        d_in: int,
        d_mlp: int,
        activation: Activation,
        *,
        gated: bool = False,
        norm: bool = False,
        norm_in: bool = False,
        eps: float,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.W_in = nn.Parameter(torch.empty(d_mlp * (1 + gated), d_in))
        self.b_in = nn.Parameter(torch.zeros(d_mlp * (1 + gated)))
        self.W_out = nn.Parameter(torch.empty(d_in, d_mlp))
        self.b_out = nn.Parameter(torch.zeros(d_in))
        nn.init.xavier_uniform_(self.W_in)
        nn.init.xavier_uniform_(self.W_out)
        self.act = ACTIVATIONS[activation]
        self.ln_in = LayerNorm(d_in, eps) if norm_in else None
        self.ln = LayerNorm(d_mlp, eps) if norm else None
        self.hook_pre = HookPoint()
        if gated:
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch row d_in"]) -> Float[Tensor, "batch row d_in"]:
        x = x if self.ln_in is None else self.ln_in(x)
        pre = F.linear(x, self.W_in, self.b_in)
        if self.gated:
            gate, linear = pre.chunk(2, dim=-1)
            post = self.act(self.hook_pre(gate)) * self.hook_pre_linear(linear)
        else:
            post = self.act(self.hook_pre(pre))
        if self.ln is not None:
            post = self.ln(post)
        return F.linear(self.hook_post(post), self.W_out, self.b_out)


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
        has_mlp = config.has_pool
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
        if self.mlp is not None:
            assert self.ln is not None, "an MLP has a LayerNorm before it"
            out = out + self.hook_mlp_out(self.mlp(self.ln(out)))
        return (out if self.ln_post is None else self.ln_post(out))[:, 0]


class Block(nn.Module):
    """`x + attn(ln1(x))`, then `x + mlp(ln2(x))`; post-norm: `x + ln1(attn(x))`, then `x + ln2(mlp(x))`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.d_model, config.ln_eps)
        self.attn = Attention(config)
        self.ln2 = LayerNorm(config.d_model, config.ln_eps)
        self.mlp = MLP(
            config.d_model,
            config.d_mlp,
            config.activation,
            gated=config.gated,
            norm=config.mlp_norm,
            norm_in=config.mlp_norm_in,
            eps=config.ln_eps,
        )
        self.post_norm = config.norm == "post"
        ones = torch.ones(config.d_model)
        self.ls1 = nn.Parameter(ones.clone()) if config.layer_scale else None
        self.ls2 = nn.Parameter(ones.clone()) if config.layer_scale else None
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch token d_model"],
        rope: Float[Tensor, "2 patch d_head"] | None = None,
        *,
        pooled_row_only: bool = False,
    ) -> Float[Tensor, "batch row d_model"]:
        x = self.hook_resid_pre(x)
        attn = self.attn(x if self.post_norm else self.ln1(x), rope, pooled_row_only=pooled_row_only)
        attn = self.ln1(attn) if self.post_norm else attn
        attn = self.hook_attn_out(attn if self.ls1 is None else attn * self.ls1)
        x = self.hook_resid_mid((x[:, :1] if pooled_row_only else x) + attn)
        mlp = self.ln2(self.mlp(x)) if self.post_norm else self.mlp(self.ln2(x))
        mlp = self.hook_mlp_out(mlp if self.ls2 is None else mlp * self.ls2)
        return self.hook_resid_post(x + mlp)


def blocks(visual: nn.Module) -> list[Block]:
    """A tower's blocks, as what they are."""
    return cast(list[Block], list(visual.get_submodule("blocks").children()))
