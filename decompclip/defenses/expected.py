"""What clean images look like: in their feature, on the way to it, and in how much of it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.defenses.class_distance import ClassDistance
from decompclip.defenses.term_views import Extrapolation

Distance = Literal["feature", "layers", "surprise"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
VIEWS: tuple[str, ...] = (*DISTANCES, "written")


@dataclass(frozen=True, eq=False)
class Looked:
    """What is looked at, of some images."""

    features: Float[Tensor, "image d_embed"]
    layers: Float[Tensor, "image part"]
    before: Float[Tensor, "image layer d_embed"]
    written: Float[Tensor, " image"]
    classes: Int[Tensor, " image"]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> Looked:
        return Looked(*(getattr(self, name)[rows] for name in Looked.__annotations__))

    @staticmethod
    def cat(parts: list[Looked]) -> Looked:
        return Looked(
            *(torch.cat([getattr(part, name) for part in parts]) for name in Looked.__annotations__)
        )


@dataclass(frozen=True, eq=False)
class Expected:
    """What clean images look like.

    Attributes:
        cut: the layer after which `surprise` predicts the feature.
    """

    distances: dict[Distance, ClassDistance]
    extrapolation: Extrapolation
    cut: int

    @staticmethod
    def of(clean: Looked, n_classes: int, cut: int) -> Expected:
        extrapolation = Extrapolation.fit(clean.before, clean.features)
        expected = Expected({}, extrapolation, cut)
        fitted: dict[Distance, ClassDistance] = {
            view: ClassDistance.fit(points, clean.classes, n_classes)
            for view, points in expected.points(clean).items()
        }
        return Expected(fitted, extrapolation, cut)

    def points(self, seen: Looked) -> dict[Distance, Float[Tensor, "image 1 dim"]]:
        surprise = seen.features - self.extrapolation(seen.before)[:, self.cut]
        return {
            "feature": seen.features[:, None],
            "layers": seen.layers[:, None],
            "surprise": surprise[:, None],
        }

    def logs(self, seen: Looked) -> Float[Tensor, "image view"]:
        """Logarithms of the distances and of what was written."""
        tiny = torch.finfo(torch.float64).tiny
        points = self.points(seen)
        found = [self.distances[view](points[view], seen.classes)[:, 0] for view in DISTANCES]
        return torch.stack([*found, seen.written.double()], 1).clamp_min(tiny).log()

    def offsets(self, seen: Looked) -> Float[Tensor, "image d_embed"]:
        """Of each feature from the mean of its class, in standard deviations along every direction."""
        return self.distances["feature"].whitened(seen.features[:, None], seen.classes)[:, 0]
