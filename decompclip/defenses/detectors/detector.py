"""What a detector costs, in plain forward passes.

What detectors have in common: fitted on clean images, higher scores are more suspicious, thresholds that hold.

Detectors that read a decomposition, as detectors of images.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.defenses.agnostic_det import calibrated
from decompclip.defenses.selector import check_fitted
from decompclip.evaluation.evaluate import Encoder, Labelled

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True)
class Cost:
    """For each image.

    Attributes:
        forwards: forward passes by design.
        ratio: measured time of a score, in times of a plain `encode_image` of the same images, in the same run.
    """

    forwards: int
    ratio: float


@torch.no_grad()
def measure_cost(detector: Detector, images: Float[Tensor, "batch 3 h w"], *, repeats: int = 3) -> Cost:
    """The least of some repeats, of both, one after the other in turns.

    Raises:
        NotFittedError: the detector was not fitted.
        ValueError: no images, or no repeats.
    """
    if not len(images) or repeats < 1:
        raise ValueError(f"expected images and repeats; received {len(images)} images, {repeats} repeats")
    model, plain, scored = detector.model, [], []
    detector.score(images[:1])  # first calls pay for what later ones reuse
    for _ in range(repeats):
        begin = _now()
        for part in images.split(detector.batch_size):
            model.encode_image(model.normalize(part))
        middle = _now()
        detector.score(images)
        plain.append(middle - begin)
        scored.append(_now() - middle)
    return Cost(detector.forwards, min(scored) / min(plain))


def _now() -> float:
    """The time when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


D = TypeVar("D", bound="Detector")
Clean = Any
"""A tensor of images, something with `batches()` (`Shapes`, a folder), or an iterable of batches."""


@runtime_checkable
class Scaled(Encoder, Protocol):
    """A model with CLIP's logit scale."""

    @property
    def logit_scale(self) -> Tensor: ...


