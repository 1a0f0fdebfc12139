"""Thresholds that hold on fresh clean images.

What clean images look like: in their feature, on the way to it, and in how much of it was written.

Detection without a hint about the attack: how unlike a clean image of its class is this one, and where?

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

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.special import log_ndtr

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import TermMaps
from decompclip.defenses.distances import (
    ClassDistance,
    ClassSums,
    Extrapolation,
    class_directions,
    layer_terms,
    prefixes,
    ridge,
)
from decompclip.defenses.selector import check_fitted


def calibrated(scores: Float[Tensor, " image"], fpr: float) -> float:
    """The least of the sorted clean `scores` that a fresh clean image exceeds with probability `fpr` at most.

    Raises:
        ValueError: a rate outside (0, 1), or finer than so many images can tell.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"expected a false-positive rate in (0, 1); received {fpr}")
    n = len(scores)
    place = math.ceil((n + 1) * (1 - fpr) - 1e-9)
    if place > n:
        raise ValueError(
            f"expected at least {math.ceil(1 / fpr - 1e-9) - 1} clean images to calibrate a false-positive rate of {fpr}; "
            f"received {n}; fit on more, or ask for a higher rate"
        )
    return float(scores[place - 1])


Distance = Literal["feature", "layers", "surprise"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
VIEWS: tuple[str, ...] = (*DISTANCES, "written")


@dataclass(frozen=True, eq=False)
class Looked:
    """What is looked at, of some images."""

    features: Float[Tensor, "image d_embed"]
    layers: Float[Tensor, "image part"]
    before: Float[Tensor, "image layer d_embed"]
    written: Float[Tensor, " image"]
    classes: Int[Tensor, " image"]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> Looked:
        return Looked(*(getattr(self, name)[rows] for name in Looked.__annotations__))

    def after(self, cut: int) -> Looked:
        """With the prefix up to this layer alone."""
        return replace(self, before=self.before[:, cut : cut + 1])

    @staticmethod
    def cat(parts: list[Looked]) -> Looked:
        return Looked(
            *(torch.cat([getattr(part, name) for part in parts]) for name in Looked.__annotations__)
        )


@dataclass(frozen=True, eq=False)
class Expected:
    """What clean images look like.

    Attributes:
        cut: the layer after which `surprise` predicts the feature.
    """

    distances: dict[Distance, ClassDistance]
    extrapolation: Extrapolation
    cut: int

    @staticmethod
    def of(clean: Looked, n_classes: int, cut: int) -> Expected:
        extrapolation = Extrapolation.fit(clean.before, clean.features)
        return replace(Sums.of(clean.after(cut), n_classes).expected(), extrapolation=extrapolation, cut=cut)

    def points(self, seen: Looked) -> dict[Distance, Float[Tensor, "image 1 dim"]]:
        surprise = seen.features - self.extrapolation.of_layer(seen.before, self.cut)
        return {
            "feature": seen.features[:, None],
            "layers": seen.layers[:, None],
            "surprise": surprise[:, None],
        }

    def logs(self, seen: Looked) -> Float[Tensor, "image view"]:
        """Logarithms of the distances and of what was written."""
        tiny = torch.finfo(torch.float64).tiny
        points = self.points(seen)
        found = [self.distances[view](points[view], seen.classes)[:, 0] for view in DISTANCES]
        return torch.stack([*found, seen.written.double()], 1).clamp_min(tiny).log()

    def offsets(self, seen: Looked) -> Float[Tensor, "image d_embed"]:
        """Of each feature from the mean of its class, in standard deviations along every direction."""
        return self.distances["feature"].whitened(seen.features[:, None], seen.classes)[:, 0]


@dataclass(frozen=True, eq=False)
class Sums:
    """Of some clean images, all that is expected of others; sums of several folds add, and one fold's are taken off again.

    Attributes:
        joint: of the prefix at the cut and the feature, side by side.
        layers: of `Looked.layers`.
    """

    joint: ClassSums
    layers: ClassSums

    @staticmethod
    def of(clean: Looked, n_classes: int, *, about: Sums | None = None) -> Sums:
        """Of images with one prefix (`Looked.after`). `about`: whose origin serves, so that the two add."""
        joint = torch.cat([clean.before[:, 0], clean.features], 1)[:, None]
        origins = (about.joint.origin, about.layers.origin) if about else (None, None)
        return Sums(
            *(
                ClassSums.of(points, clean.classes, n_classes, origin=origin)
                for points, origin in zip((joint, clean.layers[:, None]), origins, strict=True)
            )
        )

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.joint - other.joint, self.layers - other.layers)

    def expected(self) -> Expected:
        """For images with one prefix."""
        joint, width = self.joint, self.joint.origin.shape[1] // 2
        scatter, (mean_in, mean_out) = joint.scatter, joint.mean.split(width, 1)
        weights = ridge(scatter[:, :width, :width], scatter[:, :width, width:])
        one = torch.eye(width).to(weights)
        surprise = joint.mapped(torch.cat([-weights[0], one]), (mean_in @ weights[0] - mean_out)[0])
        distances: dict[Distance, ClassDistance] = {
            "feature": joint.mapped(torch.cat([torch.zeros_like(one), one])).distance(),
            "layers": self.layers.distance(),
            "surprise": surprise.distance(),
        }
        return Expected(distances, Extrapolation(mean_in, mean_out[0], weights), 0)


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
