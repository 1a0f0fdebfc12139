"""What detectors of pixels have in common, the registry of all detectors, and what one costs."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.data.feed import Labelled
from decompclip.data.pixels import check_pixels
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.defenses.fitted import Calibrated, DetectorLike, Sample, check_fitted
from decompclip.evaluation.evaluate import Encoder

D = TypeVar("D", bound="Detector")
M = TypeVar("M", bound="Callable[[Any, Tensor], Detector]")


CALIBRATION = 1000
"""Images that detectors of several forward passes calibrate on: a false-positive rate of 0.05 then deviates by 0.007."""


class Detector(Calibrated):
    """`fit(clean).score(pixels)`: one number an image, higher where an attack is more likely.

    Pixels are `[batch, 3, h, w]` in [0, 1]; models normalise them. A detector that learns does so from a half of the
    clean images, drawn by their places. The other half calibrates: it is scored like fresh images, so that thresholds hold
    for those. A detector that learns nothing calibrates on all; one of several forward passes an image on a sample of
    `CALIBRATION`.

    A subclass gives `_score`; one that learns sets `learns` and gives `_learn`.

    Args:
        model: a `HookedCLIP`, or whatever normalises and encodes images.
        batch_size: images a forward pass.

    Attributes:
        forwards: forward passes for each image.
        learns: whether clean images are learnt from, beside the calibration.
        scores_: of the calibration images, in rising order.
    """

    learns: ClassVar[bool] = False

    def __init__(self, model: Encoder, *, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size

    @property
    def forwards(self) -> int:
        return 1

    def fit(self: D, clean: Any) -> D:
        """Learn from clean images, and calibrate.

        Args:
            clean: a tensor of pixels, something with `batches()` (`Shapes`, a folder), or an iterable of batches.

        Raises:
            ValueError: pixels that are not in [0, 1], or too few images.
        """
        batches = source(clean, self.batch_size)
        if self.learns:
            self._learn(part for pixels, places in batches() if len(part := pixels[learnt(places)]))
        scores, sample = [], Sample(CALIBRATION, 0)
        for pixels, places in batches():
            held = pixels[~learnt(places)] if self.learns else pixels
            if self.forwards > 1:
                sample.add(held)
            elif len(held):
                scores.append(self._scores(held))
        scores += [self._scores(held) for held in sample.columns()]
        if not scores:
            raise ValueError("expected clean images to calibrate on; received too few: give at least 2")
        self.scores_ = torch.cat(scores).double().sort().values
        return self

    @torch.no_grad()
    def score(self, pixels: Tensor) -> Float[Tensor, " batch"]:
        """Higher is more suspicious; an image's score does not depend on the others.

        Args:
            pixels: [batch, 3, h, w] in [0, 1].

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: pixels that are not in [0, 1].
        """
        check_fitted(self, "scores_")
        check_pixels(pixels)
        return self._scores(pixels)

    @abstractmethod
    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        """The scores of some images."""

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        """Learn from clean images."""

    def _scores(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._score(part) for part in pixels.split(self.batch_size)])

    def _features(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch d_embed"]:
        """Unit features."""
        features = self.model.encode_image(self.model.normalize(pixels)).float()
        return torch.nn.functional.normalize(features, dim=1)

    @torch.no_grad()
    def _all_features(
        self, batches: Iterable[Float[Tensor, "_ 3 h w"]], least: int, what: str
    ) -> Float[Tensor, "image d_embed"]:
        """Unit features of all images to learn from, if they are enough."""
        found = [self._features(pixels) for pixels in batches]
        need(sum(map(len, found)), least, what)
        return torch.cat(found)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


DETECTORS: dict[str, Callable[[Any, Tensor], Detector]] = {}
"""From a model and the zero-shot classifier of its own class names to a detector with its source's settings, by name."""


def registered(name: str) -> Callable[[M], M]:
    """Puts a class, or a function that makes a detector, into `DETECTORS`."""

    def register(make: M) -> M:
        DETECTORS[name] = make
        return make

    return register


