"""Ablation: components replaced by their mean over clean images, or by nothing.

Source: METHOD 2; He et al. (ICML 2025), section 3.2 (mean) and their "w/ Abandon" (zero).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.cache.components import Components
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.masks import ComponentMask
from decompclip.cache.moments import Moments
from decompclip.models.vit import HookedViT, blocks
from decompclip.operators.fills import Fill, Rows, show_rows
from decompclip.operators.replacement import Replacement, stream_means
from decompclip.operators.splits import Validation, moments_of


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Replacement):
    """Components replaced by their means.

    Direct: by mean terms. Causal: by the stream means of each token position (`Moments.fit(stream=True)`). Single
    neurons have means of their own: `AblateNeurons(neurons[3], fill=mean_neurons(visual, batches, neurons[3]))`.

    Attributes:
        components: which, e.g. `mlps[-5:]`.
        moments: of clean images, under the same model, convention and normalization; a `Validation` knows whose.
        rows: which tokens a causal edit reaches: "all", the "pooled" ones, "patches", numbers or a mask.
    """

    components: Components
    moments: Moments | Validation
    rows: Rows = field(default="all", kw_only=True)

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        moments = moments_of(self.moments)
        moments.check(d)
        return Fill(moments.coords, moments.mlps, moments.embed, moments.pool)

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        streams = stream_means(visual, moments_of(self.moments), "causal mean-ablation")
        return Fill(streams.z, streams.mlp_out, streams.embed, streams.pool)

    def __repr__(self) -> str:
        return f"MeanAblate({self.components!r}, {self.moments!r}{show_rows(self.rows)})"


@dataclass(frozen=True, eq=False, repr=False)
class ZeroAblate(Replacement):
    """Components removed.

    Direct: their terms are zero. Causal: MLPs write nothing, and heads their value bias alone (z = b_V), which
    in the centred convention is no part of a head's term: so the two modes remove the same thing.

    Attributes:
        components: which, e.g. `heads[-1]`.
        rows: which tokens a causal edit reaches: "all", the "pooled" ones, "patches", numbers or a mask.
    """

    components: Components
    rows: Rows = field(default="all", kw_only=True)

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        none = d.embed.new_zeros(d.d_embed)
        return Fill(none.new_zeros(d.coords.shape[1:]), none.expand(d.n_layers, -1), none, none[None])

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        z = value_biases(visual)
        none = z.new_zeros(visual.cfg.n_layers, 1, visual.cfg.d_model)
        return Fill(z, none, none[0], z.new_zeros(1, visual.cfg.d_pool))

    def __repr__(self) -> str:
        return f"ZeroAblate({self.components!r}{show_rows(self.rows)})"


def value_biases(visual: HookedViT) -> Float[Tensor, "layer 1 head d_head"]:
    """What heads leave in z when they are silent."""
    return torch.stack([block.attn.b_V.detach() for block in blocks(visual)])[:, None]
