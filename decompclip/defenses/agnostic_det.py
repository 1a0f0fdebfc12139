"""Detection without a hint about the attack: how unlike a clean image of its class is this one, and where?

Our own. Three questions, each a Mahalanobis distance (`ClassDistance`) calibrated on clean images alone, whose sum says
how odd an image is:

* feature: does the image look like the others that the model takes for the same class?
* layers: do heads and MLPs of every layer say what they say for the others of that class?
* surprise: does the feature follow from what the first half of the layers has found (`Extrapolation`)?

And one that finds triggered images which are *less* odd than clean ones, as on photographs, where clean images of a class
differ widely and a trigger makes them all alike:

* written: how little of the unit feature was there before the first block (the embedding and the constants), beside what heads
  and MLPs wrote? A trigger has them write more, and with one voice; LayerNorm and the unit length hide how much.

Each distance's logarithm, and that of the share written, is brought to mean 0 and deviation 1 over clean images; the score is
Fisher's sum of the two upper tails, -log p(odd) - log p(written), so that either suffices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.special import log_ndtr

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import TermMaps
from decompclip.defenses.calibration import calibrated
from decompclip.defenses.expected import VIEWS, Expected, Looked, Sums
from decompclip.defenses.selector import check_fitted
from decompclip.defenses.term_views import class_directions, layer_terms, prefixes


class AgnosticDet:
    """An image is suspicious when it is unlike clean images of its class, in its feature or on the way to it, or when
    its heads and MLPs write more than they do for any of those.

        detector = AgnosticDet(model.zero_shot_classifier(class_names)).fit(clean)
        detector.score(model.decompose(images, normalize=True))

    False positives are calibrated by cross-fitting: each clean image is scored by what was learnt from the other
    folds, so that all of them serve for both, and `threshold_at(0.05)` flags one in twenty of fresh ones.

    Args:
        classifier: of the zero-shot classes; an image's class is the one that it is taken for.
        cut: the layer after which `surprise` predicts the feature; by default the last of the first half.
        folds: of the cross-fitting.
        seed: of the folds.

    Attributes:
        expected_: learnt from all clean images.
        mean_, deviation_: of each view's logarithm over clean images.
        spread_: deviation of the sum of the distances over clean images.
        scores_: of the clean images, each by the other folds, in rising order.
        offsets_: of the same images, as `Expected.offsets`, each by the other folds.
    """

    calibrates = True  # on the images that it learns from, by cross-fitting
    expected_: Expected
    maps_: TermMaps
    mean_: Float[Tensor, " view"]
    deviation_: Float[Tensor, " view"]
    spread_: Float[Tensor, ""]
    scores_: Float[Tensor, " image"]
    offsets_: Float[Tensor, "image d_embed"]

    def __init__(
        self,
        classifier: Float[Tensor, "class d_embed"],
        *,
        cut: int | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.classifier = classifier
        self.cut = cut
        self.folds = folds
        self.seed = seed

    def fit(self, clean: Decomposition | Iterable[Decomposition]) -> AgnosticDet:
        """Learn from clean images of all classes; batches are looked at one by one.

        Raises:
            ValueError: too few images, images of a single class, terms that do not sum to unit features, terms
                of another width than the classifier, or an unusable option.
        """
        parts = [clean] if isinstance(clean, Decomposition) else clean
        seen = []
        for part in parts:
            if not seen:
                self.maps_ = part.maps
                self._check_options(part)
            seen.append(self.look(part))
        if not seen:
            raise ValueError("expected decompositions of clean images; received none; check the image source")
        looked = Looked.cat(seen)
        self._check_images(looked)
        layers, n_classes = looked.before.shape[1], len(self.classifier)
        cut = max(0, layers // 2 - 1) if self.cut is None else self.cut
        generator = torch.Generator().manual_seed(self.seed)
        fold = torch.randperm(len(looked), generator=generator).to(looked.classes.device) % self.folds
        logs = torch.zeros(len(looked), len(VIEWS), dtype=torch.float64, device=looked.features.device)
        offsets = torch.zeros_like(looked.features, dtype=torch.float64)
        near = looked.after(cut)
        whole = Sums.of(near, n_classes)
        for held in range(self.folds):
            out = fold == held
            own = near[out]
            others = (whole - Sums.of(own, n_classes, about=whole)).expected()
            logs[out], offsets[out] = others.logs(own), others.offsets(own)
        self.expected_ = Expected.of(looked, n_classes, cut)
        self.mean_, self.deviation_ = logs.mean(0), logs.std(0).clamp_min(1e-9)
        views = self._standard(logs)
        self.spread_ = views[:, :-1].sum(1).std().clamp_min(1e-9)
        scores = self._combined(views)
        self.scores_, order = scores.sort()
        self.offsets_ = offsets[order]
        return self

    def look(self, d: Decomposition) -> Looked:
        """What is looked at, of each image.

        Raises:
            ValueError: terms of another model, or that do not sum to unit features.
        """
        self._check_terms(d)
        terms = layer_terms(d)
        directions = class_directions(self.classifier).to(d.embed)
        classes = (d.features @ self.classifier.to(d.embed).T).argmax(1)
        layers = (terms @ directions.T).flatten(1)
        written = 1 / (d.embed + d.bias).norm(dim=-1).clamp_min(torch.finfo(d.embed.dtype).tiny)
        return Looked(d.features, layers, prefixes(d, terms), written, classes)

    def views(self, d: Decomposition) -> Float[Tensor, "batch view"]:
        """How unlike clean images in each of `VIEWS`, in standard deviations.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: as `look`.
        """
        check_fitted(self, "scores_")
        return self._views(self.look(d))

    def score(self, d: Decomposition) -> Float[Tensor, " batch"]:
        """Higher is more suspicious.

        Raises:
            NotFittedError, ValueError: as `views`.
        """
        return self._combined(self.views(d))

    def score_of(self, seen: Looked) -> Float[Tensor, " image"]:
        """`score`, of what `look` has seen."""
        return self._combined(self._views(seen))

    def p_value(self, d: Decomposition) -> Float[Tensor, " batch"]:
        """Share of clean images that would be at least as suspicious.

        Raises:
            NotFittedError, ValueError: as `views`.
        """
        scores = self.score(d)
        above = len(self.scores_) - torch.searchsorted(self.scores_, scores.to(self.scores_))
        return (above + 1) / (len(self.scores_) + 1)

    def threshold_at(self, fpr: float) -> float:
        """The score above which a share `fpr` of clean images lies.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: a rate outside (0, 1), or finer than the clean images can tell.
        """
        check_fitted(self, "scores_")
        return calibrated(self.scores_, fpr)

    def predict(self, d: Decomposition, *, fpr: float = 0.05) -> Bool[Tensor, " batch"]:
        """Which images are suspicious, at this share of clean ones.

        Raises:
            NotFittedError, ValueError: as `score` and `threshold_at`.
        """
        return self.score(d) > self.threshold_at(fpr)

    def _views(self, seen: Looked) -> Float[Tensor, "image view"]:
        return self._standard(self.expected_.logs(seen))

    def _combined(self, views: Float[Tensor, "image view"]) -> Float[Tensor, " image"]:
        """Fisher's: minus the logarithms of both upper tails, under a normal law."""
        odd, written = views[:, :-1].sum(1) / self.spread_, views[:, -1]
        return -log_ndtr(-odd) - log_ndtr(-written)

    def _standard(self, logs: Float[Tensor, "image view"]) -> Float[Tensor, "image view"]:
        return (logs - self.mean_) / self.deviation_

    def _check_terms(self, d: Decomposition) -> None:
        if not d.normalized:
            raise ValueError(
                "expected terms that sum to unit features; received terms of raw ones; decompose with normalize=True"
            )
        if not self.maps_.matches(d.maps):
            raise ValueError(
                "expected terms of the model and convention that the clean images were decomposed with; received others; "
                "fit on the model it is used with"
            )

    def _check_options(self, d: Decomposition) -> None:
        if self.classifier.shape[-1] != d.d_embed:
            raise ValueError(
                f"expected a classifier of the features' width {d.d_embed}; received {self.classifier.shape[-1]}; build "
                "it with the text tower of the same model"
            )
        if self.cut is not None and not 0 <= self.cut < d.n_layers - 1:
            raise ValueError(f"expected a cut in 0..{d.n_layers - 2}; received {self.cut}")
        if self.folds < 2:
            raise ValueError(f"expected at least 2 folds; received {self.folds}")

    def _check_images(self, clean: Looked) -> None:
        known = len(clean.classes.unique())
        if known < 2:
            raise ValueError(
                f"expected clean images of at least 2 classes; all {len(clean)} were taken for one; give images of "
                "every class"
            )
        if len(clean) < (needed := max(10 * known, 10 * self.folds)):
            raise ValueError(
                f"expected at least {needed} clean images, ten for each of {known} classes seen; received {len(clean)}"
            )
