"""Selector: which heads of which image look infected (docs/method.md, section 3; paper, section 4, Eq. 5).

A head of an image is flagged when its term is unlike the head's prototype, its mean over clean images.
Terms are compared in head coordinates, by the Gram matrix of the head's map: exactly, and without a
`[batch, head, d_embed]` product.

A fitted selector as one safetensors file: what was learnt, the options, whose model it is, and what judges by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from math import ceil
from operator import or_
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from jaxtyping import Bool, Float
from sklearn.exceptions import NotFittedError
from torch import Tensor

from decompclip.decomposition.components import Components, heads, resolve
from decompclip.decomposition.decomposition import Decomposition, read_tensors, write_tensors
from decompclip.decomposition.maps import Convention, same_model, term_maps
from decompclip.decomposition.moments import TERMS, Moments, StreamMeans
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import HookedViT

Similarity = Literal["dot", "cosine"]
Threshold = Literal["epsilon", "quantile"]
Clean = Decomposition | Moments | Iterable[Decomposition]
"""Clean images to fit on: decomposed at once or batch by batch, or their moments."""


class Judging(TypedDict, total=False):
    """The options of a `Selector`, as what judges by one takes them."""

    similarity: Similarity
    threshold: Threshold
    epsilon: float
    quantile: float
    components: Components | None
    convention: Convention | None


class Selector:
    """Flags heads whose term is unlike their prototype.

    Args:
        similarity: "dot": dot product of the terms of unit features with the prototype (the paper's code);
            "cosine": the cosine of the angle between the two (its text).
        threshold: "epsilon": one for all heads; since clean images average `||prototype||^2` under "dot", it
            flags small heads nearly always. "quantile": of each head's similarity over the clean images.
        epsilon: flag at or below it (paper: 0.0025 on ImageNet-1K, 0.002 on Caltech-101, 0.001 on Oxford Pets).
        quantile: share of the clean images given to `fit` that each head may flag. Those images also make the
            prototype, so that a few more of fresh ones are flagged: with 20 of them and 0.05, some 7 in 100.
        components: which heads are judged; those of the last layer in the paper. None: no head.
        convention: the convention that terms must be in; None: whichever it is fitted on.

    Attributes:
        moments_: of the clean images.
        mask_: the heads that are judged, `[layer head]`.
        prototypes_: mean coordinates, `[layer head coord]`.
        thresholds_: flag at or below it, `[layer head]`.
        deviations_: standard deviation of each head's similarity over the clean images (1 where not judged); None
            where not asked for.
    """

    moments_: Moments
    mask_: Bool[Tensor, "layer head"]
    prototypes_: Float[Tensor, "layer head coord"]
    thresholds_: Float[Tensor, "layer head"]
    deviations_: Float[Tensor, "layer head"] | None

    def __init__(
        self,
        *,
        similarity: Similarity = "dot",
        threshold: Threshold = "epsilon",
        epsilon: float = 0.002,
        quantile: float = 0.05,
        components: Components | None = heads[-1],
        convention: Convention | None = None,
    ) -> None:
        self.similarity: Similarity = similarity
        self.threshold: Threshold = threshold
        self.epsilon = epsilon
        self.quantile = quantile
        self.components = components
        self.convention: Convention | None = convention

    def fit(self, clean: Clean, *, deviations: bool = False) -> Selector:
        """Learn prototypes, and per-head thresholds, from clean images.

        Batches are seen once. Of each image, what a quantile or a deviation needs is kept: the coordinates of the
        judged heads, for their similarities are known only when the prototypes are.

        Args:
            deviations: whether to learn `deviations_`.

        Raises:
            ValueError: an unknown option; terms in another form than the options need; no images, or too few for
                the quantile; moments where a quantile or deviations need the images; components other than heads.
            IndexError: `components` names a layer or head that the model does not have.
        """
        self._check_options()
        keep = deviations or self.threshold == "quantile"
        if keep and isinstance(clean, Moments):
            raise ValueError(
                "expected a decomposition of clean images, whose similarities a quantile is taken of; received "
                'their moments; fit on the decomposition, or take threshold="epsilon"'
            )
        parts, kept, mask = [], [], None
        for part in [clean] if isinstance(clean, Decomposition | Moments) else clean:
            self._check_form(part.maps.convention, part.normalized)
            mask = self._judged(part) if mask is None else mask
            parts = [reduce(Moments.merge, [*parts, _means(part)])]
            if keep and isinstance(part, Decomposition):
                kept.append(part.coords[:, mask.to(part.coords.device)])
        if mask is None:
            raise ValueError("expected decompositions of clean images; received none; check the image source")
        self.moments_, self.mask_ = parts[0], mask
        self.prototypes_ = self.moments_.coords.to(self.moments_.maps.heads)
        self.thresholds_ = torch.full(mask.shape, float(self.epsilon)).to(self.prototypes_)
        self.deviations_ = None
        if not keep:
            return self
        found = self._judge(torch.cat(kept))
        at = mask.to(self.thresholds_.device)
        if self.threshold == "quantile":
            self._check_count(len(found))
            if at.any():
                quantiles = found.quantile(self.quantile, dim=0, interpolation="lower")
                self.thresholds_[at] = quantiles.to(self.thresholds_)
        if deviations:
            self.deviations_ = torch.ones_like(self.thresholds_)
            # A head that never varies would turn rounding into an excess without bound.
            least = torch.finfo(found.dtype).eps * found.abs().mean(0).clamp_min(1e-6)
            self.deviations_[at] = found.std(0, correction=0).maximum(least).to(self.thresholds_)
        return self

    def similarities(self, d: Decomposition) -> Float[Tensor, "batch layer head"]:
        """Similarity of each judged head's term to its prototype; nan for the others.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model, convention or normalization than the clean images.
        """
        check_fitted(self, "moments_")
        self.moments_.check(d)
        mask = self.mask_.to(d.coords.device)
        result = d.coords.new_full((len(d), *mask.shape), torch.nan)
        result[:, mask] = self._judge(d.coords[:, mask])
        return result

    def flags(self, d: Decomposition) -> Bool[Tensor, "batch layer head"]:
        """Which heads of which images look infected; never a head that is not judged.

        Raises:
            NotFittedError, ValueError: as `similarities`.
        """
        similarities = self.similarities(d)
        return similarities <= self.thresholds_.to(similarities)  # nan is no number below it

    def excess(self, d: Decomposition) -> Float[Tensor, "batch layer head"]:
        """How far below its threshold each head is, in clean standard deviations of its similarity; 0 above it.

        In these units heads are comparable: a dot product scales with the squared length of the prototype.

        Raises:
            NotFittedError, ValueError: as `similarities`, or fitted without `deviations=True`.
        """
        similarities = self.similarities(d)
        if self.deviations_ is None:
            raise ValueError(
                "expected a selector that knows how much similarities vary; received one fitted without; "
                "fit(clean, deviations=True)"
            )
        below = (self.thresholds_.to(similarities) - similarities) / self.deviations_.to(similarities)
        return below.nan_to_num(0.0).clamp_min(0)

    def _judge(self, coords: Float[Tensor, "batch head coord"]) -> Float[Tensor, "batch head"]:
        """Similarities of the judged heads alone."""
        grams = self.moments_.maps.grams[self.mask_.to(self.moments_.maps.heads.device)].to(coords)
        prototypes = self.prototypes_.to(coords)[self.mask_.to(coords.device)]
        toward = torch.einsum("hrs,hs->hr", grams, prototypes)
        judged = torch.einsum("bhr,hr->bh", coords, toward)
        if self.similarity == "dot":
            return judged
        lengths = torch.einsum("bhr,hrs,bhs->bh", coords, grams, coords)
        lengths = lengths * (prototypes * toward).sum(-1)
        # A head that writes nothing resembles nothing.
        return torch.where(lengths > 0, judged / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).sqrt(), 0)

    def _judged(self, clean: Decomposition | Moments) -> Bool[Tensor, "layer head"]:
        n_layers, n_heads = clean.coords.shape[-3:-1]
        if self.components is None:
            return torch.zeros(n_layers, n_heads, dtype=torch.bool)
        mask = resolve(self.components, clean)
        if mask.beside_heads or not mask.heads.any():
            raise ValueError(f"expected heads to judge; received {self.components!r}; for instance heads[-1]")
        return mask.heads

    def _check_count(self, n: int) -> None:
        if self.quantile * n < 1 - 1e-9 and self.quantile > 0:
            raise ValueError(
                f"expected at least {ceil(1 / self.quantile - 1e-9)} clean images for a quantile of {self.quantile}, "
                f"below which one of them must be; received {n}; fit on more, or take a larger quantile"
            )

    def _check_options(self) -> None:
        for name, value, known in (
            ("similarity", self.similarity, get_args(Similarity)),
            ("threshold", self.threshold, get_args(Threshold)),
        ):
            if value not in known:
                raise ValueError(f"expected a {name} of {known}; received {value!r}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"expected a quantile in 0..1; received {self.quantile}")

    def _check_form(self, convention: Convention, normalized: bool) -> None:
        if self.convention not in (None, convention):
            raise ValueError(
                f"expected terms in the {self.convention!r} convention, that the threshold is made for; received "
                f"convention={convention!r}; decompose(images, convention={self.convention!r}, normalize=True)"
            )
        if self.similarity == "dot" and not normalized:
            raise ValueError(
                "expected terms of unit features, for a dot product grows with the feature's length; received "
                'normalize=False; decompose(images, normalize=True), or take similarity="cosine"'
            )


def _means(part: Decomposition | Moments) -> Moments:
    return part if isinstance(part, Moments) else Moments.of(part, second=False)


def check_fitted(estimator: object, learned: str) -> None:
    """Raises NotFittedError unless `fit` was called."""
    if not hasattr(estimator, learned):
        name = type(estimator).__name__
        raise NotFittedError(
            f"expected a fitted {name}; received one that has seen no clean images; call {name}.fit(clean) first"
        )


def changed(selector: Selector) -> dict[str, object]:
    """The options of a selector that are not the default."""
    defaults = vars(Selector())
    return {name: getattr(selector, name) for name in defaults if getattr(selector, name) != defaults[name]}


def describe(estimator: object, selector: Selector, defaults: dict[str, object]) -> str:
    """`Name(options that are not the default)`."""
    own = {k: getattr(estimator, k) for k, v in defaults.items() if getattr(estimator, k) != v}
    options = changed(selector) | own
    return f"{type(estimator).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


SELECTOR_FORMAT = "decompclip.selector/2"
LEARNT = ("mask_", "prototypes_", "thresholds_", "deviations_")
OPTIONS = ("similarity", "threshold", "epsilon", "quantile", "convention")


def save_selector(selector: Selector, path: Path, kind: str, own: dict[str, Any]) -> Path:
    """Write it whole, or not at all. Second moments are left out.

    Args:
        kind: name of the class that judges by the selector; only it reads the file.
        own: its options.

    Raises:
        ValueError: the terms that it was fitted on do not know their model.
    """
    moments = selector.moments_
    if moments.maps.fingerprint is None:
        raise ValueError(
            "expected moments that know their model; received some without a fingerprint; fit on terms of decompose"
        )
    tensors: dict[str, Tensor | None] = {name: getattr(selector, name) for name in LEARNT}
    tensors |= {f"moments.{name}": getattr(moments, name) for name in TERMS}
    tensors |= {
        f"streams.{name}": x for name, x in (vars(moments.streams) if moments.streams else {}).items()
    }
    tensors["fingerprint"] = moments.maps.fingerprint
    about = {
        "kind": kind,
        "own": own,
        "options": {name: getattr(selector, name) for name in OPTIONS},
        "count": moments.count,
        "normalized": moments.normalized,
        "convention": moments.maps.convention,
    }
    return write_tensors(
        path, {name: x for name, x in tensors.items() if x is not None}, SELECTOR_FORMAT, about
    )


def load_selector(path: Path, visual: HookedViT, kind: str) -> tuple[Selector, dict[str, Any]]:
    """Read what `save_selector` wrote, for the model that it was fitted on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds something else, or belongs to another model.
    """
    tensors, about = read_tensors(path, SELECTOR_FORMAT, f"a saved {kind}", f"{kind}.save")
    if about["kind"] != kind:
        raise ValueError(f"expected a saved {kind}; received {path}, a saved {about['kind']}; load it as one")
    maps = term_maps(visual, about["convention"])
    if maps.fingerprint is None or not same_model(tensors["fingerprint"], maps.fingerprint.cpu()):
        raise ValueError(
            f"expected the model that the prototypes in {path} were fitted on; received another one; fit anew "
            "on clean images of this model"
        )
    device = maps.heads.device
    means: dict[str, Any] = {name: tensors[f"moments.{name}"] for name in TERMS}
    if device.type != "mps":  # which has no fp64
        means = {name: x.to(device) for name, x in means.items()}
    streams = {name.removeprefix("streams."): x for name, x in tensors.items() if name.startswith("streams.")}
    mask = tensors["mask_"].to(torch.bool)
    each = [heads[layer, row.nonzero()[:, 0].tolist()] for layer, row in enumerate(mask) if row.any()]
    selector = Selector(**about["options"], components=reduce(or_, each) if each else None)
    selector.moments_ = Moments(
        about["count"],
        **means,
        maps=maps,
        normalized=about["normalized"],
        streams=StreamMeans(**streams) if streams else None,
    )
    selector.mask_ = mask
    selector.prototypes_ = tensors["prototypes_"].to(maps.heads)
    selector.thresholds_ = tensors["thresholds_"].to(maps.heads)
    deviations = tensors.get("deviations_")
    selector.deviations_ = None if deviations is None else deviations.to(maps.heads)
    return selector, about["own"]


def visual_of(model: HookedCLIP | HookedViT) -> HookedViT:
    return model if isinstance(model, HookedViT) else model.visual
