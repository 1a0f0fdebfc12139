"""What the defenses without a hint measure: Mahalanobis distances to classes, and regressions between layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from operator import add

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition, by_shards, check_alike
from decompclip.decomposition.maps import full_precision, one_thread
from decompclip.defenses.fitted import Sample, blocks, calibrated, check_fitted, held_out
from decompclip.operators.intervention import Where

PSEUDO_COUNT = 5.0
"""Points at the common mean that each class starts with: a class of few points stays close to it."""


@dataclass(frozen=True, eq=False)
class ClassDistance:
    """Squared Mahalanobis distance to the mean of a point's class, divided by the number of dimensions.

    One covariance for all classes, shrunk toward a multiple of the identity (`oas_shrinkage`), for several
    components at once.

    Attributes:
        means: of each class, drawn to the common mean.
        whitener: `x @ whitener` has the covariance of the identity.
    """

    means: Float[Tensor, "class component dim"]
    whitener: Float[Tensor, "component dim dim"]

    @staticmethod
    def fit(
        points: Float[Tensor, "image component dim"],
        classes: Int[Tensor, " image"],
        n_classes: int,
        *,
        pseudo_count: float = PSEUDO_COUNT,
    ) -> ClassDistance:
        """From clean points.

        Raises:
            ValueError: fewer than two points.
        """
        return ClassSums.of(points, classes, n_classes).distance(pseudo_count)

    def __call__(
        self, points: Float[Tensor, "image component dim"], classes: Int[Tensor, " image"]
    ) -> Float[Tensor, "image component"]:
        rest = points.to(self.means) - self.means[classes.to(self.means.device)]
        return torch.einsum("ncd,cde->nce", rest, self.whitener).square().mean(-1)


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Counts, sums and second moments of points: all that `ClassDistance` needs, and they add and subtract.

    So the folds of a cross-fitting look at every point once, whatever their number.

    Attributes:
        origin: that sums and moments are about; near the points, so that nothing is lost when moments are subtracted.
        second: sum of the outer products.
    """

    origin: Float[Tensor, "component dim"]
    counts: Float[Tensor, " class"]
    sums: Float[Tensor, "class component dim"]
    second: Float[Tensor, "component dim dim"]

    @staticmethod
    def of(
        points: Float[Tensor, "image component dim"],
        classes: Int[Tensor, " image"],
        n_classes: int,
        *,
        origin: Float[Tensor, "component dim"] | None = None,
    ) -> ClassSums:
        """Of these points, about their own mean unless an origin is given."""
        points = points.double()
        origin = points.mean(0) if origin is None else origin
        offsets = points - origin
        sums = offsets.new_zeros(n_classes, *origin.shape).index_add_(0, classes, offsets)
        counts = torch.bincount(classes, minlength=n_classes).to(sums)
        return ClassSums(origin, counts, sums, torch.einsum("ncd,nce->cde", offsets, offsets))

    def __add__(self, other: ClassSums) -> ClassSums:
        """Of all points of both, which are about one origin."""
        return ClassSums(
            self.origin, self.counts + other.counts, self.sums + other.sums, self.second + other.second
        )

    def __sub__(self, other: ClassSums) -> ClassSums:
        """Of the points that are not among the other's; both are about one origin."""
        return ClassSums(
            self.origin, self.counts - other.counts, self.sums - other.sums, self.second - other.second
        )

    def mapped(self, map_: Float[Tensor, "dim new"], shift: Float[Tensor, " new"] | None = None) -> ClassSums:
        """Of the points `x @ map_ + shift`."""
        origin = self.origin @ map_ if shift is None else self.origin @ map_ + shift
        return ClassSums(origin, self.counts, self.sums @ map_, map_.T @ self.second @ map_)

    @property
    def mean(self) -> Float[Tensor, "component dim"]:
        return self.origin + self.sums.sum(0) / self.counts.sum()

    @property
    def scatter(self) -> Float[Tensor, "component dim dim"]:
        """The second moment about the mean."""
        total = self.sums.sum(0)
        return self.second - torch.einsum("cd,ce->cde", total, total) / self.counts.sum()

    def means(self, pseudo_count: float = PSEUDO_COUNT) -> Float[Tensor, "class component dim"]:
        """Of each class, drawn to the common mean."""
        return self.mean + self._drawn(pseudo_count)

    def _drawn(self, pseudo_count: float) -> Float[Tensor, "class component dim"]:
        """Of each class, how far its mean stands from the common one."""
        own = self.sums - self.counts[:, None, None] * self.sums.sum(0) / self.counts.sum()
        return own / (self.counts + pseudo_count)[:, None, None]

    def distance(self, pseudo_count: float = PSEUDO_COUNT) -> ClassDistance:
        """Raises ValueError: fewer than two points."""
        n = int(self.counts.sum())
        if n < 2:
            raise ValueError(f"expected at least 2 points; received {n}; fit on more clean images")
        drawn = self._drawn(pseudo_count)
        weights = self.counts + 2 * pseudo_count  # own = (count + pseudo_count) drawn, on either side
        within = self.scatter - torch.einsum("k,kcd,kce->cde", weights, drawn, drawn)
        return ClassDistance(self.mean + drawn, whitener(within / n, n))


