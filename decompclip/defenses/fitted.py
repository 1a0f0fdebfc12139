"""What fitted defenses share: thresholds that hold on fresh clean images, cross-fitting, and files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float
from sklearn.exceptions import NotFittedError
from torch import Tensor

from decompclip.decomposition.decomposition import TERMS, read_tensors, write_tensors
from decompclip.decomposition.maps import same_model, term_maps
from decompclip.decomposition.moments import Moments, StreamMeans
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import HookedViT, tower

X_contra = TypeVar("X_contra", contravariant=True)


@runtime_checkable
class DetectorLike(Protocol[X_contra]):
    """Every detector: of pixels (`Detector`), or of decompositions (`AgnosticDet`, `DecompDet`).

    Fitted on clean images; an image's score is higher where it is more suspicious, and does not depend on the others.
    """

    def fit(self, clean: Any) -> Any: ...

    def score(self, x: X_contra, /) -> Tensor: ...

    def predict(self, x: X_contra, /) -> Tensor: ...


class Calibrated(ABC):
    """A detector whose thresholds come from the scores of clean images.

    Attributes:
        scores_: of clean images, each scored by what was learnt from others, in rising order.
    """

    scores_: Float[Tensor, " image"]

    @abstractmethod
    def score(self, x: Any, /) -> Tensor:
        """Higher is more suspicious."""

    def threshold_at(self, fpr: float) -> float:
        """The score that a share `fpr` of fresh clean images, or fewer, is above.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: a rate outside (0, 1), or finer than the clean images can tell.
        """
        check_fitted(self, "scores_")
        return float(calibrated(self.scores_, fpr))

    def predict(self, x: Any, /, *, fpr: float = 0.05) -> Bool[Tensor, " batch"]:
        """Which images are suspicious, at this share of clean ones.

        Raises:
            NotFittedError, ValueError: as `score` and `threshold_at`.
        """
        return self.score(x) > self.threshold_at(fpr)


def calibrated(scores: Float[Tensor, "image ..."], fpr: float) -> Tensor:
    """The least of the sorted clean `scores` that a fresh clean image exceeds with probability `fpr` at most.

    Raises:
        ValueError: a rate outside (0, 1), or finer than so many images can tell.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"expected a false-positive rate in (0, 1); received {fpr}")
    n = len(scores)
    place = math.ceil((n + 1) * (1 - fpr) - 1e-9)
    if place > n:
        raise ValueError(
            f"expected at least {math.ceil(1 / fpr - 1e-9) - 1} clean images to calibrate a false-positive rate of {fpr}; "
            f"received {n}; fit on more, or ask for a higher rate"
        )
    return scores[place - 1]


def check_fitted(estimator: object, learned: str) -> None:
    """Raises NotFittedError unless `fit` was called."""
    if not hasattr(estimator, learned):
        name = type(estimator).__name__
        raise NotFittedError(
            f"expected a fitted {name}; received one that has seen no clean images; call {name}.fit(clean) first"
        )


def held_out(n: int, folds: int, seed: int, device: torch.device) -> Iterator[Bool[Tensor, " image"]]:
    """Which images are left out of each fold of a cross-fitting.

    Raises:
        ValueError: fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f"expected at least 2 folds; received {folds}")
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device) % folds
    return (fold == held for held in range(folds))


def save_fitted(
    path: Path, form: str, moments: Moments, tensors: Mapping[str, Tensor | None], about: Mapping[str, Any]
) -> Path:
    """Write means and what was learnt beside them, whole or not at all. Second moments are left out.

    Raises:
        ValueError: the terms that the moments are of do not know their model.
    """
    if moments.maps.fingerprint is None:
        raise ValueError(
            "expected moments that know their model; received some without a fingerprint; fit on terms of decompose"
        )
    streams = vars(moments.streams) if moments.streams else {}
    stored = {
        **tensors,
        **{f"moments.{name}": getattr(moments, name) for name in TERMS},
        **{f"streams.{name}": x for name, x in streams.items()},
        "fingerprint": moments.maps.fingerprint,
    }
    facts = {"count": moments.count, "normalized": moments.normalized, "convention": moments.maps.convention}
    return write_tensors(
        path, {name: x for name, x in stored.items() if x is not None}, form, {**about, **facts}
    )


def load_fitted(
    path: Path, form: str, kind: str, model: HookedCLIP | HookedViT
) -> tuple[Moments, dict[str, Tensor], dict[str, Any]]:
    """Read what `save_fitted` wrote, for the model that it was fitted on: moments, tensors, and facts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds something else, or belongs to another model.
    """
    tensors, about = read_tensors(path, form, f"a saved {kind}", f"{kind}.save")
    if about.get("kind", kind) != kind:
        raise ValueError(f"expected a saved {kind}; received {path}, a saved {about['kind']}; load it as one")
    maps = term_maps(tower(model), about["convention"])
    if maps.fingerprint is None or not same_model(tensors["fingerprint"], maps.fingerprint.cpu()):
        raise ValueError(
            f"expected the model that the {kind} in {path} was fitted on; received another one; fit anew on clean "
            "images of this model"
        )
    device = maps.heads.device
    if device.type != "mps":  # which has no fp64
        tensors = {name: x.to(device) for name, x in tensors.items()}

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    streams = part("streams.")
    moments = Moments(
        about["count"],
        **part("moments."),
        maps=maps,
        normalized=about["normalized"],
        streams=StreamMeans(**streams) if streams else None,
    )
    return moments, tensors, about
