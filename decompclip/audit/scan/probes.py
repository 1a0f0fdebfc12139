"""Small changes of an image that a trigger may be like: a faint pattern everywhere, a patch in any or in one place.

One change a class is searched for; it is the same for all images ("universal"), so that what helps is not in the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class Probe(ABC):
    """A family of changes."""

    name: str

    @abstractmethod
    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n 3 a b"]:
        """`n` changes from which the search sets out, for images of this size."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """Step of the search."""

    @abstractmethod
    def bounded(self, change: Float[Tensor, "n 3 a b"]) -> Float[Tensor, "n 3 a b"]:
        """The nearest change that the family allows."""

    @abstractmethod
    def apply(
        self, images: Float[Tensor, "batch 3 h w"], change: Float[Tensor, "3 a b"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 h w"]:
        """Images in [0, 1] with one change, differentiable in it; `generator` draws places."""


@dataclass(frozen=True)
class Everywhere(Probe):
    """A pattern added to the whole image, by at most `bound` a pixel: like Blended, SIG, ISSBA."""

    bound: float
    name: str = "everywhere"

    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n 3 h w"]:
        return torch.zeros(n, *image.shape, device=image.device)

    @property
    def rate(self) -> float:
        return self.bound / 4

    def bounded(self, change: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        return change.clamp(-self.bound, self.bound)

    def apply(
        self, images: Float[Tensor, "batch 3 h w"], change: Float[Tensor, "3 h w"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 h w"]:
        del generator
        return (images + change).clamp(0, 1)


@dataclass(frozen=True)
class Patch(Probe):
    """A square pasted into the image, anywhere or in its centre: like BadNet, Kitty, BadCLIP.

    Attributes:
        side: as a share of the image's shorter side.
        anywhere: a place of its own for each image; else the centre.
    """

    side: float
    anywhere: bool

    @property
    def name(self) -> str:
        return f"patch {'anywhere' if self.anywhere else 'in the centre'}"

    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n 3 s s"]:
        side = max(1, round(self.side * min(image.shape[-2:])))
        return torch.full((n, 3, side, side), 0.5, device=image.device)

    @property
    def rate(self) -> float:
        return 0.09

    def bounded(self, change: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        return change.clamp(0, 1)

    def apply(
        self, images: Float[Tensor, "batch 3 h w"], change: Float[Tensor, "3 s s"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 h w"]:
        free = [whole - change.shape[-1] for whole in images.shape[-2:]]
        if self.anywhere:
            corners = [
                torch.randint(0, room + 1, (len(images),), generator=generator).tolist() for room in free
            ]
        else:
            corners = [[room // 2] * len(images) for room in free]
        height, width, side = *images.shape[-2:], change.shape[-1]
        frames = [
            (left, width - left - side, top, height - top - side) for top, left in zip(*corners, strict=True)
        ]
        pasted = torch.stack([F.pad(change, frame) for frame in frames])
        covered = torch.stack([F.pad(torch.ones_like(change[:1]), frame) for frame in frames])
        return torch.where(covered.bool(), pasted, images)


def probes(bound: float, patch: float) -> tuple[Probe, ...]:
    """The three families that a scan tries."""
    return Everywhere(bound), Patch(patch, anywhere=True), Patch(patch, anywhere=False)
