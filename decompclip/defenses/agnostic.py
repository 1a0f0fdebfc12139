"""Detection and repair without a hint about the attack. Both are our own.

Detection asks three questions of an image. Each is a Mahalanobis distance to the image's class (`ClassDistance`):

* feature: is it like those of other images of its class?
* layers: do heads and MLPs of every layer contribute what they do for others of that class?
* surprise: does the feature follow from what the first half of the layers has found (`Extrapolation`)?

The sum of the three says how odd an image is. A fourth view finds triggered images that are *less* odd than clean ones, as
on photographs, where clean images of a class differ widely and a trigger makes them all alike:

* written: the inverse of the share of the unit feature that is there before the first block. A trigger makes heads and
  MLPs contribute more, all in one direction.

The logarithm of each is brought to mean 0 and deviation 1 over clean images. The score is Fisher's sum of the two upper
tails, -log p(odd) - log p(written), so that either suffices.

The repair edits suspicious images alone. It looks for the deepest layer after which clean images would have ended in
another class, and replaces the contributions of all later layers by what was to be expected from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, reduce
from operator import add, sub
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.special import log_ndtr

from decompclip.decomposition.decomposition import Decomposition, HasTerms, by_shards, check_alike
from decompclip.decomposition.moments import Moments
from decompclip.defenses.distances import (
    ClassDistance,
    ClassSums,
    Extrapolation,
    PrefixSums,
    class_directions,
    layer_terms,
    prefixes,
    ridge,
)
from decompclip.defenses.fitted import (
    Calibrated,
    Saved,
    blocks,
    check_fitted,
    held_out,
    under,
)
from decompclip.operators.intervention import Intervention, Where
from decompclip.tower.vit import Hook, HookedViT

Distance = Literal["feature", "layers", "surprise"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
VIEWS: tuple[str, ...] = (*DISTANCES, "written")


@dataclass(frozen=True, eq=False)
class Observed:
    """What is looked at, of some images.

    Attributes:
        layers: contributions of heads and MLPs, along the directions that tell classes apart.
        before: the feature's partial sums after each layer, or after one.
        written: one over the length of the part of the feature that is there before the first block.
        classes: that the images are taken for.
    """

    features: Float[Tensor, "image d_embed"]
    layers: Float[Tensor, "image part"]
    before: Float[Tensor, "image layer d_embed"]
    written: Float[Tensor, " image"]
    classes: Int[Tensor, " image"]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> Observed:
        return Observed(*(x[rows] for x in vars(self).values()))

    def after(self, layer: int) -> Observed:
        """With the partial sums after one layer alone."""
        return replace(self, before=self.before[:, layer : layer + 1].clone())

    def folds(
        self, n_classes: int, held: list[Bool[Tensor, " image"]]
    ) -> Iterator[tuple[ClassSums, ClassSums]]:
        """Of the images of each fold: sums of the prefix of one layer and the feature side by side, and of `layers`."""
        origins = [x.mean(0, dtype=torch.float64) for x in (self.before[:, 0], self.features, self.layers)]
        for out in held:
            joint = torch.cat([self.before[out, 0], self.features[out]], 1)
            near, layers = torch.cat(origins[:2])[None], origins[2][None]
            yield (
                ClassSums.of(joint[:, None], self.classes[out], n_classes, origin=near),
                ClassSums.of(self.layers[out][:, None], self.classes[out], n_classes, origin=layers),
            )


@dataclass(frozen=True, eq=False)
class Expected:
    """What clean images look like.

    Attributes:
        distances: by the name of the view.
        extrapolation: from the prefix of each layer to the feature.
        cut: the layer after which `surprise` predicts the feature.
    """

    distances: dict[Distance, ClassDistance]
    extrapolation: Extrapolation
    cut: int

    @staticmethod
    def of(joint: ClassSums, layers: ClassSums) -> Expected:
        """For images with the prefix of one layer."""
        width = joint.origin.shape[1] // 2
        scatter, (mean_in, mean_out) = joint.scatter, joint.mean.split(width, 1)
        weights = ridge(scatter[:, :width, :width], scatter[:, :width, width:])
        one = torch.eye(width).to(weights)
        surprise = joint.mapped(torch.cat([-weights[0], one]), (mean_in @ weights[0] - mean_out)[0])
        distances: dict[Distance, ClassDistance] = {
            "feature": joint.mapped(torch.cat([torch.zeros_like(one), one])).distance(),
            "layers": layers.distance(),
            "surprise": surprise.distance(),
        }
        return Expected(distances, Extrapolation(mean_in, mean_out[0], weights), 0)

    def logs(self, seen: Observed) -> Float[Tensor, "image view"]:
        """Logarithms of the views."""
        surprise = seen.features - self.extrapolation.of_layer(seen.before, self.cut)
        points = {"feature": seen.features, "layers": seen.layers, "surprise": surprise}
        found = [self.distances[view](points[view][:, None], seen.classes)[:, 0] for view in DISTANCES]
        tiny = torch.finfo(torch.float64).tiny
        return torch.stack([*found, seen.written.double()], 1).clamp_min(tiny).log()


@dataclass(eq=False, repr=False)
class AgnosticDet(Calibrated):
    """Finds images that are unlike clean ones of their class, or to which heads and MLPs contribute more.

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
        mean_: of each view's logarithm over clean images.
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
        cut, sums = 0, None
        for part in blocks(clean):
            if sums is None:
                self.terms_ = part[[]]  # a copy: a view would keep the block
                self._check_width(part)
                cut = max(0, part.n_layers // 2 - 1)
            seen = self.look(part)
            sums = sums or PrefixSums(seen.before, seen.features)
            sums.add(seen.before, seen.features)
            kept.append(seen.after(cut))
        if sums is None:
            raise ValueError("expected decompositions of clean images; received none; check the image source")
        near = Observed(*(torch.cat(x) for x in zip(*(vars(part).values() for part in kept), strict=True)))
        del kept
        self._check_images(near)
        logs = torch.zeros(len(near), len(VIEWS), dtype=torch.float64, device=near.features.device)
        held = [*held_out(len(near), self.folds, self.seed, near.classes.device)]
        folds = [*near.folds(len(self.classifier), held)]
        whole = [reduce(add, of_folds) for of_folds in zip(*folds, strict=True)]
        for out, own in zip(held, folds, strict=True):
            logs[out] = Expected.of(*map(sub, whole, own)).logs(near[out])
        self.expected_ = replace(Expected.of(*whole), extrapolation=sums.extrapolation(), cut=cut)
        self.mean_, self.deviation_ = logs.mean(0), logs.std(0).clamp_min(1e-9)
        views = self._standard(logs)
        self.spread_ = views[:, :-1].sum(1).std().clamp_min(1e-9)
        self.scores_ = self._combined(views).sort().values
        return self

    def look(self, d: Decomposition) -> Observed:
        """What is looked at, of each image.

        Raises:
            ValueError: terms of another model, or that do not sum to unit features.
        """
        if not d.normalized:
            raise ValueError(
                "expected terms that sum to unit features; received terms of raw ones; decompose with normalize=True"
            )
        check_alike(self.terms_, d)
        terms = layer_terms(d)
        directions = self._directions.to(d.embed)
        classes = (d.features @ self.classifier.to(d.embed).T).argmax(1)
        written = 1 / (d.embed + d.bias).norm(dim=-1).clamp_min(torch.finfo(d.embed.dtype).tiny)
        return Observed(d.features, (terms @ directions.T).flatten(1), prefixes(d, terms), written, classes)

    def views(self, d: Decomposition) -> Float[Tensor, "batch view"]:
        """How unlike clean images in each of `VIEWS`, in standard deviations.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: as `look`.
        """
        check_fitted(self, "scores_")
        return self._views(self.look(d))

    @by_shards
    def score(self, d: Decomposition) -> Float[Tensor, " batch"]:
        """Higher is more suspicious.

        Raises:
            NotFittedError, ValueError: as `views`.
        """
        return self._combined(self.views(d))

    def futures(self, d: Decomposition) -> Float[Tensor, "batch layer d_embed"]:
        """The feature that clean images would have ended with, from the partial sum after each layer.

        Raises:
            ValueError: as `look`.
        """
        return self.expected_.extrapolation(self.look(d).before)

    @cached_property
    def _directions(self) -> Float[Tensor, "direction d_embed"]:
        return class_directions(self.classifier)

    def _views(self, seen: Observed) -> Float[Tensor, "image view"]:
        return self._standard(self.expected_.logs(seen))

    def _combined(self, views: Float[Tensor, "image view"]) -> Float[Tensor, " image"]:
        """Fisher's: minus the logarithms of both upper tails, under a normal law."""
        odd, written = views[:, :-1].sum(1) / self.spread_, views[:, -1]
        return -log_ndtr(-odd) - log_ndtr(-written)

    def _standard(self, logs: Float[Tensor, "image view"]) -> Float[Tensor, "image view"]:
        return (logs - self.mean_) / self.deviation_

    def _check_width(self, d: Decomposition) -> None:
        if self.classifier.shape[-1] != d.d_embed:
            raise ValueError(
                f"expected a classifier of the features' width {d.d_embed}; received {self.classifier.shape[-1]}; build "
                "it with the text tower of the same model"
            )

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
    """Replaces, in suspicious images, what the layers contribute after the class has changed.

        repair = AgnosticRep(model.zero_shot_classifier(class_names)).fit(clean)
        repair(model.decompose(images, normalize=True)).features

    Args:
        classifier: as `AgnosticDet`.
        budget: share of clean images that may be touched.
        folds: as `AgnosticDet`.
        seed: as `AgnosticDet`.

    Attributes:
        detector_: which images are touched.
        moments_: means of the terms, the prototypes that replaced heads get.
    """

    classifier: Float[Tensor, "class d_embed"]
    _: KW_ONLY
    budget: float = 0.01
    folds: int = 5
    seed: int = 0
    form: ClassVar[str] = "decompclip.agnostic/1"
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
                moments[:] = [reduce(Moments.merge, [*moments, Moments.of(part, second=False)])]
                yield part

        detector = self._detector().fit(counted())
        detector.threshold_at(self.budget)
        self.detector_, self.moments_ = detector, moments[0]
        return self

    def turn(self, d: Decomposition) -> Int[Tensor, " batch"]:
        """The last layer that is trusted in each image; the model's last one where nothing is replaced.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: as `AgnosticDet.look`.
        """
        return self._turn(d)[0]

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """Repaired terms (direct mode).

        Heads after the turn become prototypes. The MLPs after it become prototypes too, and share equally what then
        lacks to the expected feature.

        Args:
            d: terms of unit features.
            where: restricts images: one in which it names no component stays as it is.

        Raises:
            NotFittedError, ValueError: as `turn`.
        """
        last, expected = self._turn(d)
        if where is not None:
            last = torch.where(where.flatten(1).any(1), last, d.n_layers - 1)
        layers = torch.arange(d.n_layers, device=d.embed.device)
        after = layers > last[:, None]
        if not after.any():
            return d
        means = self.moments_
        coords = torch.where(after[..., None, None], means.coords.to(d.coords), d.coords)
        mlps = torch.where(after[..., None], means.mlps.to(d.mlps), d.mlps)
        pool = torch.where(after.any(1)[:, None, None], means.pool.to(d.pool), d.pool)
        edited = d.edit(coords=coords, mlps=mlps, pool=pool)
        rest = torch.where(after.any(1)[:, None], expected - edited.features, 0)
        share = after.to(rest) / after.sum(1, keepdim=True).clamp_min(1)
        return edited.edit(mlps=mlps + share[..., None] * rest[:, None])

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """Raises ValueError: what is expected of an image is a feature, and no stream leads to it."""
        raise ValueError(
            "expected direct mode, repair(model.decompose(images, normalize=True)); AgnosticRep has no causal mode; "
            "`Guard` runs it inside encode_image"
        )

    def _stored(self) -> tuple[Moments, Mapping[str, Tensor | None], Mapping[str, Any]]:
        detector, expected = self.detector_, self.detector_.expected_
        tensors = {"classifier": self.classifier} | {name: getattr(detector, name) for name in LEARNT}
        tensors |= {f"extrapolation.{name}": x for name, x in vars(expected.extrapolation).items()}
        for view, distance in expected.distances.items():
            tensors |= {f"{view}.{name}": x for name, x in vars(distance).items()}
        options = {name: getattr(self, name) for name in OPTIONS}
        return self.moments_, tensors, {"options": options, "cut": expected.cut}

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
            about["cut"],
        )
        return repair

    def _detector(self) -> AgnosticDet:
        return AgnosticDet(self.classifier, folds=self.folds, seed=self.seed)

    def _turn(self, d: Decomposition) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch d_embed"]]:
        """The last trusted layer, and the feature expected from there."""
        check_fitted(self, "detector_")
        detector = self.detector_
        seen = detector.look(d)
        flagged = detector._combined(detector._views(seen)) > detector.threshold_at(self.budget)
        futures = detector.expected_.extrapolation(seen.before)[:, :-1]
        found = (futures @ self.classifier.to(futures).T).argmax(-1)
        other: Bool[Tensor, "batch layer"] = (found != seen.classes[:, None]) & flagged[:, None]
        places = torch.arange(other.shape[1], device=other.device)
        deepest = torch.where(other, places, -1).amax(1)
        expected = futures[torch.arange(len(d), device=other.device), deepest.clamp_min(0)].to(d.embed)
        return torch.where(deepest >= 0, deepest, d.n_layers - 1), expected

    def __repr__(self) -> str:
        return f"AgnosticRep(budget={self.budget})"


OPTIONS = ("budget", "folds", "seed")
LEARNT = ("mean_", "deviation_", "spread_", "scores_")
"""What of the detector stands in a file by its own name."""