def learnt(places: Tensor) -> Bool[Tensor, " image"]:
    """Which images are learnt from: of each pair of neighbours one, drawn, so that no order of the images matters."""
    heads = [bool(np.random.Philox(key=[7, int(place) // 2]).random_raw() & 1) for place in places]
    return (torch.tensor(heads, dtype=torch.bool) == (places % 2 == 0)) if len(places) else places.bool()


def need(n: int, least: int, what: str) -> None:
    """Raises ValueError where there are too few clean images."""
    if n < least:
        raise ValueError(
            f"expected at least {2 * least} clean images, half of them {what}; {n} were left to learn from"
        )


def source(clean: Any, size: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Batches of pixels with their places, as often as asked for."""
    if not isinstance(clean, Tensor | Labelled):
        clean = list(clean)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        parts = clean.split(size) if isinstance(clean, Tensor) else clean
        for part in parts.batches(size) if isinstance(parts, Labelled) else parts:
            pixels = part if isinstance(part, Tensor) else part.images
            check_pixels(pixels)
            yield pixels, torch.arange(seen, seen + len(pixels))
            seen += len(pixels)

    return batches


@runtime_checkable
class Decomposer(Encoder, Protocol):
    """A `HookedCLIP`, or what decomposes images as it does."""

    def decompose(
        self, images: Any, *, normalize: bool = ..., convention: Convention = ...
    ) -> Decomposition: ...


class OnTerms(Detector):
    """Decomposes images, and asks a detector of terms.

    Args:
        model: the CLIP.
        detector: of terms; fitted with this one. One that calibrates itself (`Calibrated`) gets all clean images.
        convention: of the terms.
        batch_size: images a forward pass.
    """

    learns: ClassVar[bool] = True

    def __init__(
        self,
        model: Decomposer,
        detector: DetectorLike[Decomposition],
        *,
        convention: Convention = "centred",
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        self.clip = model
        self.detector = detector
        self.convention: Convention = convention

    def fit(self, clean: Any) -> OnTerms:
        """See `Detector.fit`."""
        if not isinstance(self.detector, Calibrated):
            return super().fit(clean)
        self._learn(pixels for pixels, _ in source(clean, self.batch_size)())
        self.scores_ = self.detector.scores_
        return self

    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        def terms() -> Iterator[Decomposition]:
            seen = 0
            for pixels in batches:
                seen += len(pixels)
                with torch.no_grad():
                    d = self._terms(pixels)
                yield d
            # one that calibrates itself learns from all, and says how many it takes
            if not isinstance(self.detector, Calibrated):
                need(seen, 10, "to learn from")

        self.detector.fit(terms())

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        return self.detector.score(self._terms(pixels)).double()

    def _terms(self, pixels: Tensor) -> Decomposition:
        return self.clip.decompose(self.clip.normalize(pixels), normalize=True, convention=self.convention)

    def __repr__(self) -> str:
        return f"OnTerms({self.detector!r})"


@torch.no_grad()
def measure_cost(detector: Detector, pixels: Float[Tensor, "batch 3 h w"], *, repeats: int = 3) -> float:
    """Time of a score, in times of a plain `encode_image` of the same images: the least of some repeats of each, in turns.

    Raises:
        NotFittedError: the detector was not fitted.
        ValueError: no images.
    """
    if not len(pixels):
        raise ValueError("expected images to score; received 0 images")
    model, plain, scored = detector.model, [], []
    detector.score(pixels[:1])  # first calls pay for what later ones reuse
    for _ in range(repeats):
        begin = _now()
        for part in pixels.split(detector.batch_size):
            model.encode_image(model.normalize(part))
        middle = _now()
        detector.score(pixels)
        plain.append(middle - begin)
        scored.append(_now() - middle)
    return min(scored) / min(plain)


def _now() -> float:
    """The time when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
