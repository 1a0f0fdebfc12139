"""RandomAblate: components replaced by noise (METHOD 2; He et al.'s "w/ Random Prototypes")."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from decompclip.cache.components import Components
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import term_maps
from decompclip.cache.masks import ComponentMask
from decompclip.cache.moments import Moments
from decompclip.models.vit import HookedViT
from decompclip.operators.ablation import value_biases
from decompclip.operators.fills import Fill, Rows, resolve, show_rows
from decompclip.operators.intervention import Where
from decompclip.operators.noise_terms import Weights, Writes, as_terms
from decompclip.operators.replacement import Replacement
from decompclip.operators.splits import Measured, Validation, apart, moments_of

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP

Scale = Literal["matched", "unit"]


@dataclass(frozen=True, eq=False, repr=False)
class RandomAblate(Replacement):
    """Components replaced by noise.

    "matched" draws, once for all images, what a component writes to the stream, at every token alike (a head: z past its value bias), as
    long as makes its mean term as long as the mean that it stands in for. Causal mode writes it; direct mode puts
    in the term of that same write, at the image's own frozen scale. "unit" draws the terms themselves, standard
    normal in every dimension of the joint space, anew for every image and component, as the paper's code does (for width
    512 about 22 long, against terms shorter than 1). An image's draw depends on the seed and on the image alone, known
    by the signs of its feature and of its last MLP's term: whatever batch it stands in, it is the same. Heads cannot write such terms, so that there is no causal edit of this kind, and
    in what comes out heads' coordinates are their terms: in a composition it stands last.

    The draw of a component does not depend on what else is replaced.

    Attributes:
        components: which.
        moments: of clean images, in the centred convention; needed for the scale "matched".
        scale: "matched", or "unit", which is for direct mode alone.
        seed: of the draw.
        rows: which tokens a causal edit reaches.
        model: needed for the scale "matched" in direct mode, where more than heads is replaced: what is written by
            MLPs and the rest becomes a term through its weights.
    """

    components: Components
    moments: Moments | Validation | None = None
    scale: Scale = field(default="matched", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    rows: Rows = field(default="all", kw_only=True)
    model: HookedViT | HookedCLIP | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in get_args(Scale):
            raise ValueError(f"expected a scale of {get_args(Scale)}; received {self.scale!r}")
        if self.scale == "unit":
            return
        if self.moments is None:
            raise ValueError(
                "expected moments, whose means the noise is to be as long as; received none; pass "
                'Moments.fit(model, batches), or scale="unit"'
            )
        if moments_of(self.moments).maps.convention != "centred":
            raise ValueError(
                "expected moments in the centred convention, in which a term is what its component writes; received "
                "convention='paper'; fit them in the centred one, or pass scale=\"unit\""
            )

    def __call__(self, d: Measured, *, where: Where | None = None) -> Decomposition:
        d = apart(self.moments, d)
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
            visual = self.model if isinstance(self.model, HookedViT) else self.model.visual
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
        return moments_of(self.moments)

    def _writes(self, visual: HookedViT | None) -> Writes:
        return Writes.draw(self.seed, self._means.maps, visual).matched(self._means, visual)

    def __repr__(self) -> str:
        moments = "" if self.moments is None else f", {self.moments!r}"
        options = f", scale={self.scale!r}, seed={self.seed}{show_rows(self.rows)}"
        return f"RandomAblate({self.components!r}{moments}{options})"


def _standard_normal(d: Decomposition, mask: ComponentMask, seed: int) -> Fill:
    """Terms of every image, drawn for the components in the mask alone."""
    signs = torch.cat([d.features, d.mlps[:, -1]], 1).cpu() > 0
    heads = torch.zeros(len(d), d.n_layers, d.n_heads, d.d_embed)
    mlps, embed, pool = (
        torch.zeros(len(d), d.n_layers, d.d_embed),
        torch.zeros(len(d), d.d_embed),
        d.pool.cpu(),
    )
    pool = torch.zeros_like(pool)
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