def oas_shrinkage(covariance: Float[Tensor, "component dim dim"], n: int) -> Float[Tensor, " component"]:
    """How far to move each covariance of `n` points toward the identity: the oracle approximating shrinkage.

    It follows from the covariance alone, so that points can be streamed. (Chen et al., 2010, in the form of
    scikit-learn's `oas`.)
    """
    dim = covariance.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    spread = covariance.square().mean((-2, -1))
    numerator, denominator = spread + scale**2, (n + 1) * (spread - scale**2 / dim)
    return torch.where(denominator > 0, (numerator / denominator).clamp(max=1), torch.ones_like(scale))


def whitener(covariance: Float[Tensor, "component dim dim"], n: int) -> Float[Tensor, "component dim dim"]:
    """The inverse square root of the shrunk covariances; of points without any spread, zero."""
    dim = covariance.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    amount = oas_shrinkage(covariance, n)[:, None, None]
    shrunk = (1 - amount) * covariance + amount * scale * torch.eye(dim).to(covariance)
    with one_thread():
        values, vectors = torch.linalg.eigh(shrunk)
    floor = 1e-10 * values.amax(-1, keepdim=True)
    inverse = torch.where(values > floor, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)
    return vectors * inverse[..., None, :] @ vectors.mT


MAX_DIRECTIONS = 32
"""Directions of the classifier that layers are compared in: with more, a thousand images estimate no covariance."""

RIDGE = 3e-3
"""Of the prefix regression, as a share of the mean variance of its inputs."""


def layer_terms(d: Decomposition) -> Float[Tensor, "batch layer 2 d_embed"]:
    """What the heads and the MLP of each layer contribute to the feature."""
    with full_precision(d.coords):
        heads = (
            d.coords.sum(2)
            if d.maps.direct
            else torch.einsum("blhr,lhrd->bld", d.coords, d.maps.heads.to(d.coords))
        )
    return torch.stack([heads, d.mlps], 2)


def class_directions(classifier: Float[Tensor, "class d_embed"]) -> Float[Tensor, "direction d_embed"]:
    """An orthonormal basis of the leading directions in which the classifier tells classes apart."""
    centred = classifier.double() - classifier.double().mean(0)
    with one_thread():
        values, basis = torch.linalg.svd(centred, full_matrices=False)[1:]
    kept = int((values > 1e-6 * values[0]).sum())
    return basis[: min(kept, MAX_DIRECTIONS)].to(classifier)


@dataclass(frozen=True, eq=False)
class Extrapolation:
    """The feature that clean images end with, given a partial sum of it: a ridge regression.

    Attributes:
        mean_in: of the partial sums.
        mean_out: of the feature.
        weights: `feature ~ mean_out + (partial sum - mean_in) @ weights`.
    """

    mean_in: Float[Tensor, " d_embed"]
    mean_out: Float[Tensor, " d_embed"]
    weights: Float[Tensor, "d_embed d_embed"]

    def __call__(self, before: Float[Tensor, "image d_embed"]) -> Float[Tensor, "image d_embed"]:
        return self.mean_out + (before.to(self.weights) - self.mean_in) @ self.weights


