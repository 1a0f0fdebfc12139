"""HookedViT: the one forward pass through an image tower, with a hook point at every step.

Names are TransformerLens' (`blocks.3.attn.hook_z`, `ln_final.hook_scale`), so that its idioms carry over.
Activations that a fused kernel never forms (attention scores, pattern, per-head results, LayerNorm's
scale) are computed only while somebody listens to their hook point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from decompclip.models.config import ViTConfig

Hook = tuple[str | Callable[..., bool], Callable[..., Any]]
"""A hook point's name, or a choice among names, and what to do there; as TransformerLens takes them."""

if TYPE_CHECKING:
    from decompclip.cache.activations import ViTCache


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIPs were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class LayerNorm(nn.Module):
    """LayerNorm with a live scale: editing `hook_scale` changes what is divided by."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        if not (self.hook_scale.has_hooks() or self.hook_normalized.has_hooks()):
            return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        # Two passes in fp32 at least: E[x^2] - E[x]^2 cancels in half precision.
        wide = x if x.dtype == torch.float64 else x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized((centred / scale).to(x.dtype))
        return normalized * self.w + self.b


class Attention(nn.Module):
    """Multi-head self-attention, fused unless somebody reads the scores or the pattern."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, self.n_heads, self.d_head = config.d_model, config.n_heads, config.d_head
        self.W_QKV = nn.Parameter(torch.empty(3 * d, d))
        self.b_QKV = nn.Parameter(torch.zeros(3 * d))
        self.W_out = nn.Parameter(torch.empty(d, d))
        self.b_O = nn.Parameter(torch.zeros(d))
        nn.init.xavier_uniform_(self.W_QKV)
        nn.init.xavier_uniform_(self.W_out)
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

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

    def forward(
        self, x: Float[Tensor, "batch token d_model"], *, pooled_row_only: bool = False
    ) -> Float[Tensor, "batch row d_model"]:
        """Attention's output for every token, or for token 0 alone."""
        q, k, v = self._project(x, pooled_row_only)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        q, k, v = (rearrange(t, "b n h e -> b h n e") for t in (q, k, v))
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            scores = self.hook_attn_scores(q @ k.transpose(-2, -1) * self.d_head**-0.5)
            z = self.hook_pattern(scores.softmax(dim=-1)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        z = self.hook_z(rearrange(z, "b h n e -> b n h e"))
        if self.hook_result.has_hooks():
            result = self.hook_result(torch.einsum("bnhe,hed->bnhd", z, self.W_O))
            return result.sum(dim=2) + self.b_O
        return F.linear(rearrange(z, "b n h e -> b n (h e)"), self.W_out, self.b_O)

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


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        self.b_in = nn.Parameter(torch.zeros(config.d_mlp))
        self.W_out = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.b_out = nn.Parameter(torch.zeros(config.d_model))
        nn.init.xavier_uniform_(self.W_in)
        nn.init.xavier_uniform_(self.W_out)
        self.act = ACTIVATIONS[config.activation]
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row d_model"]:
        pre = self.hook_pre(F.linear(x, self.W_in, self.b_in))
        return F.linear(self.hook_post(self.act(pre)), self.W_out, self.b_out)


class Block(nn.Module):
    """`x + attn(ln1(x))`, then `x + mlp(ln2(x))`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.d_model, config.ln_eps)
        self.attn = Attention(config)
        self.ln2 = LayerNorm(config.d_model, config.ln_eps)
        self.mlp = MLP(config)
        ones = torch.ones(config.d_model)
        self.ls1 = nn.Parameter(ones.clone()) if config.layer_scale else None
        self.ls2 = nn.Parameter(ones.clone()) if config.layer_scale else None
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, x: Float[Tensor, "batch token d_model"], *, pooled_row_only: bool = False
    ) -> Float[Tensor, "batch row d_model"]:
        x = self.hook_resid_pre(x)
        attn = self.attn(self.ln1(x), pooled_row_only=pooled_row_only)
        attn = self.hook_attn_out(attn if self.ls1 is None else attn * self.ls1)
        x = self.hook_resid_mid((x[:, :1] if pooled_row_only else x) + attn)
        mlp = self.mlp(self.ln2(x))
        mlp = self.hook_mlp_out(mlp if self.ls2 is None else mlp * self.ls2)
        return self.hook_resid_post(x + mlp)


class HookedViT(HookedRootModule):
    """An image tower: images to features in the joint space.

    Built by `decompclip.load` from a source model's weights; parity with the source is tested.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.cfg = config
        d = config.d_model
        self.W_E = nn.Parameter(torch.empty(d, 3, *config.patch_size))
        self.cls = nn.Parameter(torch.empty(d))
        self.W_pos = nn.Parameter(torch.empty(config.n_tokens, d))
        for p in (self.W_E, self.cls, self.W_pos):
            nn.init.normal_(p, std=d**-0.5)
        self.ln_pre = LayerNorm(d, config.ln_eps) if config.ln_pre else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = LayerNorm(d, config.ln_eps)
        self.proj = nn.Parameter(torch.empty(d, config.d_embed))
        nn.init.normal_(self.proj, std=d**-0.5)
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.hook_ln_pre = HookPoint()
        self.setup()
        self._last_block_hooks = [
            point
            for name, point in self.hook_dict.items()
            if name.startswith(f"blocks.{config.n_layers - 1}.")
        ]

    def forward(
        self, images: Float[Tensor, "batch 3 h w"], *, pooled_rows: bool | None = None
    ) -> Float[Tensor, "batch d_embed"]:
        """Image features, not normalised.

        Only token 0 of the last block reaches the feature. Its other rows are computed when a hook in that
        block may want them; `pooled_rows=True` says that the hooks read token 0 alone.

        Raises:
            ValueError: the images are not `[batch, 3, h, w]` of the tower's size.
        """
        self._check(images)
        patches = F.conv2d(images, self.W_E, stride=self.cfg.patch_size)
        patches = rearrange(patches, "b d rows columns -> b (rows columns) d")
        cls = self.cls.to(patches.dtype).expand(len(images), 1, -1)
        x = self.hook_embed(torch.cat([cls, patches], dim=1))
        x = x + self.hook_pos_embed(self.W_pos.to(x.dtype).expand_as(x))
        x = self.hook_ln_pre(x if self.ln_pre is None else self.ln_pre(x))
        if pooled_rows is None:
            pooled_rows = not any(point.has_hooks() for point in self._last_block_hooks)
        for layer, block in enumerate(self.blocks):
            x = block(x, pooled_row_only=pooled_rows and layer == self.cfg.n_layers - 1)
        return self.ln_final(x[:, :1])[:, 0] @ self.proj  # a token axis, as at every other hook

    def _check(self, images: Tensor) -> None:
        expected = (3, *self.cfg.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"expected images [batch, {', '.join(map(str, expected))}], got {list(images.shape)}; "
                "pass them through the model's `preprocess` first"
            )

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Float[Tensor, "batch d_embed"], ViTCache]:
        """Features and a typed cache of activations (`names_filter`, `device`... as in TransformerLens)."""
        from decompclip.cache.activations import ViTCache

        remove_batch_dim = kwargs.get("remove_batch_dim", False)
        features, cache = super().run_with_cache(*args, **kwargs)
        return features, ViTCache(cache, self, has_batch_dim=not remove_batch_dim)
