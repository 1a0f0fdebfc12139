"""Distance of a point to its class, in units of how classes spread: Mahalanobis', shrunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.decomposition.maps import one_thread

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

    def whitened(
        self, points: Float[Tensor, "image component dim"], classes: Int[Tensor, " image"]
    ) -> Float[Tensor, "image component dim"]:
        """Offset from the class's mean, in standard deviations."""
        rest = points.to(self.means) - self.means[classes.to(self.means.device)]
        return torch.einsum("ncd,cde->nce", rest, self.whitener)

    def __call__(
        self, points: Float[Tensor, "image component dim"], classes: Int[Tensor, " image"]
    ) -> Float[Tensor, "image component"]:
        return self.whitened(points, classes).square().mean(-1)


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
        return self._with(other, 1)

    def __sub__(self, other: ClassSums) -> ClassSums:
        return self._with(other, -1)

    def _with(self, other: ClassSums, sign: int) -> ClassSums:
        """Both are about one origin."""
        both = ((getattr(self, x), getattr(other, x)) for x in ("counts", "sums", "second"))
        return ClassSums(self.origin, *(torch.add(mine, theirs, alpha=sign) for mine, theirs in both))

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

    def distance(self, pseudo_count: float = PSEUDO_COUNT) -> ClassDistance:
        """Raises ValueError: fewer than two points."""
        n = int(self.counts.sum())
        if n < 2:
            raise ValueError(f"expected at least 2 points; received {n}; fit on more clean images")
        own = self.sums - self.counts[:, None, None] * self.sums.sum(0) / n
        drawn = own / (self.counts + pseudo_count)[:, None, None]  # of a class's mean from the common one
        weights = (
            self.counts + 2 * pseudo_count
        )  # own = (count + pseudo_count) drawn, on either side of the product
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
