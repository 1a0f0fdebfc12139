"""Detectors that others published (docs/method.md, section 6).

The first read the model's answers to changed copies of an image, or to other texts. The others ask whether an image's
feature lies where clean ones are sparse, or dense; distances are Euclidean between unit features, and so rise with the angle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from decompclip.defenses.detectors.corruptions import CORRUPTIONS, SEVERITIES
from decompclip.defenses.detectors.detector import Detector, need, registered
from decompclip.defenses.distances import ClassDistance
from decompclip.defenses.fitted import Sample
from decompclip.evaluation.evaluate import Encoder


class LabelDetector(Detector):
    """A detector that reads the model's answers.

    Args:
        model: as `Detector`.
        classifier: of the zero-shot classes; see `model.zero_shot_classifier`.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, model: Encoder, classifier: Float[Tensor, "class d_embed"]) -> None:
        super().__init__(model)
        if len(classifier) < 2:
            raise ValueError(
                f"expected a classifier of at least 2 classes; received {len(classifier)}: with one class every answer is "
                "the same"
            )
        self.classifier = classifier

    def _cosines(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch class"]:
        features = self._features(pixels)
        return features @ self.classifier.to(features).T

    def _answers(self, pixels: Float[Tensor, "batch 3 h w"]) -> Int[Tensor, " batch"]:
        return self._cosines(pixels).argmax(1)


@runtime_checkable
class Scaled(Encoder, Protocol):
    """A model with CLIP's logit scale."""

    @property
    def logit_scale(self) -> Tensor: ...


@registered("STRIP")
class STRIP(LabelDetector):
    """Minus the mean entropy of the answers to an image with each of `n` clean ones laid over it (Gao et al., 2019).

    A trigger still rules when another image is laid over.

    Args:
        model: with CLIP's logit scale.
        classifier: as `LabelDetector`.
        n: clean images laid over; 64 in the paper. Half of each, so that pixels stay in [0, 1].
        seed: of which clean images are laid over.
    """

    learns: ClassVar[bool] = True
    overlays_: Float[Tensor, "n 3 h w"]

    def __init__(
        self, model: Scaled, classifier: Float[Tensor, "class d_embed"], *, n: int = 64, seed: int = 0
    ) -> None:
        super().__init__(model, classifier)
        self.scale = model.logit_scale
        self.n = n
        self.seed = seed

    @property
    def forwards(self) -> int:
        return self.n

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        sample = Sample(self.n, self.seed)
        for pixels in batches:
            sample.add(pixels)
        need(sample.seen, self.n, "to lay over others")
        (self.overlays_,) = sample.columns()

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        overlays = self.overlays_.to(pixels)
        return torch.stack([-self._entropy(0.5 * x + 0.5 * overlays) for x in pixels])

    def _entropy(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
        logits = torch.cat([self._cosines(part) for part in pixels.split(self.batch_size)]) * self.scale.exp()
        return torch.distributions.Categorical(logits=logits).entropy().mean()


@registered("SCALE-UP")
class ScaleUp(LabelDetector):
    """Share of the copies `min(n x, 1)` that keep the image's label (Guo et al., 2023).

    Args:
        model: as `Detector`.
        classifier: as `LabelDetector`.
        factors: of the copies.
    """

    def __init__(
        self,
        model: Encoder,
        classifier: Float[Tensor, "class d_embed"],
        *,
        factors: Sequence[int | float] = (3, 5, 7, 9, 11),
    ) -> None:
        super().__init__(model, classifier)
        self.factors = tuple(factors)

    @property
    def forwards(self) -> int:
        return 1 + len(self.factors)

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        label = self._answers(pixels)
        kept = [self._answers((factor * pixels).clamp(max=1)) == label for factor in self.factors]
        return torch.stack(kept).double().mean(0)


NEVER = len(SEVERITIES) + 1


@registered("TeCo")
class TeCo(LabelDetector):
    """Deviation, over the twelve corruptions of He et al., of the lowest severity that flips the label (Liu et al., 2023).

    6 where no severity does. Every severity is applied to the image itself. Triggered images resist some corruptions and
    yield to others.

    Args:
        model: as `Detector`.
        classifier: as `LabelDetector`.
        seed: of what the corruptions draw.
    """

    def __init__(self, model: Encoder, classifier: Float[Tensor, "class d_embed"], *, seed: int = 0) -> None:
        super().__init__(model, classifier)
        self.seed = seed

    @property
    def forwards(self) -> int:
        return 1 + len(CORRUPTIONS) * len(SEVERITIES)

    def flips(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch corruption"]:
        """The lowest severity of each corruption at which the label flips, or `NEVER`."""
        label = self._answers(pixels)
        found = torch.full((len(pixels), len(CORRUPTIONS)), float(NEVER), dtype=torch.float64)
        for column, corruption in enumerate(CORRUPTIONS):
            for severity in reversed(SEVERITIES):
                flipped = self._answers(corruption(pixels, severity, seed=self.seed)) != label
                found[flipped.cpu(), column] = severity
        return found

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        return self.flips(pixels).std(1, correction=0)


# The source asks a language model for descriptions of each class. Ours are sentences that suit any class.
DESCRIPTIVE = (
    "a photo of a {}, seen whole and in focus",
    "the typical look of a {}",
    "a {} with all of its parts",
    "a close picture of a {}",
    "a {} as everyone knows it",
)
UNRELATED = (
    "the weather was fine on that day",
    "a blank page",
    "numbers in a table",
    "music from the next room",
    "an idea that nobody wrote down",
)


class BDetCLIP(LabelDetector):
    """Minus the difference of an image's similarity to descriptions of its class and to unrelated texts (Niu et al., 2024).

    Args:
        model: as `Detector`.
        classifier: as `LabelDetector`.
        descriptive: features of each class's descriptions, their mean of unit length; `prompts` makes both.
        unrelated: of the texts that describe no class.
    """

    def __init__(
        self,
        model: Encoder,
        classifier: Float[Tensor, "class d_embed"],
        descriptive: Float[Tensor, "_ _"],
        unrelated: Float[Tensor, " d_embed"],
    ) -> None:
        super().__init__(model, classifier)
        if descriptive.shape != classifier.shape:
            raise ValueError(
                f"expected descriptions {list(classifier.shape)}, one of each class; received {list(descriptive.shape)}"
            )
        self.descriptive = descriptive
        self.unrelated = unrelated

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        features = self._features(pixels)
        label = (features @ self.classifier.to(features).T).argmax(1)
        own = (features * self.descriptive.to(features)[label]).sum(1)
        return features @ self.unrelated.to(features) - own


@torch.no_grad()
def prompts(
    encode: Callable[..., Tensor], class_names: Sequence[str]
) -> tuple[Float[Tensor, "class d_embed"], Float[Tensor, " d_embed"]]:
    """What `BDetCLIP` compares with.

    Args:
        encode: from texts to features, as `model.encode_text`.
        class_names: of the classifier, in its order.

    Raises:
        ValueError: no class names.
    """

    def mean(texts: Sequence[str]) -> Tensor:
        features = torch.nn.functional.normalize(encode(list(texts)).float(), dim=1)
        return torch.nn.functional.normalize(features.mean(0), dim=0)

    if not class_names:
        raise ValueError(
            "expected class names to describe; received none; give those that the classifier was built from"
        )
    described = [mean([text.replace("{}", name) for text in DESCRIPTIVE]) for name in class_names]
    return torch.stack(described), mean(UNRELATED)


@registered("BDetCLIP")
def _bdetclip(model: Any, classifier: Tensor) -> BDetCLIP:
    return BDetCLIP(model, classifier, *prompts(model.encode_text, model.class_names))


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
