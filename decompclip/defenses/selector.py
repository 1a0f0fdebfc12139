"""Selector: which heads of which image look infected (METHOD 3; paper, section 4, Eq. 5).

A head of an image is flagged when its term is unlike the head's prototype, its mean over clean images.
Terms are compared in head coordinates, by the Gram matrix of the head's map: exactly, and without a
`[batch, head, d_embed]` product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from sklearn.exceptions import NotFittedError
from torch import Tensor

from decompclip.cache.components import Components, heads
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention
from decompclip.cache.moments import Moments

if TYPE_CHECKING:
    from decompclip.defenses.decomp_det import DecompDet
    from decompclip.defenses.decomp_rep import DecompRep

Similarity = Literal["dot", "cosine"]
Threshold = Literal["epsilon", "quantile"]


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
        components: which heads are judged; those of the last layer in the paper.
        convention: the convention that terms must be in; None: whichever it is fitted on.

    Attributes:
        moments_: of the clean images.
        mask_: the heads that are judged, `[layer head]`.
        prototypes_: mean coordinates, `[layer head coord]`.
        thresholds_: flag at or below it, `[layer head]`.
    """

    moments_: Moments
    mask_: Bool[Tensor, "layer head"]
    prototypes_: Float[Tensor, "layer head coord"]
    thresholds_: Float[Tensor, "layer head"]

    def __init__(
        self,
        *,
        similarity: Similarity = "dot",
        threshold: Threshold = "epsilon",
        epsilon: float = 0.002,
        quantile: float = 0.05,
        components: Components = heads[-1],
        convention: Convention | None = None,
    ) -> None:
        self.similarity: Similarity = similarity
        self.threshold: Threshold = threshold
        self.epsilon = epsilon
        self.quantile = quantile
        self.components = components
        self.convention: Convention | None = convention

    @classmethod
    def like(cls, estimator: DecompRep | DecompDet) -> Selector:
        """A selector with the options of an estimator that judges by one."""
        return cls(**{name: getattr(estimator, name) for name in vars(cls())})

    def fit(self, clean: Decomposition | Moments) -> Selector:
        """Learn prototypes, and per-head thresholds, from clean images.

        Raises:
            ValueError: an unknown option; terms in another form than the options need; moments where a
                quantile needs the images; components other than heads.
            IndexError: `components` names a layer or head that the model does not have.
        """
        self._check_options()
        self._check_form(clean.maps.convention, clean.normalized)
        moments = clean if isinstance(clean, Moments) else Moments.of(clean, second=False)
        n_layers, n_heads = clean.coords.shape[-3:-1]
        mask = self.components.resolve(n_layers, n_heads, pool=bool(clean.pool.shape[-2]))
        others = mask.embed or mask.pool or mask.mlps.any() or mask.neurons is not None
        if others or not mask.heads.any():
            raise ValueError(f"expected heads to judge; received {self.components!r}; for instance heads[-1]")
        self.moments_, self.mask_ = moments, mask.heads
        self.prototypes_ = moments.coords.to(clean.maps.heads)
        self.thresholds_ = torch.full((n_layers, n_heads), float(self.epsilon), dtype=self.prototypes_.dtype)
        if self.threshold == "quantile":
            if isinstance(clean, Moments):
                raise ValueError(
                    "expected a decomposition of clean images, whose similarities a quantile is taken of; received "
                    'their moments; fit on the decomposition, or take threshold="epsilon"'
                )
            similarities = self.similarities(clean)[:, self.mask_]
            quantiles = torch.quantile(similarities, self.quantile, dim=0, interpolation="lower")
            self.thresholds_[self.mask_] = quantiles.to(self.thresholds_)
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
        coords, grams = d.coords[:, mask], d.maps.grams[mask]
        prototypes = self.prototypes_.to(coords)[mask]
        toward = torch.einsum("hrs,hs->hr", grams, prototypes)
        judged = torch.einsum("bhr,hr->bh", coords, toward)
        if self.similarity == "cosine":
            lengths = torch.einsum("bhr,hrs,bhs->bh", coords, grams, coords)
            lengths = lengths * (prototypes * toward).sum(-1)
            # A head that writes nothing resembles nothing.
            judged = torch.where(
                lengths > 0, judged / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).sqrt(), 0
            )
        result = coords.new_full((len(d), *mask.shape), torch.nan)
        result[:, mask] = judged
        return result

    def flags(self, d: Decomposition) -> Bool[Tensor, "batch layer head"]:
        """Which heads of which images look infected; never a head that is not judged.

        Raises:
            NotFittedError, ValueError: as `similarities`.
        """
        similarities = self.similarities(d)
        return similarities <= self.thresholds_.to(similarities)  # nan is no number below it

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


def check_fitted(estimator: object, learned: str) -> None:
    """Raises NotFittedError unless `fit` was called."""
    if not hasattr(estimator, learned):
        name = type(estimator).__name__
        raise NotFittedError(
            f"expected a fitted {name}; received one that has seen no clean images; call {name}.fit(clean) first"
        )


def describe(estimator: object, defaults: dict[str, object]) -> str:
    """`Name(options that are not the default)`."""
    changed = {k: getattr(estimator, k) for k, v in defaults.items() if getattr(estimator, k) != v}
    return f"{type(estimator).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"
