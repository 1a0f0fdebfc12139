"""Components replaced by noise (docs/method.md, section 2; He et al.'s "w/ Random Prototypes").

Noise is drawn as what a component adds to the stream. Its term is what reaches the feature of that, at the image's own
frozen scale of the last LayerNorm.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.api import check_choice
from decompclip.decomposition.components import ComponentMask, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import TermMaps, frozen, term_maps, wide
from decompclip.decomposition.moments import Moments
from decompclip.operators.ablation import (
    Fill,
    Replacement,
    check_moments,
    value_biases,
)
from decompclip.operators.intervention import Where
from decompclip.tower.vit import HookedViT, tower

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True, eq=False)
class Weights:
    """How much reaches the feature of a vector that is added to the stream at every token alike.

    These are `decompclip.decomposition.terms.Rows.weights`, summed over rows; in the centred convention the constant
    terms have them as their scales.

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
    """What components add to the stream: a vector each (for heads of z, past the value bias); None for an unknown tower."""

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
                # A head that adds nothing has no noise either: its goal is zero.
                found = found.clamp_min(torch.finfo(found.dtype).tiny)
                changed[name] = write * (goal.to(found).norm(dim=-1, keepdim=True) / found).to(write)
        return replace(self, **changed)

    def terms(self, weights: Weights, maps: TermMaps, visual: HookedViT | None) -> Fill:
        """Of images whose weights these are: heads in their coordinates, and the rest where the tower is known."""
        like = maps.heads
        of_heads, of_stream, of_pool = (weights[kind].to(like) for kind in ("heads", "stream", "pool"))
        z = self.heads.to(like)
        if maps.tokens is None:
            coords = of_heads[..., None] * z  # of the one pooling head
        else:
            assert maps.out is not None
            per = torch.einsum("lhe,lhqep->lhqp", z, maps.tokens)
            coords = torch.einsum(
                "...lq,lhqd->...lhd", of_heads, torch.einsum("lhqp,qpd->lhqd", per, maps.out)
            )
        none = coords.new_zeros(())
        if visual is None:
            return Fill(coords, none, none)
        assert self.mlps is not None and self.embed is not None and self.pool is not None
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
    wide_maps = replace(maps, heads=eye, extras=0, tokens=tokens)
    return d.with_fields(coords=d.heads, maps=wide_maps, token_terms=None)


Scale = Literal["matched", "unit"]


@dataclass(frozen=True, eq=False, repr=False)
class RandomAblate(Replacement):
    """Components replaced by noise.

    scale="matched": one vector a component is drawn, for all images and all tokens alike, of what it adds to the stream (a
    head: z past its value bias). Its length is such that its mean term is as long as the component's own mean term.
    Causal mode adds the vector to the stream; direct mode puts in its term, at the image's own frozen scale.

    scale="unit": terms are drawn, standard normal in every dimension of the joint space, anew for every image and
    component, as the paper's code does (for width 512 about 22 long, against terms shorter than 1). The draw of an image
    depends on the seed and on the image alone, known by the signs of its feature and of its last MLP's term: not on the
    batch. Heads cannot make such terms: there is no causal edit of this kind, and heads' coordinates come out as their
    terms, so that in a composition it stands last.

    The draw of a component does not depend on what else is replaced.

    Attributes:
        components, rows: as in `Replacement`.
        moments: of clean images, in the centred convention; needed for "matched".
        scale: "matched", or "unit", for direct mode alone.
        seed: of the draw.
        model: needed for "matched" in direct mode, where more than heads is replaced: its weights turn what MLPs and the
            rest add into terms.
    """

    moments: Moments | None = None
    _: KW_ONLY
    scale: Scale = "matched"
    seed: int = 0
    model: HookedViT | HookedCLIP | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, Scale)
        if self.scale == "unit":
            return
        if self.moments is None:
            raise ValueError(
                "expected moments, whose means the noise is to be as long as; received none; pass "
                'Moments.fit(model, batches), or scale="unit"'
            )
        check_moments(self.moments)
        if self.moments.maps.convention != "centred":
            raise ValueError(
                "expected moments in the centred convention, in which a term is what its component writes; received "
                "convention='paper'; fit them in the centred one, or pass scale=\"unit\""
            )

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        if self.scale == "matched" or d.maps.direct or not resolve(self.components, d).heads.any():
            return super().__call__(d, where=where)
        wide = as_terms(d)
        edited = super().__call__(wide, where=where)
        return d if edited is wide else edited

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        if self.scale == "unit":
            return _standard_normal(d, mask, self.seed)
        moments = self._means
        moments.check(d)
        visual = None
        if mask.mlps.any() or mask.embed or mask.pool:
            if self.model is None:
                raise ValueError(
                    f"expected the model, through whose weights the noise of {self.components!r} becomes terms; "
                    "received none; pass RandomAblate(..., model=model)"
                )
            visual = tower(self.model)
            moments.check_model(term_maps(visual, "centred"))
        return self._writes(visual).terms(Weights.of(d), d.maps, visual)

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        if self.scale == "unit":
            raise ValueError(
                'expected scale="matched" for a causal edit; received "unit", the paper\'s noise in every dimension of '
                "the joint space, which no component can write to the stream"
            )
        self._means.check_model(term_maps(visual, "centred"))
        writes = self._writes(visual)
        assert writes.mlps is not None and writes.embed is not None
        silent = value_biases(visual)
        z = silent + writes.heads[:, None].to(silent)
        return Fill(z, writes.mlps[:, None], writes.embed[None], writes.pool)

    @property
    def _means(self) -> Moments:
        assert self.moments is not None  # without them the scale is "unit"
        return self.moments

    def _writes(self, visual: HookedViT | None) -> Writes:
        return Writes.draw(self.seed, self._means.maps, visual).matched(self._means, visual)

    def _about(self) -> str:
        moments = "" if self.moments is None else f", {self.moments!r}"
        return f"{moments}, scale={self.scale!r}, seed={self.seed}"


def _standard_normal(d: Decomposition, mask: ComponentMask, seed: int) -> Fill:
    """Terms of every image, drawn for the components in the mask alone."""
    signs = torch.cat([d.features, d.mlps[:, -1]], 1).cpu() > 0
    heads = torch.zeros(len(d), d.n_layers, d.n_heads, d.d_embed)
    mlps, embed = torch.zeros(len(d), d.n_layers, d.d_embed), torch.zeros(len(d), d.d_embed)
    pool = torch.zeros_like(d.pool, device="cpu")
    chosen: list[tuple[str, Tensor]] = [
        *((f"heads {i}", heads[:, i]) for i in range(d.n_layers) if mask.heads[i].any()),
        *((f"mlp {i}", mlps[:, i]) for i in range(d.n_layers) if mask.mlps[i]),
        *([("embed", embed)] if mask.embed else []),
        *([("pool", pool)] if mask.pool else []),
    ]
    for image, known in enumerate(signs.numpy()):
        key = blake2b(np.packbits(known).tobytes(), digest_size=16, key=str(seed).encode()).digest()
        for name, terms in chosen:
            digest = blake2b(name.encode(), digest_size=8, key=key).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            terms[image] = torch.randn(terms.shape[1:], generator=generator)
    return Fill(heads, mlps, embed, pool)
