"""The fixed linear maps from the stream to the joint space, for every way of pooling (docs/method.md, section 1).

With the scales of LayerNorms and the attention of a pooling query frozen at what they were for an image,
the feature is affine in the last stream `x [row d_model]`. For pooling head q (one, but for attention pools)

    R = sum_q (sum_n a[q, n] x[n]) @ A[q] @ B[q]  +  constants

    class token          a = 1 / sigma                  A = C gamma P                    B = 1
    mean of rows         a = 1 / (N sigma[n])           (sigma of the mean row, where it is normalised last)
    attention pool       a = attention[q, n] / sigma[n] A = C gamma W_V[q]               B = W_O[q] P

`C` subtracts the mean over d_model. CoCa's second LayerNorm is frozen too: `a` is over its scale as well, and
`B = W_O[q] C gamma' P`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.tower.vit import HookedViT, blocks


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`: terms are exact where the tower itself is not."""
    return torch.autocast(x.device.type, enabled=False)


@dataclass(frozen=True, eq=False)
class Readout:
    """From the pooled stream to the feature.

    Attributes:
        into: `A`, not centred; its columns sum to `total` over d_model.
        out: `B`; None where it is the identity.
        constants: by name, what is added whatever the image; "scaled" ones are over the scale of CoCa's
            last LayerNorm.
    """

    into: Float[Tensor, "pool_head d_model d_mid"]
    out: Float[Tensor, "pool_head d_mid d_embed"] | None
    constants: dict[str, Float[Tensor, " d_embed"]]
    scaled: frozenset[str]

    @property
    def centred(self) -> Float[Tensor, "pool_head d_model d_mid"]:
        return self.into - self.into.mean(1, keepdim=True)

    def finish(self, mid: Float[Tensor, "*part pool_head d_mid"]) -> Float[Tensor, "*part d_embed"]:
        """`B`, summed over the pooling's heads."""
        if self.out is None:
            return mid.squeeze(-2)
        return mid.flatten(-2) @ self.out.flatten(0, 1)


@torch.no_grad()
def readout(visual: HookedViT) -> Readout:
    """The maps of a tower with its present weights, in fp32 at least."""
    gamma, beta = wide(visual.ln_final.w), wide(visual.ln_final.b)
    pool = visual.pool
    proj = torch.eye(visual.cfg.d_pool).to(gamma) if visual.proj is None else wide(visual.proj)
    constants = {} if visual.b_proj is None else {"proj bias": wide(visual.b_proj)}
    if pool is None:
        return Readout(
            (gamma[:, None] * proj)[None], None, {"ln_final bias": beta @ proj, **constants}, frozenset()
        )
    W_V, W_O = wide(pool.W_V), wide(pool.W_O)
    end = proj
    if pool.ln_post is not None:
        constants["pool ln_post bias"] = wide(pool.ln_post.b) @ proj
        end = wide(pool.ln_post.w)[:, None] * proj
        end = end - end.mean(0, keepdim=True)
    values = torch.einsum("d,qde->qe", beta, W_V) + wide(pool.b_V)
    gathered = torch.einsum("qe,qed->d", values, W_O) + wide(pool.b_O)
    scaled = frozenset({"pool bias"} if pool.ln_post is not None else ())
    return Readout(gamma[:, None] * W_V, W_O @ end, {"pool bias": gathered @ end, **constants}, scaled)


@dataclass(frozen=True, eq=False)
class Writing:
    """What heads write to the stream, as linear maps of their z, once norms behind them are frozen.

    Attributes:
        W: z over the layer's `scale` to the stream, past LayerScale.
        head_bias: written over that scale whatever the heads do, value biases aside.
        bias: written whatever the scale.
        scaled: whether there is such a scale: a LayerNorm across the heads, or behind attention.
    """

    W: Float[Tensor, "layer head d_head d_model"]
    b_V: Float[Tensor, "layer head d_head"]
    head_bias: Float[Tensor, "layer d_model"]
    bias: Float[Tensor, "layer d_model"]
    scaled: bool


@torch.no_grad()
def writing(visual: HookedViT) -> Writing:
    """The maps of a tower with its present weights, in fp32 at least."""
    post, across = visual.cfg.norm == "post", visual.cfg.attn_norm
    W, head_bias, bias = [], [], []
    for block in blocks(visual):
        written, constant = wide(block.attn.W_written), wide(block.attn.b_written)
        of_heads, fixed = torch.zeros_like(constant), constant
        if post:
            gain = wide(block.ln1.w)
            written = (written - written.mean(-1, keepdim=True)) * gain
            of_heads, fixed = (constant - constant.mean()) * gain, wide(block.ln1.b)
        scale = 1.0 if block.ls1 is None else wide(block.ls1)
        W.append(written * scale)
        head_bias.append(of_heads * scale)
        bias.append(fixed * scale)
    b_V = torch.stack([wide(block.attn.b_V) for block in blocks(visual)])
    return Writing(torch.stack(W), b_V, torch.stack(head_bias), torch.stack(bias), post or across)
