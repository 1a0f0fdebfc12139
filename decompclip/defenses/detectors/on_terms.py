"""Detectors that read a decomposition, as detectors of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.defenses.detectors.detector import Clean, Detector, need, source

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


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