class Detector(ABC):
    """`fit(clean).score(images)`: one number an image, higher where an attack is more likely.

    Images are `[batch, 3, h, w]` in [0, 1]; models normalise them. A half of the clean images, drawn by their places, is learnt from, the
    others calibrate: those are scored like fresh ones, so that thresholds hold for fresh ones. Detectors that learn
    nothing calibrate on all.

    Args:
        model: a `HookedCLIP`, or whatever normalises and encodes images.
        batch_size: images a forward pass.

    Attributes:
        name: in tables.
        forwards: forward passes for each image.
        learns: whether clean images are learnt from, beside the calibration.
        scores_: of the calibration images, in rising order.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = False
    scores_: Float[Tensor, " image"]

    def __init__(self, model: Encoder, *, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size

    @property
    def forwards(self) -> int:
        return 1

    def fit(self: D, clean: Clean) -> D:
        """Learn from clean images, and calibrate.

        Raises:
            ValueError: images that are none in [0, 1], or too few of them.
        """
        batches = source(clean, self.batch_size)
        if self.learns:
            self._learn(part for images, places in batches() if len(part := images[learnt(places)]))
        scores = []
        for images, places in batches():
            held = images[~learnt(places)] if self.learns else images
            if len(held):
                scores.append(self._scores(held))
        if not scores:
            raise ValueError("expected clean images to calibrate on; received too few: give at least 2")
        self.scores_ = torch.cat(scores).double().sort().values
        return self

    @torch.no_grad()
    def score(self, images: Tensor) -> Float[Tensor, " batch"]:
        """Higher is more suspicious; an image's score does not depend on the others.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: images that are none in [0, 1].
        """
        check_fitted(self, "scores_")
        check_images(images)
        return self._scores(images)

    def threshold_at(self, fpr: float) -> float:
        """The score that a share `fpr` of clean images, or fewer, is above.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: a rate outside (0, 1), or finer than the calibration images can tell.
        """
        check_fitted(self, "scores_")
        return calibrated(self.scores_, fpr)

    def predict(self, images: Float[Tensor, "batch 3 h w"], *, fpr: float = 0.05) -> Bool[Tensor, " batch"]:
        """Which images are suspicious, at this share of clean ones.

        Raises:
            NotFittedError, ValueError: as `score` and `threshold_at`.
        """
        return self.score(images) > self.threshold_at(fpr)

    @abstractmethod
    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        """The scores of some images."""

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:  # noqa: B027 - some learn nothing
        """Learn from clean images."""

    def _scores(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._score(part) for part in images.split(self.batch_size)])

    def _features(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch d_embed"]:
        """Unit features."""
        features = self.model.encode_image(self.model.normalize(images)).float()
        return torch.nn.functional.normalize(features, dim=1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LabelDetector(Detector):
    """A detector that reads the model's answers.

    Args:
        classifier: of the zero-shot classes; see `model.zero_shot_classifier`.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(
        self, model: Encoder, classifier: Float[Tensor, "class d_embed"], *, batch_size: int = 64
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        if len(classifier) < 2:
            raise ValueError(
                f"expected a classifier of at least 2 classes; received {len(classifier)}: with one class every answer is "
                "the same"
            )
        self.classifier = classifier

    def _cosines(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch class"]:
        features = self._features(images)
        return features @ self.classifier.to(features).T

    def _answers(self, images: Float[Tensor, "batch 3 h w"]) -> Tensor:
        return self._cosines(images).argmax(1)


def learnt(places: Tensor) -> Bool[Tensor, " image"]:
    """Which images are learnt from: of each pair of neighbours one, drawn, so that no order of the images matters."""
    heads = [bool(np.random.Philox(key=[7, int(place) // 2]).random_raw() & 1) for place in places]
    return (torch.tensor(heads, dtype=torch.bool) == (places % 2 == 0)) if len(places) else places.bool()


def check_images(images: Tensor) -> None:
    """Raises ValueError unless `images` are `[batch, 3, h, w]` in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [batch, 3, h, w]; received {list(images.shape)}")
    low, high = (float(x) for x in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected pixels in [0, 1]; received {low:.2f}..{high:.2f}; leave the normalisation to the model"
        )


def need(n: int, least: int, what: str) -> None:
    """Raises ValueError where there are too few clean images."""
    if n < least:
        raise ValueError(
            f"expected at least {2 * least} clean images, half of them {what}; {n} were left to learn from"
        )


def source(clean: Clean, size: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Batches of images with their places, as often as asked for."""
    if not isinstance(clean, Tensor | Labelled):
        clean = list(clean)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        parts = clean.split(size) if isinstance(clean, Tensor) else clean
        for part in parts.batches(size) if isinstance(parts, Labelled) else parts:
            images = part if isinstance(part, Tensor) else part.images
            check_images(images)
            yield images, torch.arange(seen, seen + len(images))
            seen += len(images)

    return batches


@runtime_checkable
class TermDetector(Protocol):
    """`DecompDet`, `AgnosticDet`."""

    def fit(self, clean: Any) -> Any: ...

    def score(self, d: Decomposition) -> Tensor: ...


class OnTerms(Detector):
    """Decomposes images, and asks a detector of terms.

    Args:
        model: the CLIP.
        detector: of terms; fitted with this one.
        convention: of the terms.
        batch_size: images a forward pass.
    """

    name: ClassVar[str] = "of terms"
    learns: ClassVar[bool] = True

    def __init__(
        self,
        model: HookedCLIP,
        detector: TermDetector,
        *,
        convention: Convention = "centred",
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        self.clip = model
        self.detector = detector
        self.convention: Convention = convention

    def fit(self, clean: Clean) -> OnTerms:
        """As `Detector.fit`; a detector that calibrates itself on what it learns from gets all images for both.

        Raises:
            ValueError: images that are none in [0, 1], or too few of them.
        """
        if not getattr(self.detector, "calibrates", False):
            return super().fit(clean)
        self._learn(images for images, _ in source(clean, self.batch_size)())
        self.scores_ = self.detector.scores_  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        with torch.no_grad():
            found = [self._terms(images) for images in batches]
        need(sum(map(len, found)), 10, "to learn from")
        self.detector.fit(Decomposition.cat(found))

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        return self.detector.score(self._terms(images)).double()

    def _terms(self, images: Tensor) -> Decomposition:
        return self.clip.decompose(self.clip.normalize(images), normalize=True, convention=self.convention)

    def __repr__(self) -> str:
        return f"OnTerms({self.detector!r})"
