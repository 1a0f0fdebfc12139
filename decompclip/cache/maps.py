"""TermMaps: the fixed linear maps from a component's coordinates to the joint image-text space.

The last LayerNorm is linear once its scale sigma is that of this very image (METHOD 1), so a head's
term is a few numbers of the image times a matrix of the model:

    centred   (z - b_V) / sigma                @ ls1 W_O C gamma P                C: subtracts the mean
    paper     [z, 1, mu, sigma] / sigma        @ [ls1 W_O; ls1 b_O / H; -1 / s; beta / (s gamma)] gamma P

with `s = (2 L + 1) H` equal shares of the stream's mean mu and of the bias beta. The left factor has
d_head (+ 3) numbers where the term has d_embed: means, Grams and products are taken there, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.models.vit import Block, HookedViT

Convention = Literal["centred", "paper"]
SHARES = 3  # coordinates that the paper's convention adds to a head's d_head: 1/sigma, mu/sigma, 1


def check_convention(convention: str) -> None:
    """Raises ValueError unless `convention` is a known one."""
    if convention not in get_args(Convention):
        raise ValueError(f"expected a convention of {get_args(Convention)}; received {convention!r}")


@dataclass(frozen=True, eq=False)
class TermMaps:
    """Maps from coordinates to terms, shared by all decompositions of a model.

    Attributes:
        heads: of each head; `coord` is d_head, or d_head + 3 in the paper's convention.
        bias: the constants that the image scales (or, for the last, does not).
        bias_names: "attn_bias 0", ..., "ln_final bias"; none in the paper's convention, which shares them out.
    """

    heads: Float[Tensor, "layer head coord d_embed"]
    bias: Float[Tensor, "bias d_embed"]
    bias_names: tuple[str, ...]
    convention: Convention

    def __post_init__(self) -> None:
        check_convention(self.convention)

    @property
    def d_head(self) -> int:
        return self.heads.shape[2] - (SHARES if self.convention == "paper" else 0)

    @cached_property
    def grams(self) -> Float[Tensor, "layer head coord coord"]:
        """Dot products of terms as products of coordinates: `term_i . term_j = c_i @ gram @ c_j`."""
        return self.heads @ self.heads.mT

    def matches(self, other: TermMaps) -> bool:
        """Whether coordinates under `other` mean the same as under these maps: one model, one convention."""
        if self is other:
            return True
        if self.convention != other.convention or self.heads.shape != other.heads.shape:
            return False
        theirs = other.heads.to(self.heads)
        return bool((self.heads - theirs).abs().max() <= 1e-3 * self.heads.abs().max())

    def to(self, *args: Any, **kwargs: Any) -> TermMaps:
        """On another device or in another dtype, as `torch.Tensor.to`; itself where nothing changes."""
        heads, bias = self.heads.to(*args, **kwargs), self.bias.to(*args, **kwargs)
        if heads is self.heads and bias is self.bias:
            return self
        return TermMaps(heads, bias, self.bias_names, self.convention)

    def __repr__(self) -> str:
        layers, heads, coord, d_embed = self.heads.shape
        return f"TermMaps({self.convention}: {layers} layers x {heads} heads, {coord} -> {d_embed})"


# A model's maps, while the model lives and its weights stay as they are.
_CACHE: WeakKeyDictionary[HookedViT, dict[Convention, tuple[object, TermMaps]]] = WeakKeyDictionary()


def term_maps(visual: HookedViT, convention: Convention) -> TermMaps:
    """The maps of a tower, built once for its present weights; in fp32 at least.

    Raises:
        ValueError: an unknown convention.
    """
    check_convention(convention)
    # An optimizer's step raises a parameter's version; moves and casts change its address. Should a write
    # past autograd go unseen, the sum of a decomposition misses the feature, and `decompose` raises.
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in visual.parameters()]
    kept = _CACHE.setdefault(visual, {})
    if convention not in kept or kept[convention][0] != state:
        kept[convention] = (state, _build(visual, convention))
    return kept[convention][1]


def final_map(visual: HookedViT, convention: Convention) -> Float[Tensor, "d_model d_embed"]:
    """`gamma P`, from the stream over sigma to the joint space; in the centred convention past `C`."""
    final = wide(visual.ln_final.w)[:, None] * wide(visual.proj)
    return final - final.mean(0, keepdim=True) if convention == "centred" else final


def blocks(visual: HookedViT) -> list[Block]:
    """The tower's blocks, as what they are."""
    return cast(list[Block], list(visual.blocks))


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def _build(visual: HookedViT, convention: Convention) -> TermMaps:
    final = final_map(visual, convention)
    beta = wide(visual.ln_final.b) @ wide(visual.proj)
    heads, rows = [], []
    shares = (2 * visual.cfg.n_layers + 1) * visual.cfg.n_heads
    for block in blocks(visual):
        scale = 1.0 if block.ls1 is None else wide(block.ls1)
        W_O, b_O = wide(block.attn.W_O) * scale, wide(block.attn.b_O) * scale
        written = W_O @ final
        if convention == "paper":
            constants = torch.stack([b_O @ final / visual.cfg.n_heads, -final.sum(0) / shares, beta / shares])
            heads.append(torch.cat([written, constants.expand(len(written), -1, -1)], dim=1))
        else:
            heads.append(written)
            rows.append((torch.einsum("he,hed->d", wide(block.attn.b_V), W_O) + b_O) @ final)
    if convention == "paper":
        return TermMaps(torch.stack(heads), beta.new_empty(0, len(beta)), (), convention)
    names = (*(f"attn_bias {layer}" for layer in range(len(rows))), "ln_final bias")
    return TermMaps(torch.stack(heads), torch.stack([*rows, beta]), names, convention)
