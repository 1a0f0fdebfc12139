"""What the attack-agnostic defenses look at in a decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.readout import full_precision
from decompclip.cache.threads import one_thread

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
