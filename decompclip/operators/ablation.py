"""Ablation: components replaced by their mean over clean images, or by nothing (METHOD 2; paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.cache.components import Components, heads, mlps
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import blocks, term_maps
from decompclip.cache.moments import Moments
from decompclip.models.vit import Hook, HookedViT
from decompclip.operators.intervention import (
    Fill,
    Intervention,
    Rows,
    Where,
    check_rows,
    edit_stream,
    edit_terms,
)

Kind = Literal["heads", "mlps"]
Scheme = Literal["forward", "backward", "separate"]


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Intervention):
    """Components replaced by their means.

    Direct: by mean terms. Causal: by the stream means of each token position (`Moments.fit(stream=True)`).

    Attributes:
        components: which, e.g. `mlps[-5:]`.
        moments: of clean images, under the same model, convention and normalization.
        rows: which tokens a causal edit reaches: "all", or the "pooled" one alone.
    """

    components: Components
    moments: Moments
    rows: Rows = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        self.moments.check(d)
        mask = self.components.resolve(d.n_layers, d.n_heads)
        return edit_terms(d, mask, Fill(self.moments.coords, self.moments.mlps, self.moments.embed), where)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        mask = self.components.resolve(visual.cfg.n_layers, visual.cfg.n_heads)
        self.moments.check_model(term_maps(visual, self.moments.maps.convention))
        if self.moments.streams is None:
            raise ValueError(
                "expected moments with stream means, which causal mean-ablation fills in; received moments of "
                "terms alone; fit them with Moments.fit(model, batches, stream=True)"
            )
        streams = self.moments.streams
        return edit_stream(mask, Fill(streams.z, streams.mlp_out, streams.embed), rows=self.rows, where=where)

    def __repr__(self) -> str:
        return f"MeanAblate({self.components!r}, {self.moments!r}{_rows(self.rows)})"


@dataclass(frozen=True, eq=False, repr=False)
class ZeroAblate(Intervention):
    """Components removed.

    Direct: their terms are zero. Causal: MLPs write nothing, and heads their value bias alone (z = b_V), which
    in the centred convention is no part of a head's term: so the two modes remove the same thing.

    Attributes:
        components: which, e.g. `heads[-1]`.
        rows: which tokens a causal edit reaches: "all", or the "pooled" one alone.
    """

    components: Components
    rows: Rows = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        mask = self.components.resolve(d.n_layers, d.n_heads)
        none = torch.zeros_like(d.embed[:1].sum(0))
        fill = Fill(none.new_zeros(d.coords.shape[1:]), none.expand(d.n_layers, -1), none)
        return edit_terms(d, mask, fill, where)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        mask = self.components.resolve(visual.cfg.n_layers, visual.cfg.n_heads)
        z = torch.stack([block.attn.b_V.detach() for block in blocks(visual)])[:, None]
        none = z.new_zeros(visual.cfg.n_layers, 1, visual.cfg.d_model)
        return edit_stream(mask, Fill(z, none, none[0]), rows=self.rows, where=where)

    def __repr__(self) -> str:
        return f"ZeroAblate({self.components!r}{_rows(self.rows)})"


def _rows(rows: Rows) -> str:
    return "" if rows == "all" else f", rows={rows!r}"


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Predictions under ablation of ever other layers.

    Attributes:
        predictions: by setting, one for each layer.
        scheme: at setting l, "forward" ablates layers 0..l, "backward" l..L-1, "separate" l alone.
        fill: what stands in for the ablated terms.
    """

    predictions: Int[Tensor, "layer batch"]
    kind: Kind
    scheme: Scheme
    fill: Literal["mean", "zero"]

    def components(self, layer: int) -> Components:
        """What setting `layer` ablates."""
        layers = {"forward": slice(layer + 1), "backward": slice(layer, None), "separate": layer}[self.scheme]
        return (heads if self.kind == "heads" else mlps)[layers]

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, layer: int) -> Int[Tensor, " batch"]:
        return self.predictions[layer]

    def __repr__(self) -> str:
        settings, images = self.predictions.shape
        return (
            f"Sweep({self.fill}-ablation of {self.kind}, {self.scheme}: {settings} settings, {images} images)"
        )


def sweep(
    d: Decomposition,
    moments: Moments | None,
    classifier: Float[Tensor, "class d_embed"],
    kind: Kind = "heads",
    scheme: Scheme = "forward",
) -> Sweep:
    """Ablate layer by layer (direct mode), and classify.

    Args:
        moments: their means are filled in; None fills in zero.

    Raises:
        ValueError: an unknown kind or scheme, moments that do not fit `d`, or a classifier of another width.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"expected a scheme of {get_args(Scheme)}; received {scheme!r}")
    return _sweep(d, moments, classifier, kind, (scheme,))[scheme]


def sweeps(
    d: Decomposition, moments: Moments | None, classifier: Float[Tensor, "class d_embed"]
) -> dict[tuple[Kind, Scheme], Sweep]:
    """All six sweeps, in one pass over the layers of each kind.

    Raises:
        ValueError: as `sweep`.
    """
    return {
        (kind, scheme): result
        for kind in get_args(Kind)
        for scheme, result in _sweep(d, moments, classifier, kind, get_args(Scheme)).items()
    }


def _sweep(
    d: Decomposition, moments: Moments | None, classifier: Tensor, kind: Kind, schemes: tuple[Scheme, ...]
) -> dict[Scheme, Sweep]:
    """By prefix sums: every setting differs from the one before by one layer's terms."""
    if moments is not None:
        moments.check(d)
    if kind not in get_args(Kind):
        raise ValueError(f"expected a kind of {get_args(Kind)}; received {kind!r}")
    if classifier.ndim != 2 or classifier.shape[1] != d.d_embed:
        raise ValueError(
            f"expected a classifier [class, {d.d_embed}]; received {list(classifier.shape)}; build it with the "
            "text tower of the same model"
        )
    classifier = classifier.to(d.features)
    predictions: dict[Scheme, list[Tensor]] = {scheme: [] for scheme in schemes}

    def classify(scheme: Scheme, features: Tensor) -> None:
        if scheme in predictions:
            predictions[scheme].append((features @ classifier.T).argmax(1))

    forward = d.features
    backward = forward + sum(_changes(d, moments, kind)) if "backward" in predictions else forward
    for change in _changes(d, moments, kind):
        classify("backward", backward)
        forward, backward = forward + change, backward - change
        classify("forward", forward)
        classify("separate", d.features + change)
    fill = "zero" if moments is None else "mean"
    return {scheme: Sweep(torch.stack(p), kind, scheme, fill) for scheme, p in predictions.items()}


def _changes(
    d: Decomposition, moments: Moments | None, kind: Kind
) -> Iterator[Float[Tensor, "batch d_embed"]]:
    """What ablating each layer adds to the features."""
    terms, fills = (
        (d.coords, moments and moments.coords) if kind == "heads" else (d.mlps, moments and moments.mlps)
    )
    for layer in range(d.n_layers):
        change = -terms[:, layer] if fills is None else fills[layer].to(terms) - terms[:, layer]
        yield change.flatten(1) @ d.maps.heads[layer].flatten(0, 1) if kind == "heads" else change
