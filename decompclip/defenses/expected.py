"""What clean images look like: in their feature, on the way to it, and in how much of it was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.defenses.class_distance import ClassDistance, ClassSums
from decompclip.defenses.term_views import Extrapolation, ridge

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

    def after(self, cut: int) -> Looked:
        """With the prefix up to this layer alone."""
        return replace(self, before=self.before[:, cut : cut + 1])

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
        return replace(Sums.of(clean.after(cut), n_classes).expected(), extrapolation=extrapolation, cut=cut)

    def points(self, seen: Looked) -> dict[Distance, Float[Tensor, "image 1 dim"]]:
        surprise = seen.features - self.extrapolation.of_layer(seen.before, self.cut)
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


@dataclass(frozen=True, eq=False)
class Sums:
    """Of some clean images, all that is expected of others; sums of several folds add, and one fold's are taken off again.

    Attributes:
        joint: of the prefix at the cut and the feature, side by side.
        layers: of `Looked.layers`.
    """

    joint: ClassSums
    layers: ClassSums

    @staticmethod
    def of(clean: Looked, n_classes: int, *, about: Sums | None = None) -> Sums:
        """Of images with one prefix (`Looked.after`). `about`: whose origin serves, so that the two add."""
        joint = torch.cat([clean.before[:, 0], clean.features], 1)[:, None]
        origins = (about.joint.origin, about.layers.origin) if about else (None, None)
        return Sums(
            *(
                ClassSums.of(points, clean.classes, n_classes, origin=origin)
                for points, origin in zip((joint, clean.layers[:, None]), origins, strict=True)
            )
        )

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.joint - other.joint, self.layers - other.layers)

    def expected(self) -> Expected:
        """For images with one prefix."""
        joint, width = self.joint, self.joint.origin.shape[1] // 2
        scatter, (mean_in, mean_out) = joint.scatter, joint.mean.split(width, 1)
        weights = ridge(scatter[:, :width, :width], scatter[:, :width, width:])
        one = torch.eye(width).to(weights)
        surprise = joint.mapped(torch.cat([-weights[0], one]), (mean_in @ weights[0] - mean_out)[0])
        distances: dict[Distance, ClassDistance] = {
            "feature": joint.mapped(torch.cat([torch.zeros_like(one), one])).distance(),
            "layers": self.layers.distance(),
            "surprise": surprise.distance(),
        }
        return Expected(distances, Extrapolation(mean_in, mean_out[0], weights), 0)
