"""Decomp-Rep: repair image features by replacing the heads that look infected (METHOD 3).

Source: He et al. (ICML 2025), section 4 and algorithm 1, lines 7 and 9.
"""

from __future__ import annotations

from typing import Literal, get_args

from decompclip.cache.components import Components, heads
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention
from decompclip.cache.moments import Moments
from decompclip.defenses.selector import Selector, Similarity, Threshold, check_fitted, describe
from decompclip.models.vit import Hook, HookedViT
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Intervention, Where, both

FillName = Literal["prototype", "zero"]


class DecompRep(Intervention):
    """Replaces the flagged heads of each image by their prototypes: one rule for all images, clean or not.

        repair = DecompRep(similarity="cosine", threshold="quantile").fit(clean)
        repair(d).features

    For triggers spread over the whole image the paper replaces the last five MLPs of every image instead, and so
    must be told the kind of attack: that is `MeanAblate(mlps[-5:], moments)`.

    Args:
        similarity, threshold, epsilon, quantile, components, convention: which heads are flagged: see
            `decompclip.defenses.selector.Selector`.
        fill: what stands in for a flagged head: its "prototype", or "zero" (the paper's "w/ Abandon").

    Attributes:
        selector_: the fitted selector, with `prototypes_` and `thresholds_`.
    """

    selector_: Selector

    def __init__(
        self,
        *,
        similarity: Similarity = "dot",
        threshold: Threshold = "epsilon",
        epsilon: float = 0.002,
        quantile: float = 0.05,
        components: Components = heads[-1],
        fill: FillName = "prototype",
        convention: Convention | None = None,
    ) -> None:
        self.similarity: Similarity = similarity
        self.threshold: Threshold = threshold
        self.epsilon = epsilon
        self.quantile = quantile
        self.components = components
        self.fill: FillName = fill
        self.convention: Convention | None = convention

    @classmethod
    def paper(cls, *, epsilon: float = 0.002) -> DecompRep:
        """Algorithm 1 for local triggers, as the authors' code runs it: dot product, last layer, one epsilon."""
        return cls(epsilon=epsilon, convention="paper")

    def fit(self, clean: Decomposition | Moments) -> DecompRep:
        """Learn prototypes from clean images (the paper: 20 % of the evaluation set).

        Raises:
            ValueError: an unknown option, or clean terms that do not fit the options: see `Selector.fit`.
        """
        if self.fill not in get_args(FillName):
            raise ValueError(f"expected a fill of {get_args(FillName)}; received {self.fill!r}")
        self.selector_ = Selector.like(self).fit(clean)
        return self

    def flags(self, d: Decomposition) -> Where:
        """Which heads of which images are replaced.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model, convention or normalization than the clean images.
        """
        check_fitted(self, "selector_")
        return self.selector_.flags(d)

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """Repaired terms (direct mode).

        Raises:
            NotFittedError, ValueError: as `flags`.
        """
        flags = self.flags(d)
        return self._edit()(d, where=both(flags, where))

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """The repair inside a forward pass (causal mode); which heads it replaces is known from a first pass:

            flags = repair.flags(model.decompose(images, normalize=True))
            with visual.hooks(repair.fwd_hooks(visual, where=flags)): ...

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: no `where`, or it was fitted without stream means.
        """
        check_fitted(self, "selector_")
        if where is None:
            raise ValueError(
                "expected where, the heads to replace, for they are known only once the image is decomposed; "
                "received none; pass where=repair.flags(model.decompose(images, ...)) of the same images"
            )
        return self._edit().fwd_hooks(visual, where=where)

    def _edit(self) -> Intervention:
        if self.fill == "zero":
            return ZeroAblate(self.components)
        return MeanAblate(self.components, self.selector_.moments_)

    def __repr__(self) -> str:
        return describe(self, vars(DecompRep()))