def ridge(
    gram: Float[Tensor, "layer d_embed d_embed"], cross: Float[Tensor, "layer d_embed out"]
) -> Float[Tensor, "layer d_embed out"]:
    """Weights of a regression with the penalty `RIDGE`, from moments about the means.

    By Cholesky's factors, in one thread: see `one_thread`.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    # One for a layer that never varies, whose weights are then zero.
    penalty = torch.where(scale > 0, RIDGE * scale, torch.ones_like(scale))
    penalised = gram + penalty * torch.eye(gram.shape[-1]).to(gram)
    with one_thread():
        return torch.cholesky_solve(cross, torch.linalg.cholesky(penalised))


def taken_for(d: Decomposition, classifier: Float[Tensor, "class d_embed"]) -> Int[Tensor, " batch"]:
    """The class that each image is taken for.

    Args:
        d: terms.
        classifier: of the zero-shot classes.

    Raises:
        ValueError: a classifier of another width.
    """
    if classifier.shape[-1] != d.d_embed:
        raise ValueError(
            f"expected a classifier of the features' width {d.d_embed}; received {classifier.shape[-1]}; build "
            "it with the text tower of the same model"
        )
    return (d.features @ classifier.to(d.embed).T).argmax(1)


CALIBRATION = 5000
"""Clean images that components are calibrated on: 61 kB each in a ViT-B/32, and they tell a rate of 0.0002."""


@dataclass(eq=False, repr=False)
class ComponentDistances:
    """Which heads and MLPs of an image are unlike clean ones, each calibrated alone; no hint about the attack is used.

    A head's term is compared in its d_head coordinates, an MLP's in d_embed, each with the mean of the image's class
    and its own shrunk covariance (`ClassDistance`). `flags` are a `where` for any intervention:

        distances = ComponentDistances(classifier).fit(clean)
        MeanAblate(everything, moments).on(distances.flags(d, fpr=0.001))(d)

    Args:
        classifier: of the zero-shot classes; an image's class is the one that it is taken for.
        folds: of the cross-fitting, as `AgnosticDet`.
        seed: of the folds.

    Attributes:
        terms_: of no image, in the form of the clean ones.
        heads_: the heads' distances, learnt from all clean images.
        mlps_: the MLPs'.
        logs_: logarithms of the clean images' distances, each by the other folds, `[image component]`; each component
            sorted.
    """

    classifier: Float[Tensor, "class d_embed"]
    _: KW_ONLY
    folds: int = 5
    seed: int = 0
    terms_: Decomposition = field(init=False)
    heads_: ClassDistance = field(init=False)
    mlps_: ClassDistance = field(init=False)
    logs_: Float[Tensor, "image component"] = field(init=False)

    def fit(self, clean: Decomposition | Iterable[Decomposition]) -> ComponentDistances:
        """Learn from clean images of all classes, batch by batch; of more than `CALIBRATION` a sample calibrates.

        Args:
            clean: decomposed at once or batch by batch.

        Raises:
            ValueError: fewer than ten images a fold, fewer than two folds, or terms of another width than the classifier.
        """
        k, logs = len(self.classifier), []
        whole: list[ClassSums] = []
        sample = Sample(CALIBRATION, self.seed)
        for part in blocks(clean):
            if not whole:
                self.terms_ = part[[]]  # a copy: a view would keep the block
            *points, classes = self._points(part)
            sample.add(*points, classes)
            origins = [sums.origin for sums in whole] or [None] * len(points)
            own = [ClassSums.of(x, classes, k, origin=o) for x, o in zip(points, origins, strict=True)]
            whole = [*map(add, whole, own)] or own
        if sample.seen < 10 * self.folds:
            raise ValueError(f"expected at least {10 * self.folds} clean images; received {sample.seen}")
        *points, classes = sample.columns()
        for out in held_out(len(classes), self.folds, self.seed, classes.device):
            own = [x[out] for x in points]
            sums = [
                all_ - ClassSums.of(x, classes[out], k, origin=all_.origin)
                for x, all_ in zip(own, whole, strict=True)
            ]
            logs.append(_logs([x.distance() for x in sums], own, classes[out]))
        self.heads_, self.mlps_ = (sums.distance() for sums in whole)
        self.logs_ = torch.cat(logs).sort(0).values
        return self

    @by_shards
    def score(self, d: Decomposition) -> Float[Tensor, "batch component"]:
        """How unlike clean images each component is, in standard deviations of the distance's logarithm.

        Returns:
            Heads layer by layer, then the MLPs.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model or convention than the clean images.
        """
        return (self._of(d) - self.logs_.mean(0)) / self.logs_.std(0).clamp_min(1e-9)

    def flags(self, d: Decomposition, *, fpr: float = 0.01) -> Where:
        """The components of each image that are further out than all but a share `fpr` of clean ones.

        Returns:
            `[batch component]` in the order of `ComponentMask.flat`; never the embedding nor the pool's MLP.

        Raises:
            NotFittedError, ValueError: as `score`, or a rate finer than the clean images can tell.
        """
        flagged = self._of(d) > calibrated(self.logs_, fpr)
        never = torch.zeros(len(d), 1 + d.pool.shape[1], dtype=torch.bool, device=flagged.device)
        return torch.cat([flagged, never], 1)

    def _of(self, d: Decomposition) -> Float[Tensor, "batch component"]:
        check_fitted(self, "logs_")
        *points, classes = self._points(d)
        return _logs([self.heads_, self.mlps_], points, classes)

    def _points(self, d: Decomposition) -> tuple[Tensor, Tensor, Int[Tensor, " batch"]]:
        """Of heads, of MLPs, and classes."""
        check_alike(self.terms_, d)
        return d.coords.flatten(1, 2), d.mlps, taken_for(d, self.classifier)


def _logs(
    distances: list[ClassDistance], points: list[Tensor], classes: Int[Tensor, " image"]
) -> Float[Tensor, "image component"]:
    found = torch.cat([far(x, classes) for far, x in zip(distances, points, strict=True)], 1)
    return found.clamp_min(torch.finfo(found.dtype).tiny).log()
