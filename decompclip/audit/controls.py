"""What common corruptions do to the model where they change the images as much as the suspect ones were changed.

A trigger adds something that the model was taught. A corruption takes the image away, and a model that no longer sees it answers one
class too. What tells them apart without a second model is the size: no common corruption of the same size does what a trigger does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.checks import ClassShare, class_shares, most_over_predicted
from decompclip.audit.collect import Split
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
) -> Controls | None:
    """Corrupt the clean halves of kept pairs; None of images that are not paired, or too few."""
    pairs = [
        (split.clean.kept[own], split.suspect.kept[other])
        for own, other in zip(split.clean.paths, split.suspect.paths, strict=False)
        if own in split.clean.kept and other in split.suspect.kept
    ]
    if not split.paired or len(pairs) < LEAST:
        return None
    clean, suspect = (model.denormalize(torch.stack(side).cpu()) for side in zip(*pairs, strict=True))
    size = _size(suspect, clean)

    @torch.no_grad()
    def answers(pixels: Float[Tensor, "image 3 h w"]) -> Int[Tensor, " image"]:
        images = (model.normalize(part.to(model.device)) for part in pixels.split(batch_size))
        features = torch.cat([model.encode_image(part).float().cpu() for part in images])
        return predict(F.normalize(features, dim=-1), classifier)

    before = answers(clean)
    found = []
    for kind in KINDS:
        after = answers(of_size(kind, clean, size, seed=seed))
        found.append(SameSize(kind.name, most_over_predicted(class_shares(before, after, class_names))))
    own = ClassShare(class_names[target], Rate.of(before == target), Rate.of(answers(suspect) == target))
    return Controls(float(size.median()), own, tuple(sorted(found, key=lambda one: -one.to.difference)))


def of_size(
    kind: Corruption, pixels: Float[Tensor, "image 3 h w"], size: Float[Tensor, " image"], *, seed: int
) -> Float[Tensor, "image 3 h w"]:
    """Each image with the least severity that changes it by at least `size`, then taken back to just that; else the greatest."""
    made = pixels.clone()
    missing = torch.ones(len(pixels), dtype=torch.bool)
    for severity in SEVERITIES:
        if not missing.any():
            break
        changed = kind(pixels[missing], severity, seed=seed)
        reached = _size(changed, pixels[missing])
        part = (size[missing] / reached.clamp_min(1e-9)).clamp(max=1)[:, None, None, None]
        made[missing] = pixels[missing] + part * (changed - pixels[missing])
        missing[missing.clone()] = reached < size[missing]
    return made


def _size(changed: Tensor, pixels: Tensor) -> Float[Tensor, " image"]:
    return (changed - pixels).square().mean((1, 2, 3)).sqrt()
