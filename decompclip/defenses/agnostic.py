"""Detection and repair without a hint about the attack. Both are our own.

Detection asks six things of an image. Three are Mahalanobis distances to the image's class (`ClassDistance`):

* feature: is it like those of other images of its class?
* layers: do heads and MLPs of every layer contribute what they do for others of that class?
* surprise: does the feature follow from what two thirds of the layers have found (`Extrapolation`)?

Their sum says how odd an image is. The others find triggered images that are *less* odd than clean ones, as on photographs,
where clean images of a class differ widely and a trigger makes them all alike:

* written: the inverse of the share of the unit feature that is there before the first block, beside others of the class. A
  trigger makes heads and MLPs contribute more, all in one direction.
* early: how much of the answer the feature holds that is expected after two thirds of the layers, before features are divided
  by their length. Clean images are told late.
* length: of the feature before that, beside others of the class.

Each is brought to mean 0 and deviation 1 over clean images. The score is Fisher's sum of the upper tails, -log p of odd,
written, early and length, so that each suffices.

The repair edits suspicious images alone: the answer is taken out of the feature, and the next one stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, reduce
from operator import add, sub
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torch.special import log_ndtr

from decompclip.decomposition.decomposition import Decomposition, HasTerms, by_shards, check_alike
from decompclip.decomposition.moments import Moments
from decompclip.defenses.distances import (
    ClassDistance,
    ClassSums,
    Extrapolation,
    class_directions,
    layer_terms,
    ridge,
    taken_for,
)
from decompclip.defenses.fitted import (
    Calibrated,
    Saved,
    blocks,
    check_fitted,
    held_out,
    under,
)
from decompclip.operators.intervention import Intervention, Where, check_where
from decompclip.tower.vit import Hook, HookedViT

Distance = Literal["feature", "layers", "surprise"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
VIEWS: tuple[str, ...] = (*DISTANCES, "written", "early", "length")


@dataclass(frozen=True, eq=False)
class Observed:
    """What is looked at, of some images.

    Attributes:
        layers: contributions of heads and MLPs, along the directions that tell classes apart.
        before: the feature's partial sum after two thirds of the layers.
        loud: logarithms of one over the length of the part of the unit feature that is there before the first block, and of
            the length of the feature.
        classes: that the images are taken for.
    """

    features: Float[Tensor, "image d_embed"]
    layers: Float[Tensor, "image part"]
    before: Float[Tensor, "image d_embed"]
    loud: Float[Tensor, "image 2"]
    classes: Int[Tensor, " image"]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> Observed:
        return Observed(*(x[rows] for x in vars(self).values()))

    def folds(self, n_classes: int, held: list[Bool[Tensor, " image"]]) -> Iterator[tuple[ClassSums, ...]]:
        """Of the images of each fold: sums of the partial sum and the feature side by side, of `layers`, and of `loud`."""
        columns = [
            torch.cat([self.before, self.features], 1)[:, None],
            self.layers[:, None],
            self.loud[:, None],
        ]
        origins = [x.mean(0, dtype=torch.float64) for x in columns]
        for out in held:
            yield tuple(
                ClassSums.of(x[out], self.classes[out], n_classes, origin=origin)
                for x, origin in zip(columns, origins, strict=True)
            )


@dataclass(frozen=True, eq=False)
class Expected:
    """What clean images look like.

    Attributes:
        distances: by the name of the view.
        extrapolation: from the partial sum to the feature.
        loud: of each class, what `Observed.loud` typically is.
        answers: unit directions from the mean of the classes to each.
    """

    distances: dict[Distance, ClassDistance]
    extrapolation: Extrapolation
    loud: Float[Tensor, "class 2"]
    answers: Float[Tensor, "class d_embed"]

    @staticmethod
    def of(sums: Iterable[ClassSums], answers: Float[Tensor, "class d_embed"]) -> Expected:
        """From the sums of `Observed.folds`."""
        joint, layers, loud = sums
        width = joint.origin.shape[1] // 2
        scatter, (mean_in, mean_out) = joint.scatter, joint.mean.split(width, 1)
        weights = ridge(scatter[:, :width, :width], scatter[:, :width, width:])[0]
        one = torch.eye(width).to(weights)
        surprise = joint.mapped(torch.cat([-weights, one]), (mean_in @ weights - mean_out)[0])
        distances: dict[Distance, ClassDistance] = {
            "feature": joint.mapped(torch.cat([torch.zeros_like(one), one])).distance(),
            "layers": layers.distance(),
            "surprise": surprise.distance(),
        }
        return Expected(
            distances, Extrapolation(mean_in[0], mean_out[0], weights), loud.means()[:, 0], answers
        )

    def raw(self, seen: Observed) -> Float[Tensor, "image view"]:
        """The views, each in a scale of its own: logarithms, but for `early`."""
        future = self.extrapolation(seen.before)
        points = {"feature": seen.features, "layers": seen.layers, "surprise": seen.features - future}
        found = [self.distances[view](points[view][:, None], seen.classes) for view in DISTANCES]
        written, length = (seen.loud - self.loud[seen.classes]).unbind(1)
        early = (future * self.answers.to(future)[seen.classes]).sum(1) * seen.loud[:, 1].exp()
        odd = torch.cat(found, 1).clamp_min(torch.finfo(torch.float64).tiny).log()
        return torch.cat([odd, torch.stack([written, early, length], 1)], 1)


def toward(classifier: Float[Tensor, "class d_embed"]) -> Float[Tensor, "class d_embed"]:
    """Unit directions from the mean of the classes to each."""
    return normalize(classifier - classifier.mean(0), dim=1)


def lengths(d: Decomposition) -> Float[Tensor, " batch"]:
    """Of the features that terms of unit ones were divided by: what is added whatever the image tells them.

    One where no such constant is kept: an attention pool in the paper's convention.
    """
    if d.maps.bias_names:
        return 1 / d.bias_coords[:, -1]
    return 1 / d.coords[:, 0, 0, -1] if d.maps.extras else d.embed.new_ones(len(d))


@dataclass(eq=False, repr=False)
class AgnosticDet(Calibrated):
    """Finds images that are odd for their class, to which heads and MLPs contribute more, whose answer is told early, or whose feature is long.

        detector = AgnosticDet(model.zero_shot_classifier(class_names)).fit(clean)
        detector.score(model.decompose(images, normalize=True))

    False positives are calibrated by cross-fitting: each clean image is scored by what was learnt from the other
    folds. So all of them serve for both, and `threshold_at(0.05)` flags one in twenty of fresh ones.

    Args:
        classifier: of the zero-shot classes; an image's class is the one that it is taken for.
        folds: of the cross-fitting.
        seed: of the folds.

    Attributes:
        terms_: what tells the form of the clean images' terms.
        expected_: learnt from all clean images.
        mean_: of each view over clean images, as `Expected.raw` gives it.
        deviation_: the same, standard deviation.
        spread_: deviation of the sum of the distances over clean images.
        scores_: of the clean images, each by the other folds, in rising order.
    """

    classifier: Float[Tensor, "class d_embed"]
    _: KW_ONLY
    folds: int = 5
    seed: int = 0
    expected_: Expected = field(init=False)
    terms_: HasTerms = field(init=False)
    mean_: Float[Tensor, " view"] = field(init=False)
    deviation_: Float[Tensor, " view"] = field(init=False)
    spread_: Float[Tensor, ""] = field(init=False)

    def fit(self, clean: Decomposition | Iterable[Decomposition]) -> AgnosticDet:
        """Learn from clean images, best of all classes: a class of few stays close to what all have in common.

        Batches are seen once. Kept of an image are its feature, one partial sum and its contributions along the
        directions that tell classes apart: 7 kB in a ViT-B/32.

        Args:
            clean: terms of unit features, at once or batch by batch.

        Raises:
            ValueError: fewer images than classes, images of a single class, terms that do not sum to unit features,
                terms of another width than the classifier, or an unusable option.
        """
        kept: list[Observed] = []
        for part in blocks(clean):
            if not kept:
                self.terms_ = part[[]]  # a copy: a view would keep the block
            kept.append(self.look(part))
        if not kept:
            raise ValueError("expected decompositions of clean images; received none; check the image source")
        seen = Observed(*(torch.cat(x) for x in zip(*(vars(part).values() for part in kept), strict=True)))
        del kept
        self._check_images(seen)
        raw = torch.zeros(len(seen), len(VIEWS), dtype=torch.float64, device=seen.features.device)
        held = [*held_out(len(seen), self.folds, self.seed, seen.classes.device)]
        folds = [*seen.folds(len(self.classifier), held)]
        whole = [reduce(add, of_folds) for of_folds in zip(*folds, strict=True)]
        answers = toward(self.classifier).to(raw)
        for out, own in zip(held, folds, strict=True):
            raw[out] = Expected.of(map(sub, whole, own), answers).raw(seen[out])
        self.expected_ = Expected.of(whole, answers)
        self.mean_, self.deviation_ = raw.mean(0), raw.std(0).clamp_min(1e-9)
        views = self._standard(raw)
        self.spread_ = views[:, : len(DISTANCES)].sum(1).std().clamp_min(1e-9)
        self.scores_ = self._combined(views).sort().values
        return self

    def look(self, d: Decomposition) -> Observed:
        """What is looked at, of each image.

        Raises:
            ValueError: terms of another model, of another width than the classifier, or that do not sum to unit features.
        """
        if not d.normalized:
            raise ValueError(
                "expected terms that sum to unit features; received terms of raw ones; decompose with normalize=True"
            )
        check_alike(self.terms_, d)
        classes = taken_for(d, self.classifier)
        terms = layer_terms(d)
        cut = max(1, 2 * d.n_layers // 3)
        before = d.embed + terms[:, :cut].sum((1, 2))
        layers = (terms @ self._directions.to(d.embed).T).flatten(1)
        start = (d.embed + d.bias).norm(dim=-1).clamp_min(torch.finfo(d.embed.dtype).tiny)
        loud = torch.stack([1 / start, lengths(d)], 1).double().log()
        return Observed(d.features, layers, before, loud, classes)

    def views(self, d: Decomposition) -> Float[Tensor, "batch view"]:
        """How unlike clean images in each of `VIEWS`, in standard deviations.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: as `look`.
        """
        check_fitted(self, "scores_")
        return self._standard(self.expected_.raw(self.look(d)))

    @by_shards
    def score(self, d: Decomposition) -> Float[Tensor, " batch"]:
        """Higher is more suspicious.

        Raises:
            NotFittedError, ValueError: as `views`.
        """
        return self._combined(self.views(d))

    @cached_property
    def _directions(self) -> Float[Tensor, "direction d_embed"]:
        return class_directions(self.classifier)

    def _combined(self, views: Float[Tensor, "image view"]) -> Float[Tensor, " image"]:
        """Fisher's: minus the logarithms of the upper tails, under a normal law."""
        odd, loud = views.split([len(DISTANCES), len(VIEWS) - len(DISTANCES)], 1)
        return -log_ndtr(-odd.sum(1) / self.spread_) - log_ndtr(-loud).sum(1)

    def _standard(self, raw: Float[Tensor, "image view"]) -> Float[Tensor, "image view"]:
        return (raw - self.mean_) / self.deviation_

    def _check_images(self, clean: Observed) -> None:
        known = len(clean.classes.unique())
        if known < 2:
            raise ValueError(
                f"expected clean images of at least 2 classes; all {len(clean)} were taken for one; give images of "
                "every class"
            )
        if len(clean) < (needed := max(len(self.classifier), 10 * self.folds)):
            raise ValueError(
                f"expected at least {needed} clean images, as many as the classifier has classes ({len(self.classifier)}) "
                f"and ten a fold; received {len(clean)}; fit on more, or with a classifier of fewer classes"
            )


