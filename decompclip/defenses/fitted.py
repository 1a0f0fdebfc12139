"""What fitted defenses share: thresholds that hold on fresh clean images, cross-fitting, and files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappush, heapreplace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from sklearn.exceptions import NotFittedError
from torch import Tensor

from decompclip.decomposition.decomposition import TERMS, Decomposition, batches, read_tensors, write_tensors
from decompclip.decomposition.maps import Convention, TermMaps, same_model, term_maps
from decompclip.decomposition.moments import Moments, StreamMeans
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import HookedViT, tower

X_contra = TypeVar("X_contra", contravariant=True)
S = TypeVar("S", bound="Saved")


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


BLOCK = 1000
"""Images that are looked at together: sums over fewer cost as much."""


def blocks(clean: Decomposition | Iterable[Decomposition]) -> Iterator[Decomposition]:
    """Decompositions of about `BLOCK` images each, whatever the batches that they come in."""
    waiting: list[Decomposition] = []
    for part in batches(clean):
        for start in range(0, len(part), BLOCK):
            waiting.append(part[start : start + BLOCK])
            if sum(map(len, waiting)) >= BLOCK:
                yield Decomposition.cat(waiting)
                waiting.clear()
    if waiting:
        yield Decomposition.cat(waiting)


class Sample:
    """Rows of a stream, drawn alike from all: those of the lowest draws, in the order that they came.

    Args:
        most: rows that are kept.
        seed: of the draws.

    Attributes:
        seen: rows that came.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seen = most, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[float, int, list[Tensor]]] = []  # the highest draw first

    def add(self, *columns: Shaped[Tensor, "row ..."]) -> None:
        """Rows of one batch: a row has an entry in each column."""
        for place, draw in enumerate(torch.rand(len(columns[0]), generator=self._generator).tolist()):
            full = len(self._kept) >= self.most
            if not full or -draw > self._kept[0][0]:
                # copies: a view of a row would keep its batch alive
                row = (-draw, self.seen, [x[place].clone() for x in columns])
                (heapreplace if full else heappush)(self._kept, row)
            self.seen += 1

    def columns(self) -> list[Shaped[Tensor, "row ..."]]:
        """What was kept, column by column; a row's entries stand at one place."""
        rows = [row for _, _, row in sorted(self._kept, key=lambda kept: kept[1])]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


class Saved(ABC):
    """A fitted defense that is kept in one safetensors file: means, what was learnt beside them, and options.

    Attributes:
        form: the format of the file.
        learned: what `fit` sets.
    """

    form: ClassVar[str]
    learned: ClassVar[str]

    @abstractmethod
    def _stored(self) -> tuple[Moments, Mapping[str, Tensor | None], Mapping[str, Any]]:
        """Means, tensors, and facts for JSON. Of the means, second moments are left out."""

    @classmethod
    @abstractmethod
    def _restored(
        cls: type[S], moments: Moments, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> S:
        """The defense that gave these."""

    def save(self, path: str | Path) -> Path:
        """Write the options and what was learnt, with the model's fingerprint, as one safetensors file.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: the terms that it was fitted on do not know their model.
        """
        check_fitted(self, self.learned)
        moments, tensors, about = self._stored()
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
        facts = {
            "count": moments.count,
            "normalized": moments.normalized,
            "convention": moments.maps.convention,
        }
        given = {name: x for name, x in stored.items() if x is not None}
        return write_tensors(Path(path), given, self.form, {**about, **facts})

    @classmethod
    def load(cls: type[S], path: str | Path, model: HookedCLIP | HookedViT) -> S:
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: the one that it was fitted on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, holds something else, or was fitted on another model.
        """
        kind = cls.__name__
        tensors, about = read_tensors(Path(path), cls.form, f"a saved {kind}", f"{kind}.save")
        if about.get("kind", kind) != kind:
            raise ValueError(
                f"expected a saved {kind}; received {path}, a saved {about['kind']}; load it as one"
            )
        maps = maps_of(model, about["convention"], tensors["fingerprint"], f"the {kind} in {path}")
        device = maps.heads.device
        if device.type != "mps":  # which has no fp64
            tensors = {name: x.to(device) for name, x in tensors.items()}
        streams = under("streams.", tensors)
        moments = Moments(
            about["count"],
            **under("moments.", tensors),
            maps=maps,
            normalized=about["normalized"],
            streams=StreamMeans(**streams) if streams else None,
        )
        return cls._restored(moments, tensors, about)


def maps_of(
    model: HookedCLIP | HookedViT, convention: Convention, fingerprint: Tensor, what: str
) -> TermMaps:
    """The maps of a model's terms.

    Raises:
        ValueError: the fingerprint, of the model that `what` was fitted on, is another one's.
    """
    maps = term_maps(tower(model), convention)
    if maps.fingerprint is None or not same_model(fingerprint, maps.fingerprint.cpu()):
        raise ValueError(
            f"expected the model that {what} was fitted on; received another one; fit anew on clean images of this model"
        )
    return maps


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors whose names begin so, by what follows."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
