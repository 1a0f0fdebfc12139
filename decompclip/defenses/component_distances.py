"""What the attack-agnostic defenses look at in a decomposition.

Which heads and MLPs of an image are unlike clean ones: each calibrated in its own space, without a hint.

A head's term is compared in its d_head coordinates, an MLP's in d_embed, each with the mean of the image's class and
its own shrunk covariance (`ClassDistance`): a step along a direction that clean images never take counts more than one
along which they differ anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import TermMaps, one_thread
from decompclip.decomposition.readout import full_precision
from decompclip.defenses.class_distance import ClassDistance, ClassSums
from decompclip.defenses.selector import check_fitted
from decompclip.operators.intervention import Where

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


def prefixes(
    d: Decomposition, terms: Float[Tensor, "batch layer 2 d_embed"]
) -> Float[Tensor, "batch layer d_embed"]:
    """The feature's partial sums: the embedding, and all that layers 0..l contribute."""
    return d.embed[:, None] + terms.sum(2).cumsum(1)


def class_directions(classifier: Float[Tensor, "class d_embed"]) -> Float[Tensor, "direction d_embed"]:
    """An orthonormal basis of the leading directions in which the classifier tells classes apart."""
    centred = classifier.double() - classifier.double().mean(0)
    with one_thread():
        values, basis = torch.linalg.svd(centred, full_matrices=False)[1:]
    kept = int((values > 1e-6 * values[0]).sum())
    return basis[: min(kept, MAX_DIRECTIONS)].to(classifier)


@dataclass(frozen=True, eq=False)
class Extrapolation:
    """The feature that clean images end with, given how far a prefix has come: a ridge regression for each layer.

    Attributes:
        mean_in, mean_out: of the prefixes and of the feature.
        weights: `feature ~ mean_out + (prefix - mean_in) @ weights`.
    """

    mean_in: Float[Tensor, "layer d_embed"]
    mean_out: Float[Tensor, " d_embed"]
    weights: Float[Tensor, "layer d_embed d_embed"]

    @staticmethod
    def fit(
        before: Float[Tensor, "image layer d_embed"], features: Float[Tensor, "image d_embed"]
    ) -> Extrapolation:
        x, y = before.double(), features.double()
        mean_in, mean_out = x.mean(0), y.mean(0)
        x, y = x - mean_in, y - mean_out
        gram = torch.einsum("nld,nle->lde", x, x)
        return Extrapolation(mean_in, mean_out, ridge(gram, torch.einsum("nld,ne->lde", x, y)))

    def of_layer(
        self, before: Float[Tensor, "image layer d_embed"], layer: int
    ) -> Float[Tensor, "image d_embed"]:
        """From the prefix of one layer."""
        return self.mean_out + (before[:, layer].to(self.weights) - self.mean_in[layer]) @ self.weights[layer]

    def __call__(self, before: Float[Tensor, "image layer d_embed"]) -> Float[Tensor, "image layer d_embed"]:
        return self.mean_out + torch.einsum(
            "nld,lde->nle", before.to(self.weights) - self.mean_in, self.weights
        )


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


Points = tuple[Float[Tensor, "image head coord"], Float[Tensor, "image layer d_embed"], Int[Tensor, " image"]]


class ComponentDistances:
    """Calibrated distances of every head and MLP; `flags` are a `where` for any intervention.

        distances = ComponentDistances(classifier).fit(clean)
        MeanAblate(everything, moments).on(distances.flags(d, fpr=0.001))(d)

    Args:
        classifier: of the zero-shot classes; an image's class is the one that it is taken for.
        folds, seed: of the cross-fitting, as `AgnosticDet`.

    Attributes:
        heads_, mlps_: the distances, learnt from all clean images.
        logs_: of the clean images' distances, each by the other folds, `[image component]`, each component sorted.
    """

    maps_: TermMaps
    normalized_: bool
    heads_: ClassDistance
    mlps_: ClassDistance
    logs_: Float[Tensor, "image component"]

    def __init__(self, classifier: Float[Tensor, "class d_embed"], *, folds: int = 5, seed: int = 0) -> None:
        self.classifier = classifier
        self.folds = folds
        self.seed = seed

    def fit(self, clean: Decomposition | Iterable[Decomposition]) -> ComponentDistances:
        """Learn from clean images of all classes.

        Raises:
            ValueError: fewer than ten images a fold.
        """
        parts = [clean] if isinstance(clean, Decomposition) else list(clean)
        n = sum(map(len, parts))
        if n < 10 * self.folds:
            raise ValueError(f"expected at least {10 * self.folds} clean images; received {n}")
        self.maps_, self.normalized_ = parts[0].maps, parts[0].normalized
        for part in parts:
            self._check(part)
        heads, mlps, classes = (torch.cat(x) for x in zip(*map(self._points, parts), strict=True))
        generator = torch.Generator().manual_seed(self.seed)
        fold = torch.randperm(n, generator=generator).to(classes.device) % self.folds
        k, logs = len(self.classifier), []
        whole = [ClassSums.of(x, classes, k) for x in (heads, mlps)]
        for held in range(self.folds):
            out = fold == held
            own = (heads[out], mlps[out], classes[out])
            held_out = (
                ClassSums.of(x, own[2], k, origin=all_.origin) for x, all_ in zip(own, whole, strict=False)
            )
            logs.append(_logs([(a - b).distance() for a, b in zip(whole, held_out, strict=True)], own))
        self.heads_, self.mlps_ = (sums.distance() for sums in whole)
        self.logs_ = torch.cat(logs).sort(0).values
        return self

    def score(self, d: Decomposition) -> Float[Tensor, "batch component"]:
        """How unlike clean images each component is, in standard deviations of the distance's logarithm.

        Heads come layer by layer, then the MLPs.

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
        logs, n = self._of(d), len(self.logs_)
        if not 1 / (n + 1) <= fpr < 1:
            raise ValueError(
                f"expected a rate in [1/{n + 1}, 1), as {n} clean images can tell it; received {fpr}"
            )
        place = min(n, int((n + 1) * (1 - fpr) + 1 - 1e-9))
        flagged = logs > self.logs_[place - 1]
        never = torch.zeros(len(d), 1 + d.pool.shape[1], dtype=torch.bool, device=flagged.device)
        return torch.cat([flagged, never], 1)

    def _of(self, d: Decomposition) -> Float[Tensor, "batch component"]:
        check_fitted(self, "logs_")
        self._check(d)
        return _logs([self.heads_, self.mlps_], self._points(d))

    def _check(self, d: Decomposition) -> None:
        if d.normalized != self.normalized_:
            raise ValueError(
                f"expected terms with normalize={self.normalized_}, as the clean ones; received normalize={d.normalized}"
            )
        if not self.maps_.matches(d.maps):
            raise ValueError(
                "expected terms of the model and convention that the clean images were decomposed with; received others; "
                "fit on the model it is used with"
            )

    def _points(self, d: Decomposition) -> Points:
        classes = (d.features @ self.classifier.to(d.embed).T).argmax(1)
        return d.coords.flatten(1, 2), d.mlps, classes


def _logs(pair: list[ClassDistance], points: Points) -> Float[Tensor, "image component"]:
    heads, mlps, classes = points
    found = torch.cat([pair[0](heads, classes), pair[1](mlps, classes)], 1)
    return found.clamp_min(torch.finfo(found.dtype).tiny).log()
