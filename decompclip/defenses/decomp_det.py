"""Decomp-Det: an image is suspicious when many of its heads look infected (METHOD 3).

Source: He et al. (ICML 2025), section 4 and algorithm 1, lines 7 and 8.
"""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor

from decompclip.cache.components import Components, heads
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention
from decompclip.cache.moments import Moments
from decompclip.defenses.selector import Selector, Similarity, Threshold, check_fitted, describe


class DecompDet:
    """Counts an image's flagged heads: higher is more suspicious.

        detector = DecompDet().fit(clean)
        auroc(detector.score(clean_test), detector.score(suspect))

    Args:
        similarity, threshold, epsilon, quantile, components, convention: which heads are flagged: see
            `decompclip.defenses.selector.Selector`.
        zeta: the most flagged heads that are no cause for suspicion.

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
        zeta: int = 5,
        convention: Convention | None = None,
    ) -> None:
        self.similarity: Similarity = similarity
        self.threshold: Threshold = threshold
        self.epsilon = epsilon
        self.quantile = quantile
        self.components = components
        self.zeta = zeta
        self.convention: Convention | None = convention

    @classmethod
    def paper(cls, *, epsilon: float = 0.002) -> DecompDet:
        """As the authors' code runs it: dot product, last layer, one epsilon, more than five heads."""
        return cls(epsilon=epsilon, convention="paper")

    def fit(self, clean: Decomposition | Moments) -> DecompDet:
        """Learn prototypes from clean images.

        Raises:
            ValueError: an unknown option, or clean terms that do not fit the options: see `Selector.fit`.
        """
        self.selector_ = Selector.like(self).fit(clean)
        return self

    def score(self, d: Decomposition) -> Int[Tensor, " batch"]:
        """The number of flagged heads of each image.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model, convention or normalization than the clean images.
        """
        check_fitted(self, "selector_")
        return self.selector_.flags(d).sum((1, 2))

    def predict(self, d: Decomposition) -> Bool[Tensor, " batch"]:
        """Which images are suspicious: those of more than `zeta` flagged heads.

        Raises:
            NotFittedError, ValueError: as `score`.
        """
        return self.score(d) > self.zeta

    def __repr__(self) -> str:
        return describe(self, vars(DecompDet()))
