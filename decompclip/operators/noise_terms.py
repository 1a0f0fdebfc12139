"""What noise written to the stream is as terms: one write, read at an image's own frozen scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import TermMaps, frozen
from decompclip.cache.moments import Moments
from decompclip.cache.readout import wide
from decompclip.models.vit import HookedViT
from decompclip.operators.fills import Fill


@dataclass(frozen=True, eq=False)
class Weights:
    """How much of a write that is the same at every token reaches the feature (`Rows.weights`, summed over rows).

    In the centred convention the constant terms carry these sums as their scales.

    Attributes:
        heads: past a LayerNorm behind the heads, where there is one.
        stream: of all else.
        pool: of the pool's MLP.
    """

    heads: Float[Tensor, "*batch layer pool_head"]
    stream: Float[Tensor, "*batch pool_head"]
    pool: Float[Tensor, "*batch"]

    @staticmethod
    def of(terms: Decomposition | Moments) -> Weights:
        """Those of each image, or their means; the terms must be centred."""
        scales, names, n_layers = terms.bias_coords, terms.maps.bias_names, len(terms.maps.heads)
        of_heads, behind = (
            [i for i, name in enumerate(names) if name.startswith(f"{kind} ")]
            for kind in ("attn_bias", "attn_norm_bias")
        )
        heads = scales[..., of_heads].unflatten(-1, (n_layers, -1))
        stream = scales[..., behind].unflatten(-1, (n_layers, -1)) if behind else heads
        one = scales[..., -1] if terms.normalized else torch.ones_like(scales[..., -1])
        return Weights(heads, stream[..., 0, :], one)

    def __getitem__(self, kind: str) -> Tensor:
        return getattr(self, kind)


@dataclass(frozen=True, eq=False)
class Writes:
    """One vector for each component, of z past the value bias for heads; None where the tower is not known."""

    heads: Float[Tensor, "layer head d_head"]
    mlps: Float[Tensor, "layer d_model"] | None = None
    embed: Float[Tensor, " d_model"] | None = None
    pool: Float[Tensor, "1 d_pool"] | None = None

    @staticmethod
    def draw(seed: int, maps: TermMaps, visual: HookedViT | None) -> Writes:
        """Standard normal. Heads are drawn first, so that theirs need no tower."""
        generator = torch.Generator().manual_seed(seed)
        n_layers, n_heads = maps.heads.shape[:2]
        shapes: list[tuple[int, ...]] = [(n_layers, n_heads, maps.d_head)]
        if visual is not None:
            cfg = visual.cfg
            shapes += [(n_layers, cfg.d_model), (cfg.d_model,), (1, cfg.d_pool)]
        return Writes(*(torch.randn(shape, generator=generator).to(maps.heads) for shape in shapes))

    def matched(self, moments: Moments, visual: HookedViT | None) -> Writes:
        """As long as makes their mean terms as long as those of the moments."""
        maps = moments.maps
        mean = self.terms(Weights.of(moments), maps, visual)
        assert isinstance(mean.heads, Tensor)
        terms = {"heads": maps.terms(mean.heads), "mlps": mean.mlps, "embed": mean.embed, "pool": mean.pool}
        changed = {}
        for name, term in terms.items():
            write, goal = getattr(self, name), getattr(moments, name)
            if write is not None and isinstance(term, Tensor) and goal.numel():
                found = term.norm(dim=-1, keepdim=True)
                # A head that writes nothing has no noise either.
                length = torch.where(found > 0, goal.to(found).norm(dim=-1, keepdim=True) / found, 0)
                changed[name] = write * length.to(write)
        return replace(self, **changed)

    def terms(self, weights: Weights, maps: TermMaps, visual: HookedViT | None) -> Fill:
        """Of images whose weights these are: heads in their coordinates, and the rest where the tower is known."""
        like = maps.heads
        of_heads, of_stream, of_pool = (weights[kind].to(like) for kind in ("heads", "stream", "pool"))
        z = self.heads.to(like)
        if maps.tokens is None or maps.out is None:
            coords = of_heads[..., None] * z  # of the one pooling head
        else:
            per = torch.einsum("lhe,lhqep->lhqp", z, maps.tokens)
            coords = torch.einsum(
                "...lq,lhqd->...lhd", of_heads, torch.einsum("lhqp,qpd->lhqd", per, maps.out)
            )
        none = coords.new_zeros(())
        if visual is None or self.mlps is None or self.embed is None or self.pool is None:
            return Fill(coords, none, none)
        fixed = frozen(visual, "centred")

        def read(stream: Tensor) -> Tensor:
            """Through each head of the pooling: [*part pool_head d_embed]."""
            mid = torch.einsum("...d,qdp->...qp", stream.to(fixed.into), fixed.into)
            return mid if fixed.read.out is None else torch.einsum("...qp,qpd->...qd", mid, fixed.read.out)

        pool = self.pool if visual.proj is None else self.pool.to(fixed.into) @ wide(visual.proj)
        return Fill(
            coords,
            torch.einsum("...q,lqd->...ld", of_stream, read(self.mlps).to(like)),
            torch.einsum("...q,qd->...d", of_stream, read(self.embed).to(like)),
            of_pool[..., None, None] * pool.to(like).detach(),
        )


def as_terms(d: Decomposition) -> Decomposition:
    """The same, with heads' terms for coordinates: they can then be any vector of the joint space."""
    maps, d_embed = d.maps, d.d_embed
    eye = torch.eye(d_embed).to(maps.heads).expand(*maps.heads.shape[:2], -1, -1)
    # Token maps of no pooling head say that coordinates are terms; the tokens themselves go with the edit.
    tokens = maps.heads.new_empty(*maps.heads.shape[:2], 0, maps.d_head, 0)
    wide_maps = replace(maps, heads=eye, extras=0, tokens=tokens, out=None)
    return replace(d, coords=d.heads, maps=wide_maps, token_terms=None)