@dataclass(eq=False, repr=False)
class AgnosticRep(Saved, Intervention):
    """Takes the answer out of the features of suspicious images, so that the next one stands.

    What tells the answer from the mean of the classes is taken out of what tells the image from the mean of clean ones. Its
    cosine is then below the mean of the classes, and another class is nearer.

        repair = AgnosticRep(model.zero_shot_classifier(class_names)).fit(clean)
        repair(model.decompose(images, normalize=True)).features

    Args:
        classifier: as `AgnosticDet`.
        budget: share of clean images that may be touched.
        folds: as `AgnosticDet`.
        seed: as `AgnosticDet`.

    Attributes:
        detector_: which images are touched.
        moments_: means of the terms of clean images.
    """

    classifier: Float[Tensor, "class d_embed"]
    _: KW_ONLY
    budget: float = 0.01
    folds: int = 5
    seed: int = 0
    form: ClassVar[str] = "decompclip.agnostic/2"
    learned: ClassVar[str] = "detector_"
    detector_: AgnosticDet = field(init=False)
    moments_: Moments = field(init=False)

    def fit(self, clean: Decomposition | Iterable[Decomposition]) -> AgnosticRep:
        """Learn from clean images of all classes.

        Args:
            clean: as `AgnosticDet.fit`.

        Raises:
            ValueError: as `AgnosticDet.fit`, or too few images for the budget.
        """
        moments: list[Moments] = []

        def counted() -> Iterable[Decomposition]:
            for part in blocks(clean):
                own = Moments.of(part, second=False)
                moments[:] = [moments[0].merge(own) if moments else own]
                yield part

        detector = self._detector().fit(counted())
        detector.threshold_at(self.budget)
        self.detector_, self.moments_ = detector, moments[0]
        return self

    def flags(self, d: Decomposition) -> Bool[Tensor, " batch"]:
        """Which images are touched.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: as `AgnosticDet.look`.
        """
        check_fitted(self, "detector_")
        return self.detector_.predict(d, fpr=self.budget)

    def without_answer(self, features: Float[Tensor, "image d_embed"]) -> Float[Tensor, "image d_embed"]:
        """Unit features that hold nothing of their answers, nor of the mean of clean images.

        Args:
            features: unit features.

        Raises:
            NotFittedError: `fit` was not called.
        """
        check_fitted(self, "detector_")
        classifier = self.classifier.to(features)
        answers = toward(classifier)[(features @ classifier.T).argmax(1)]
        rest = features - self.moments_.features.to(features)
        rest = rest - (rest * answers).sum(1, keepdim=True) * answers
        # A hair below nothing: of two classes, the other one is to stand.
        return normalize(rest - HAIR * rest.norm(dim=1, keepdim=True) * answers, dim=1)

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """Repaired terms (direct mode): the MLPs share equally what is to be taken out, which heads have no coordinates for.

        Args:
            d: terms of unit features.
            where: restricts images: one in which it names no component stays as it is.

        Raises:
            NotFittedError, ValueError: as `flags`, or `where` is no mask of these images.
        """
        touched = self.flags(d)
        check_where(
            where, (len(d), d.n_layers, d.n_heads), d.n_layers * (d.n_heads + 1) + 1 + d.pool.shape[1]
        )
        if where is not None:
            touched = touched & where.flatten(1).any(1).to(touched.device)
        if not touched.any():
            return d
        rest = torch.where(touched[:, None], self.without_answer(d.features) - d.features, 0)
        return d.edit(mlps=d.mlps + rest[:, None] / d.n_layers)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """Raises ValueError: what is repaired is a feature, and no stream leads to it."""
        raise ValueError(
            "expected direct mode, repair(model.decompose(images, normalize=True)); AgnosticRep has no causal mode; "
            "`Guard` runs it inside encode_image"
        )

    def _stored(self) -> tuple[Moments, Mapping[str, Tensor | None], Mapping[str, Any]]:
        detector, expected = self.detector_, self.detector_.expected_
        tensors = {"classifier": self.classifier} | {name: getattr(detector, name) for name in LEARNT}
        tensors |= {f"extrapolation.{name}": x for name, x in vars(expected.extrapolation).items()}
        tensors["loud"] = expected.loud
        for view, distance in expected.distances.items():
            tensors |= {f"{view}.{name}": x for name, x in vars(distance).items()}
        options = {name: getattr(self, name) for name in OPTIONS}
        return self.moments_, tensors, {"options": options}

    @classmethod
    def _restored(
        cls, moments: Moments, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> AgnosticRep:
        repair = cls(tensors["classifier"], **{name: about["options"][name] for name in OPTIONS})
        repair.moments_, repair.detector_ = moments, repair._detector()
        for name in LEARNT:
            setattr(repair.detector_, name, tensors[name])
        repair.detector_.terms_ = moments
        repair.detector_.expected_ = Expected(
            {view: ClassDistance(**under(f"{view}.", tensors)) for view in DISTANCES},
            Extrapolation(**under("extrapolation.", tensors)),
            tensors["loud"],
            toward(tensors["classifier"]).double(),
        )
        return repair

    def _detector(self) -> AgnosticDet:
        return AgnosticDet(self.classifier, folds=self.folds, seed=self.seed)

    def __repr__(self) -> str:
        return f"AgnosticRep(budget={self.budget})"


HAIR = 1e-3
"""Of a repaired feature's length, how far its answer stands below the mean of the classes."""

OPTIONS = ("budget", "folds", "seed")
LEARNT = ("mean_", "deviation_", "spread_", "scores_")
"""What of the detector stands in a file by its own name."""
