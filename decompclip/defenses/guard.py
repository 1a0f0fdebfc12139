"""Guard: a model that repairs, or tells of, each suspicious image while it runs.

    guard = Guard(model, DecompRep(...).fit(clean))
    guard.encode_image(images)          # in place of model.encode_image(images)

One forward pass: the image is decomposed on the way, its terms are edited (direct mode), and their sum is handed out.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention, TermMaps
from decompclip.decomposition.moments import Moments
from decompclip.models.clip import HookedCLIP
from decompclip.operators.intervention import Composition, Intervention, Restricted

if TYPE_CHECKING:
    import pandas as pd


PASSED = (
    *("visual", "text", "cfg", "name", "provenance", "device", "dtype"),
    *("tokenizer", "tokenize", "encode_text", "logit_scale", "context_length"),
    *("preprocess", "pixels", "preprocess_cfg", "normalize", "mean", "std", "image_size"),
    *("zero_shot_classifier", "class_names", "templates"),
)
"""What a guard hands on from its model as it is."""


@runtime_checkable
class TermDetector(Protocol):
    """A detector over decompositions, higher for more suspicious: `DecompDet`, `AgnosticDet`."""

    def score(self, d: Decomposition) -> Tensor: ...

    def predict(self, d: Decomposition) -> Bool[Tensor, " batch"]: ...


@dataclass(frozen=True, eq=False)
class GuardResult:
    """What a guard says of a batch.

    Attributes:
        features: repaired, as `Guard.encode_image` gives them.
        rejected: which images the detector holds for suspicious; none without a detector.
        scores: the detector's, higher for more suspicious; None without one.
    """

    features: Float[Tensor, "batch d_embed"]
    rejected: Bool[Tensor, " batch"]
    scores: Float[Tensor, " batch"] | None

    def __len__(self) -> int:
        return len(self.features)

    def to_frame(self) -> pd.DataFrame:
        """One row an image: its place in the batch, whether it is rejected, and its score."""
        import pandas as pd

        scores = [None] * len(self) if self.scores is None else self.scores.tolist()
        rows = {"image": range(len(self)), "rejected": self.rejected.tolist(), "score": scores}
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.to_frame().to_html(index=False, max_rows=20)}"

    def __repr__(self) -> str:
        return f"GuardResult({len(self)} images, {int(self.rejected.sum())} rejected)"


class Guard:
    """A model whose image features are repaired; what else zero-shot code asks of a model is passed through.

    Args:
        model: as it is; the guard holds no copy.
        defense: an edit of terms, `DecompRep` or `MeanAblate(...)` say; None repairs nothing.
        reject: a fitted detector over terms, whose word `check` gives beside the features.
        threshold: images of a score above it are rejected; by default `reject.predict` decides.
        convention, normalized: of the terms that `defense` and `reject` were fitted on; by default as their moments
            say, and else centred terms of unit features.

    Raises:
        TypeError: `defense` is no intervention, or `reject` no detector over terms.
        ValueError: neither a defense nor a detector, a threshold without one, or the two were fitted on terms of
            different conventions or normalizations.
    """

    def __init__(
        self,
        model: HookedCLIP,
        defense: Intervention | None = None,
        *,
        reject: TermDetector | None = None,
        threshold: float | None = None,
        convention: Convention | None = None,
        normalized: bool | None = None,
    ) -> None:
        if defense is None and reject is None:
            raise ValueError("expected a defense, a detector to reject by, or both; received neither")
        if defense is not None and not isinstance(defense, Intervention):
            raise TypeError(
                f"expected an intervention that repairs; received a {type(defense).__name__}; a detector goes to "
                "reject="
            )
        if reject is not None and not (hasattr(reject, "score") and hasattr(reject, "predict")):
            raise TypeError(
                f"expected a detector over terms, with score and predict; received a {type(reject).__name__}"
            )
        if threshold is not None and reject is None:
            raise ValueError("expected a detector for the threshold; received none; pass reject=")
        self.model = model
        self.defense = defense
        self.reject = reject
        self.threshold = threshold
        fitted = [*_fitted(defense), *_fitted(reject)]
        self.convention: Convention = _agreed(
            "convention", convention, [f.convention for f in fitted], "centred"
        )
        self.normalized: bool = _agreed(
            "normalization", normalized, [f.normalized for f in fitted if f.normalized is not None], True
        )

    def encode_image(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "batch d_embed"]:
        """Repaired features, for images as `model.encode_image` takes them; no gradient is kept.

        The repair keeps the scale: a feature that no repair touches is the model's own.

        Raises:
            ValueError: images of another size, or a defense that was fitted on another model.
        """
        return self._repaired(*self._terms(images), normalize)

    def check(self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False) -> GuardResult:
        """Repaired features beside the detector's word on each image, from the same single pass.

        Raises:
            ValueError: as `encode_image`.
            NotFittedError: the defense or the detector was not fitted.
        """
        d, length = self._terms(images)
        features = self._repaired(d, length, normalize)
        if self.reject is None:
            return GuardResult(features, torch.zeros(len(d), dtype=torch.bool, device=features.device), None)
        scores = self.reject.score(d)
        suspicious = self.reject.predict(d) if self.threshold is None else scores > self.threshold
        return GuardResult(features, suspicious, scores.to(d.embed))

    def __call__(
        self, image: Float[Tensor, "batch 3 h w"], text: Tensor
    ) -> tuple[Float[Tensor, "batch d_embed"], Float[Tensor, "text d_embed"], Float[Tensor, ""]]:
        """Unit features and the factor to logits, as an open_clip model gives them."""
        texts = self.model.encode_text(text, normalize=True)
        return self.encode_image(image, normalize=True), texts, self.model.logit_scale.exp()

    def __getattr__(self, name: str) -> Any:
        if name in PASSED:
            return getattr(self.model, name)
        raise AttributeError(
            f"a Guard has no {name!r}; what it passes through: {', '.join(sorted(PASSED))}; all else is "
            "guard.model's, unguarded"
        )

    def __repr__(self) -> str:
        reject = "" if self.reject is None else f", reject={self.reject!r}"
        return f"Guard({self.model.name!r}, {self.defense!r}{reject})"

    @torch.no_grad()
    def _terms(self, images: Tensor) -> tuple[Decomposition, Float[Tensor, "batch 1"]]:
        """Terms, and what they are to be multiplied by."""
        d = self.model.decompose(images, convention=self.convention)
        if not self.normalized:
            return d, d.embed.new_ones(len(d), 1)
        assert d.target is not None
        length = d.target.norm(dim=-1, keepdim=True)
        return _over(d, length[:, 0]), length

    @torch.no_grad()
    def _repaired(self, d: Decomposition, length: Tensor, normalize: bool) -> Tensor:
        edited = d if self.defense is None else self.defense(d)
        # the tower's own feature, where there is nothing to add up: no rounding of the sum
        features = edited.features if edited.target is None else edited.target
        features = F.normalize(features, dim=-1) if normalize else features * length
        return features.to(self.model.dtype)


def _over(d: Decomposition, length: Float[Tensor, " batch"]) -> Decomposition:
    """What `decompose(..., normalize=True)` gives, from terms that sum to features of that length."""
    own = {f.name: getattr(d, f.name) for f in fields(d)}
    scaled = {
        name: x / length.view(-1, *[1] * (x.ndim - 1)) for name, x in own.items() if isinstance(x, Tensor)
    }
    return replace(d, **scaled, normalized=True)


@dataclass(frozen=True)
class _Fitted:
    """Of which terms something was fitted on."""

    convention: Convention
    normalized: bool | None


def _fitted(part: object) -> Iterator[_Fitted]:
    if isinstance(part, Composition):
        for step in part.steps:
            yield from _fitted(step)
    elif isinstance(part, Restricted):
        yield from _fitted(part.edit)
    elif isinstance(part, Moments):
        yield _Fitted(part.maps.convention, part.normalized)
    elif isinstance(part, TermMaps):
        yield _Fitted(part.convention, None)
    else:
        known = ("moments", "moments_", "selector_", "detector_", "maps_")
        for name in known:
            yield from _fitted(getattr(part, name, None)) if hasattr(part, name) else ()


def _agreed(what: str, asked: Any, fitted: list[Any], default: Any) -> Any:
    """What all were fitted on."""
    wanted = {*fitted, *([] if asked is None else [asked])}
    if len(wanted) > 1:
        raise ValueError(
            f"expected a defense and a detector of one {what} of terms; received {sorted(map(str, wanted))}; fit both on "
            "decompositions with the same options"
        )
    return next(iter(wanted), default)
