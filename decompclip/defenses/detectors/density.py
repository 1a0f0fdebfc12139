"""Detectors that ask whether an image's feature lies where clean ones are sparse, or dense (docs/method.md, section 6).

Distances are Euclidean between unit features, and so rise with the angle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from decompclip.defenses.detectors.detector import Detector, registered
from decompclip.defenses.distances import ClassDistance
from decompclip.evaluation.evaluate import Encoder

_TINY = 1e-12


class NeighbourDetector(Detector):
    """A score from the distances to the `k` nearest clean images.

    Args:
        model: as `Detector`.
        classifier: not asked; every registered detector is made from a model and its classifier.
        k: neighbours; the sources take 16 to 64.
    """

    learns: ClassVar[bool] = True
    bank_: NearestNeighbors

    def __init__(self, model: Encoder, classifier: Tensor | None = None, *, k: int = 32) -> None:
        super().__init__(model)
        self.k = k

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        points = self._all_features(batches, self.k + 1, f"to be neighbours, {self.k} of each other")
        self.bank_ = NearestNeighbors(n_neighbors=self.k).fit(points.cpu().double().numpy())

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        points = self._features(pixels).cpu().double().numpy()
        distances, places = self.bank_.kneighbors(points)
        return torch.from_numpy(self._judge(np.maximum(distances, _TINY), places))

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Scores from distances and places of neighbours, `[image, k]` each, nearest first."""
        raise NotImplementedError

    def _within(self) -> np.ndarray:
        """Of each clean image, the distances to its own neighbours, itself left out."""
        return np.maximum(self.bank_.kneighbors()[0], _TINY)


@registered("k-distance")
class KDistance(NeighbourDetector):
    """The distance to the k-th neighbour (Ramaswamy et al., 2000)."""

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        return distances[:, -1]


@registered("SLOF")
class SLOF(NeighbourDetector):
    """Simplified local outlier factor: that distance over the mean of the neighbours' own (Schubert et al., 2014)."""

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        super()._learn(batches)
        self._reach = self._within()[:, -1]

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        return (distances[:, -1:] / self._reach[places]).mean(1)


@registered("LID")
class LID(NeighbourDetector):
    """Local intrinsic dimension, by maximum likelihood (Amsaleg et al., 2015): `-1 / mean(log(r_i / r_k))`."""

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        return _dimension(distances)


@registered("DAO")
class DAO(NeighbourDetector):
    """Dimensionality-aware outlier score (Anderberg et al., 2024): SLOF's ratios, each to the power of the dimension
    around the neighbour."""

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        super()._learn(batches)
        within = self._within()
        self._reach, self._dimension = within[:, -1], _dimension(within)

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        # the mean of the powers overflows where dimensions are high: its logarithm does not
        powers = self._dimension[places] * np.log(distances[:, -1:] / self._reach[places])
        return np.logaddexp.reduce(powers, axis=1) - np.log(powers.shape[1])


def _dimension(distances: np.ndarray) -> np.ndarray:
    logs = np.log(distances / distances[:, -1:])
    return -1 / np.minimum(logs.mean(1), -_TINY)


class Mahalanobis(Detector):
    """Squared distance to the mean of the clean features, by their shrunk covariance (Lee et al., 2018).

    Args:
        model: as `Detector`.
        classifier: with it, the distance to the mean of the images that are taken for the same class, by the
            covariance within classes.
    """

    learns: ClassVar[bool] = True
    distance_: ClassDistance

    def __init__(self, model: Encoder, classifier: Float[Tensor, "class d_embed"] | None = None) -> None:
        super().__init__(model)
        self.classifier = classifier

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        features = self._all_features(batches, 10, "to estimate a covariance from")
        n_classes = 1 if self.classifier is None else len(self.classifier)
        self.distance_ = ClassDistance.fit(features[:, None], self._classes(features), n_classes)

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        features = self._features(pixels)
        return self.distance_(features[:, None], self._classes(features))[:, 0]

    def _classes(self, features: Float[Tensor, "batch d_embed"]) -> Tensor:
        if self.classifier is None:
            return torch.zeros(len(features), dtype=torch.long, device=features.device)
        return (features @ self.classifier.to(features).T).argmax(1)


@registered("Mahalanobis")
def _mahalanobis(model: Any, classifier: Tensor) -> Mahalanobis:
    return Mahalanobis(model)


registered("Mahalanobis by class")(Mahalanobis)
