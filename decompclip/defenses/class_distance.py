"""Distance of a point to its class, in units of how classes spread: Mahalanobis', shrunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        if len(points) < 2:
            raise ValueError(f"expected at least 2 points; received {len(points)}; fit on more clean images")
        points = points.double()
        one_hot = torch.nn.functional.one_hot(classes, n_classes).to(points)
        counts, common = one_hot.sum(0), points.mean(0)
        sums = torch.einsum("nk,ncd->kcd", one_hot, points - common)
        means = common + sums / (counts + pseudo_count)[:, None, None]
        rest = points - means[classes]
        covariance = torch.einsum("ncd,nce->cde", rest, rest) / len(rest)
        return ClassDistance(means, whitener(covariance, len(rest)))

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
    values, vectors = torch.linalg.eigh(shrunk)
    floor = 1e-10 * values.amax(-1, keepdim=True)
    inverse = torch.where(values > floor, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)
    return vectors * inverse[..., None, :] @ vectors.mT
