"""Selector: which heads of which image look infected (docs/method.md, section 3; paper, section 4, Eq. 5).

A head of an image is flagged when its term is unlike the head's prototype, its mean over clean images.
Terms are compared in head coordinates, by the Gram matrix of the head's map: exactly, and without a
`[batch, head, d_embed]` product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import reduce
from math import ceil
from operator import or_
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.api import check_choice
from decompclip.decomposition.components import Components, heads, resolve
from decompclip.decomposition.decomposition import Decomposition, batches
from decompclip.decomposition.maps import Convention
from decompclip.decomposition.moments import Moments
from decompclip.defenses.fitted import Saved, check_fitted

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


@dataclass(eq=False, kw_only=True, repr=False)
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

    similarity: Similarity = "dot"
    threshold: Threshold = "epsilon"
    epsilon: float = 0.002
    quantile: float = 0.05
    components: Components | None = heads[-1]
    convention: Convention | None = None
    moments_: Moments = field(init=False)
    mask_: Bool[Tensor, "layer head"] = field(init=False)
    prototypes_: Float[Tensor, "layer head coord"] = field(init=False)
    thresholds_: Float[Tensor, "layer head"] = field(init=False)
    deviations_: Float[Tensor, "layer head"] | None = field(init=False)

    def fit(self, clean: Clean, *, deviations: bool = False) -> Selector:
        """Learn prototypes, and per-head thresholds, from clean images.

        Batches are seen once. Of each image, what a quantile or a deviation needs is kept: the coordinates of the
        judged heads, for their similarities are known only when the prototypes are.

        Args:
            clean: decomposed at once or batch by batch, or moments, which serve an epsilon alone.
            deviations: whether to learn `deviations_`.

        Raises:
            ValueError: an unknown option; terms in another form than the options need; no images, or too few for
                the quantile; moments where a quantile or deviations need the images; components other than heads.
            IndexError: `components` names a layer or head that the model does not have.
        """
        self._check_options()
        keep = deviations or self.threshold == "quantile"
        moments, kept, mask = None, [], None
        for part in [clean] if isinstance(clean, Moments) else batches(clean):
            if keep and isinstance(part, Moments):
                raise ValueError(
                    "expected a decomposition of clean images, whose similarities a quantile is taken of; received "
                    'their moments; fit on the decomposition, or take threshold="epsilon"'
                )
            self._check_form(part.maps.convention, part.normalized)
            mask = self._judged(part) if mask is None else mask
            own = part if isinstance(part, Moments) else Moments.of(part, second=False)
            moments = own if moments is None else moments.merge(own)
            if keep:
                kept.append(part.coords[:, mask.to(part.coords.device)])
        if moments is None or mask is None:
            raise ValueError("expected decompositions of clean images; received none; check the image source")
        self.moments_, self.mask_ = moments, mask
        self.prototypes_ = self.moments_.coords.to(self.moments_.maps.heads)
        self.thresholds_ = torch.full(mask.shape, float(self.epsilon)).to(self.prototypes_)
        self.deviations_ = None
        if not keep:
            return self
        found = self._judge(torch.cat(kept))
        at = mask.to(self.thresholds_.device)
        if self.threshold == "quantile":
            if self.quantile > 0 and len(found) < (needed := ceil(1 / self.quantile - 1e-9)):
                raise ValueError(
                    f"expected at least {needed} clean images for a quantile of {self.quantile}, "
                    f"below which one of them must be; received {len(found)}; fit on more, or take a larger quantile"
                )
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

    def _check_options(self) -> None:
        check_choice("similarity", self.similarity, Similarity)
        check_choice("threshold", self.threshold, Threshold)
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


LEARNT = ("mask_", "prototypes_", "thresholds_", "deviations_")
OPTIONS = ("similarity", "threshold", "epsilon", "quantile", "convention")

J = TypeVar("J", bound="Judge")


class Judge(Saved):
    """What `DecompRep` and `DecompDet` share: a selector that is fitted, and the file that both are saved to.

    From a file judged heads come back by their numbers.

    Attributes:
        selector: with the options given, not fitted.
        selector_: the fitted one, with `prototypes_` and `thresholds_`.
    """

    form: ClassVar[str] = "decompclip.selector/2"
    learned: ClassVar[str] = "selector_"
    selector: Selector
    selector_: Selector

    def _own(self) -> dict[str, Any]:
        """The options beside the selector's, by name."""
        raise NotImplementedError

    def _fit(self, clean: Clean, *, deviations: bool = False) -> Selector:
        return copy(self.selector).fit(clean, deviations=deviations)

    def _stored(self) -> tuple[Moments, Mapping[str, Tensor | None], Mapping[str, Any]]:
        selector = self.selector_
        options = {name: getattr(selector, name) for name in OPTIONS}
        about = {"kind": type(self).__name__, "own": self._own(), "options": options}
        return selector.moments_, {name: getattr(selector, name) for name in LEARNT}, about

    @classmethod
    def _restored(
        cls: type[J], moments: Moments, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> J:
        mask = tensors["mask_"].to(torch.bool)
        each = [heads[layer, row.nonzero()[:, 0].tolist()] for layer, row in enumerate(mask) if row.any()]
        selector = Selector(**about["options"], components=reduce(or_, each) if each else None)
        selector.moments_, selector.mask_ = moments, mask
        selector.prototypes_ = tensors["prototypes_"].to(moments.maps.heads)
        selector.thresholds_ = tensors["thresholds_"].to(moments.maps.heads)
        deviations = tensors.get("deviations_")
        selector.deviations_ = None if deviations is None else deviations.to(moments.maps.heads)
        judge = cls(**about["own"])
        judge.selector = judge.selector_ = selector
        return judge

    def __repr__(self) -> str:
        """`Name(options that are not the default)`."""
        options, defaults = (vars(x.selector) | x._own() for x in (self, type(self)()))
        given = (f"{k}={options[k]!r}" for k, default in defaults.items() if options[k] != default)
        return f"{type(self).__name__}({', '.join(given)})"
