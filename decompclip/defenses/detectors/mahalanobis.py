"""Mahalanobis distance of the feature to the clean ones, in one cloud or class by class (Lee et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.defenses.class_distance import ClassDistance
from decompclip.defenses.detectors.detector import Detector, need
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
