"""Decomp-Det: an image is suspicious when many of its heads look infected (docs/method.md, section 3).

Source: He et al. (ICML 2025), section 4 and algorithm 1, lines 7 and 8.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Literal, get_args

from jaxtyping import Bool, Shaped
from torch import Tensor
from typing_extensions import Unpack

from decompclip.decomposition.decomposition import Decomposition
from decompclip.defenses.selector import (
    Clean,
    Judging,
    Selector,
    check_fitted,
    describe,
    load_selector,
    save_selector,
    visual_of,
)
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import HookedViT

Score = Literal["count", "excess"]


class DecompDet:
    """Counts an image's flagged heads: higher is more suspicious.

        detector = DecompDet().fit(clean)
        auroc(detector.score(clean_test), detector.score(suspect))

    Args:
        score: "count" of flagged heads (the paper), or "excess": how far they are below their thresholds, summed in
            clean standard deviations of each head's similarity.
        zeta: the highest score that is no cause for suspicion.
        judging: similarity, threshold, epsilon, quantile, components, convention: which heads are flagged: see
            `decompclip.defenses.selector.Selector`.

    Attributes:
        selector: with these options, not fitted.
        selector_: the fitted one, with `prototypes_` and `thresholds_`.
    """

    selector_: Selector

    def __init__(self, *, score: Score = "count", zeta: int | float = 5, **judging: Unpack[Judging]) -> None:
        self.kind: Score = score
        self.zeta = zeta
        self.selector = Selector(**judging)

    @classmethod
    def paper(cls, *, epsilon: float = 0.002) -> DecompDet:
        """As the authors' code runs it: dot product, last layer, one epsilon, more than five heads."""
        return cls(epsilon=epsilon, convention="paper")

    def fit(self, clean: Clean) -> DecompDet:
        """Learn prototypes from clean images, given at once or batch by batch.

        Raises:
            ValueError: an unknown option, or clean terms that do not fit the options: see `Selector.fit`.
        """
        if self.kind not in get_args(Score):
            raise ValueError(f"expected a score of {get_args(Score)}; received {self.kind!r}")
        self.selector_ = copy(self.selector).fit(clean, deviations=self.kind == "excess")
        return self

    def score(self, d: Decomposition) -> Shaped[Tensor, " batch"]:
        """The number of flagged heads of each image, or their summed excess.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model, convention or normalization than the clean images.
        """
        check_fitted(self, "selector_")
        if self.kind == "excess":
            return self.selector_.excess(d).sum((1, 2))
        return self.selector_.flags(d).sum((1, 2))

    def predict(self, d: Decomposition) -> Bool[Tensor, " batch"]:
        """Which images are suspicious: those that score above `zeta`.

        Raises:
            NotFittedError, ValueError: as `score`.
        """
        return self.score(d) > self.zeta

    def save(self, path: str | Path) -> Path:
        """Write the options and what was learnt, with the fingerprint of the model, as one safetensors file.

        Raises:
            NotFittedError: `fit` was not called.
        """
        check_fitted(self, "selector_")
        return save_selector(self.selector_, Path(path), "DecompDet", {"score": self.kind, "zeta": self.zeta})

    @classmethod
    def load(cls, path: str | Path, model: HookedCLIP | HookedViT) -> DecompDet:
        """Read what `save` wrote; judged heads come back by their numbers.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, holds something else, or was fitted on another model.
        """
        selector, own = load_selector(Path(path), visual_of(model), "DecompDet")
        detector = cls(**own)
        detector.selector, detector.selector_ = selector, selector
        return detector

    def __repr__(self) -> str:
        text = describe(self, self.selector, {"zeta": 5})
        if self.kind == "count":
            return text
        return f"{text[:-1]}{'' if text.endswith('()') else ', '}score={self.kind!r})"
