"""LayerNorm with a live scale, the one nonlinearity between a component's write and the feature.

The MLP of a block, plain or gated, and of an attention pool.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from decompclip.tower.config import Activation, ViTConfig


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

    @classmethod
    def of(cls, config: ViTConfig) -> MLP:
        """The MLP of a block."""
        return cls(
            config.d_model,
            config.d_mlp,
            config.activation,
            gated=config.gated,
            norm=config.mlp_norm,
            norm_in=config.mlp_norm_in,
            eps=config.ln_eps,
        )

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
