"""Mahalanobis distance of the feature to the clean ones, in one cloud or class by class (Lee et al., 2018).

Detectors of local density: a triggered image lies where clean ones are sparse, or dense (docs/method.md, section 6).

Distances are Euclidean between unit features, and so rise with the angle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from decompclip.defenses.detectors.detector import Detector, need
from decompclip.defenses.distances import ClassDistance
from decompclip.evaluation.evaluate import Encoder


class Mahalanobis(Detector):
    """Squared distance to the mean of the clean features, by their shrunk covariance.

    Args:
        model, batch_size: as `Detector`.
        classifier: with it, the distance to the mean of the images that are taken for the same class, by the
            covariance within classes.
    """

    name: ClassVar[str] = "Mahalanobis"
    learns: ClassVar[bool] = True
    distance_: ClassDistance

    def __init__(
        self,
        model: Encoder,
        classifier: Float[Tensor, "class d_embed"] | None = None,
        *,
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        self.classifier = classifier

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        with torch.no_grad():
            found = [self._features(images) for images in batches]
        features = torch.cat(found) if found else torch.zeros(0, 1)
        need(len(features), 10, "to estimate a covariance from")
        n_classes = 1 if self.classifier is None else len(self.classifier)
        self.distance_ = ClassDistance.fit(features[:, None], self._classes(features), n_classes)

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        features = self._features(images)
        return self.distance_(features[:, None], self._classes(features))[:, 0]

    def _classes(self, features: Float[Tensor, "batch d_embed"]) -> Tensor:
        if self.classifier is None:
            return torch.zeros(len(features), dtype=torch.long, device=features.device)
        return (features @ self.classifier.to(features).T).argmax(1)


_TINY = 1e-12


class NeighbourDetector(Detector):
    """A score from the distances to the `k` nearest clean images.

    Args:
        model, batch_size: as `Detector`.
        k: neighbours; the sources take 16 to 64.
    """

    learns: ClassVar[bool] = True
    bank_: NearestNeighbors

    def __init__(self, model: Encoder, *, k: int = 32, batch_size: int = 64) -> None:
        super().__init__(model, batch_size=batch_size)
        self.k = k

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        with torch.no_grad():
            found = [self._features(images).cpu().double() for images in batches]
        points = torch.cat(found) if found else torch.zeros(0, 1)
        need(len(points), self.k + 1, f"to be neighbours, {self.k} of each other")
        self.bank_ = NearestNeighbors(n_neighbors=self.k).fit(points.numpy())

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        points = self._features(images).cpu().double().numpy()
        distances, places = self.bank_.kneighbors(points)
        return torch.from_numpy(self._judge(np.maximum(distances, _TINY), places))

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Scores from distances and places of neighbours, `[image, k]` each, nearest first."""
        raise NotImplementedError

    def _within(self) -> np.ndarray:
        """Of each clean image, the distances to its own neighbours, itself left out."""
        return np.maximum(self.bank_.kneighbors()[0], _TINY)


class KDistance(NeighbourDetector):
    """The distance to the k-th neighbour (Ramaswamy et al., 2000)."""

    name: ClassVar[str] = "k-distance"

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        return distances[:, -1]


class SLOF(NeighbourDetector):
    """Simplified local outlier factor: that distance over the mean of the neighbours' own (Schubert et al., 2014)."""

    name: ClassVar[str] = "SLOF"

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        super()._learn(batches)
        self._reach = self._within()[:, -1]

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        return (distances[:, -1:] / self._reach[places]).mean(1)


class LID(NeighbourDetector):
    """Local intrinsic dimension, by maximum likelihood (Amsaleg et al., 2015): `-1 / mean(log(r_i / r_k))`."""

    name: ClassVar[str] = "LID"

    def _judge(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        return _dimension(distances)


class DAO(NeighbourDetector):
    """Dimensionality-aware outlier score (Anderberg et al., 2024): SLOF's ratios, each to the power of the dimension
    around the neighbour."""

    name: ClassVar[str] = "DAO"

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
