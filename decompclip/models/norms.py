"""LayerNorm with a live scale, the one nonlinearity between a component's write and the feature."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint


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
