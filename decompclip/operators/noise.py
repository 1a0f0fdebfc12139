"""RandomAblate: components replaced by noise (METHOD 2; He et al.'s "w/ Random Prototypes")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from decompclip.cache.components import Components
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.masks import ComponentMask
from decompclip.cache.moments import Moments
from decompclip.models.vit import HookedViT
from decompclip.operators.fills import Fill, Rows, show_rows
from decompclip.operators.replacement import Replacement, stream_means
from decompclip.operators.splits import Validation, moments_of

Scale = Literal["matched", "unit"]


@dataclass(frozen=True, eq=False, repr=False)
class RandomAblate(Replacement):
    """Components replaced by noise: one random direction for each, the same for all images.

    A head's direction is drawn among those that it can write. The direction of a component depends on the seed
    alone, not on what else is replaced.

    Attributes:
        components: which.
        moments: of clean images; needed for the scale "matched".
        scale: "matched": as long as the mean that it stands in for; "unit": as long as a standard normal vector,
            the square root of the width (the paper's code: about 22, against terms shorter than 1).
        seed: of the directions.
        rows: which tokens a causal edit reaches.
    """

    components: Components
    moments: Moments | Validation | None = None
    scale: Scale = field(default="matched", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    rows: Rows = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in get_args(Scale):
            raise ValueError(f"expected a scale of {get_args(Scale)}; received {self.scale!r}")
        if self.scale == "matched" and self.moments is None:
            raise ValueError(
                "expected moments, whose means the noise is to be as long as; received none; pass "
                'Moments.fit(model, batches), or scale="unit"'
            )

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        shapes = ((d.n_layers, d.n_heads, d.d_embed), (d.n_layers, d.d_embed), (d.d_embed,), (1, d.d_embed))
        noise = self._draw(shapes, d.embed)
        means: tuple[Tensor | None, ...] = (None,) * 4
        if self.moments is not None:
            moments = moments_of(self.moments)
            moments.check(d)
            means = (moments.heads, moments.mlps, moments.embed, moments.pool)
        of_heads, *others = map(self._lengths, means, noise)
        coords = d.coords.new_zeros(d.coords.shape[1:])
        if d.maps.direct:
            coords = of_heads
        elif mask.heads.any():
            chosen = mask.heads.to(coords.device)
            written = d.maps.heads[chosen]
            found = torch.einsum("kd,kdr->kr", noise[0][chosen], torch.linalg.pinv(written))
            length = torch.einsum("kr,krd->kd", found, written).norm(dim=-1, keepdim=True)
            coords[chosen] = found / length * of_heads[chosen].norm(dim=-1, keepdim=True)
        return Fill(coords, *others)

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        cfg = visual.cfg
        shapes = (
            (cfg.n_layers, 1, cfg.n_heads, cfg.d_head),
            (cfg.n_layers, 1, cfg.d_model),
            (1, cfg.d_model),
        )
        noise = self._draw((*shapes, (1, cfg.d_pool)), next(visual.parameters()))
        means: tuple[Tensor | None, ...] = (None,) * 4
        if self.moments is not None and self.scale == "matched":
            streams = stream_means(visual, moments_of(self.moments), "causal noise of matched length")
            means = (streams.z, streams.mlp_out, streams.embed, streams.pool)
        return Fill(*map(self._lengths, means, noise))

    def _draw(self, shapes: tuple[tuple[int, ...], ...], like: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(shape, generator=generator).to(like.detach()) for shape in shapes]

    def _lengths(self, mean: Tensor | None, noise: Tensor) -> Tensor:
        """The noise at the length that it is to have."""
        unit = noise / noise.norm(dim=-1, keepdim=True)
        if self.scale == "unit" or mean is None:
            return unit * noise.shape[-1] ** 0.5
        return unit * mean.to(noise).norm(dim=-1, keepdim=True)

    def __repr__(self) -> str:
        moments = "" if self.moments is None else f", {self.moments!r}"
        options = f", scale={self.scale!r}, seed={self.seed}{show_rows(self.rows)}"
        return f"RandomAblate({self.components!r}{moments}{options})"
