"""What common corruptions do to the model where they change the images as much as the suspect ones were changed.

A trigger adds something that the model was taught; a corruption takes the image away, and a model that no longer sees it answers a
class of its own. Both collapse answers. What tells them apart without a second model is the size: what a trigger does, no common
corruption of the same size does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.collect import Split
from decompclip.audit.shares import ClassShare, class_shares, most_over_predicted
from decompclip.defenses.detectors.corruptions import (
    COMMON,
    EDITS,
    EVERYDAY,
    PATTERNS,
    SEVERITIES,
    Corruption,
)
from decompclip.evaluation.metrics import predict
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP

KINDS = (*COMMON, *EVERYDAY, *EDITS, *PATTERNS)
"""What is tried."""

LEAST = 40
"""Pairs of kept pictures without which corruptions are not tried."""


@dataclass(frozen=True)
class SameSize:
    """One corruption, and the class that it makes the model answer more often than before by the most."""

    corruption: str
    to: ClassShare


@dataclass(frozen=True)
class Controls:
    """The suspect images' change beside common corruptions of the same size, on the same clean images.

    Attributes:
        size: median over images of the change's root mean square, in the images' range of 0 to 1.
        suspect: share of the images taken for the target before and after the suspect change.
        corruptions: the strongest first.
    """

    size: float
    suspect: ClassShare
    corruptions: tuple[SameSize, ...]

    @property
    def strongest(self) -> SameSize:
        return self.corruptions[0]

    @property
    def explained(self) -> float:
        """How much of the suspect change's effect the strongest corruption has, whatever the class."""
        return self.strongest.to.difference / max(self.suspect.difference, 1e-9)


def controls(
    model: HookedCLIP,
    split: Split,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    target: int,
    *,
    batch_size: int,
    seed: int,
    kinds: tuple[Corruption, ...] = KINDS,
) -> Controls | None:
    """Corrupt the clean halves of kept twins; None without twins, or of too few."""
    pairs = [
        (split.clean.kept[own], split.suspect.kept[other])
        for own, other in zip(split.clean.paths, split.suspect.paths, strict=False)
        if own in split.clean.kept and other in split.suspect.kept
    ]
    if not split.twins or len(pairs) < LEAST:
        return None
    clean, suspect = (model_pixels(model, torch.stack(side)) for side in zip(*pairs, strict=True))
    size = _size(suspect, clean)

    @torch.no_grad()
    def answers(pixels: Float[Tensor, "image 3 h w"]) -> Int[Tensor, " image"]:
        found = [
            predict(
                F.normalize(model.encode_image(model.normalize(part.to(model.device))).float(), dim=-1).cpu(),
                classifier,
            )
            for part in pixels.split(batch_size)
        ]
        return torch.cat(found)

    before = answers(clean)
    found = [
        SameSize(
            kind.name,
            most_over_predicted(
                class_shares(before, answers(of_size(kind, clean, size, seed=seed)), class_names)
            ),
        )
        for kind in kinds
    ]
    own = ClassShare(class_names[target], Rate.of(before == target), Rate.of(answers(suspect) == target))
    return Controls(float(size.median()), own, tuple(sorted(found, key=lambda one: -one.to.difference)))


def of_size(
    kind: Corruption, images: Float[Tensor, "image 3 h w"], size: Float[Tensor, " image"], *, seed: int
) -> Float[Tensor, "image 3 h w"]:
    """Each image with the least severity that changes it by at least `size`, then taken back to just that; else the greatest."""
    made = images.clone()
    missing = torch.ones(len(images), dtype=torch.bool)
    for severity in SEVERITIES:
        if not missing.any():
            break
        changed = kind(images[missing], severity, seed=seed)
        reached = _size(changed, images[missing])
        part = (size[missing] / reached.clamp_min(1e-9)).clamp(max=1)[:, None, None, None]
        made[missing] = images[missing] + part * (changed - images[missing])
        missing[missing.clone()] = reached < size[missing]
    return made


def model_pixels(model: HookedCLIP, images: Float[Tensor, "image 3 h w"]) -> Float[Tensor, "image 3 h w"]:
    """Images as the model takes them, in 0 to 1 again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    return (images.float().cpu() * std + mean).clamp(0, 1)


def _size(changed: Tensor, images: Tensor) -> Float[Tensor, " image"]:
    return (changed - images).square().mean((1, 2, 3)).sqrt()
