"""What common corruptions do to the model where they change the images as much as the suspect ones were changed.

A trigger adds something that the model was taught. A corruption takes the image away, and a model that no longer sees it answers one
class too. What tells them apart without a second model is the size: no common corruption of the same size does what a trigger does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.checks import EXPLAINED, ClassShare
from decompclip.audit.collect import Split
from decompclip.defenses.detectors.corruptions import (
    COMMON,
    EDITS,
    EVERYDAY,
    PATTERNS,
    SEVERITIES,
    Corruption,
)
from decompclip.evaluation.evaluate import classify
from decompclip.evaluation.metrics import predict
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP

KINDS = (*COMMON, *EVERYDAY, *EDITS, *PATTERNS)
"""What is tried."""

LEAST = 40
"""Pairs of kept pictures without which corruptions are not tried."""

STAGES = (12, 24, 48)
"""Pictures after which corruptions are left that cannot explain the effect any more; the others go on to all pictures."""

LEADING = 5
"""Corruptions that go on in any case, the strongest so far."""

BEYOND = 0.001
"""Chance of leaving one that would explain it, at a stage."""


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
        corruptions: the strongest first of those tried on all of these images, one at least; then those that were left
            after fewer.
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
        return _explains(self.strongest, self.suspect.difference)


def _explains(tried: SameSize, effect: float) -> float:
    return tried.to.difference / max(effect, 1e-9)


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
    names = zip(split.clean.paths, split.suspect.paths, strict=False)
    kept = split.clean.kept, split.suspect.kept
    rows = [row for row, (own, other) in enumerate(names) if own in kept[0] and other in kept[1]]
    if not split.paired or len(rows) < LEAST:
        return None
    sets = split.clean, split.suspect
    clean, suspect = (
        model.denormalize(torch.stack([part.kept[part.paths[row]] for row in rows]).cpu()) for part in sets
    )
    size = _size(suspect, clean)
    before, after = (classify(None, part.decomposition[rows], classifier) for part in sets)
    own = ClassShare(class_names[target], Rate.of(before == target), Rate.of(after == target))
    # drawn, for folders hold one class after the other
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def answers(kind: Corruption, rows: Int[Tensor, " image"]) -> Int[Tensor, " image"]:
        pixels = of_size(kind, clean[rows], size[rows], seed=seed)
        images = (model.normalize(part.to(model.device)) for part in pixels.split(batch_size))
        features = torch.cat([model.encode_image(part).float().cpu() for part in images])
        return predict(F.normalize(features, dim=-1), classifier)

    found = race(answers, KINDS, before[order], order, class_names, effect=own.difference)
    return Controls(float(size.median()), own, found)


def race(
    answers: Callable[[Corruption, Int[Tensor, " image"]], Int[Tensor, " image"]],
    kinds: Sequence[Corruption],
    before: Int[Tensor, " image"],
    order: Int[Tensor, " image"],
    class_names: Sequence[str],
    *,
    effect: float,
) -> tuple[SameSize, ...]:
    """What each corruption does, on as many images as it takes to know whether one explains the effect.

    One that does is enough: it is tried on all images, and then no other.

    Args:
        answers: the classes of the images in some places, corrupted.
        kinds: the corruptions.
        before: the classes of the images as they are, in this order.
        order: their places.
        class_names: of the classes.
        effect: of the suspect change, as a share of the images.
    """
    after = {kind.name: before[:0] for kind in kinds}

    def tried(kind: Corruption, images: int) -> SameSize:
        seen = after[kind.name]
        if len(seen) < images:
            seen = after[kind.name] = torch.cat([seen, answers(kind, order[len(seen) : images])])
        was, n = before[: len(seen)], len(class_names)
        to = int((torch.bincount(seen, minlength=n) - torch.bincount(was, minlength=n)).argmax())
        return SameSize(kind.name, ClassShare(class_names[to], Rate.of(was == to), Rate.of(seen == to)))

    def may(one: SameSize) -> bool:
        """Whether on all images it may explain the effect, by how many of those seen it sends to one class."""
        seen = after[one.corruption]
        new = int(torch.bincount(seen[seen != before[: len(seen)]], minlength=1).max())
        most = float(beta.ppf(1 - BEYOND, new + 1, len(seen) - new)) if new < len(seen) else 1.0
        return most >= EXPLAINED * effect

    def enough(one: SameSize) -> bool:
        return one.to.clean.total == len(order) and _explains(one, effect) >= EXPLAINED

    running, found = {kind.name: kind for kind in kinds}, {}
    for images in (*(stage for stage in STAGES if stage < len(order)), len(order)):
        for name, kind in running.items():
            found[name] = tried(kind, images)
            if enough(found[name]):
                return _strongest_first(found.values())
        leading = sorted(running, key=lambda name: -found[name].to.difference)
        if _explains(found[leading[0]], effect) >= EXPLAINED:
            found[leading[0]] = tried(running[leading[0]], len(order))
            if enough(found[leading[0]]):
                return _strongest_first(found.values())
        running = {
            name: running[name] for place, name in enumerate(leading) if place < LEADING or may(found[name])
        }
    return _strongest_first(found.values())


def _strongest_first(tried: Iterable[SameSize]) -> tuple[SameSize, ...]:
    """Of those that were tried on most images; then the others, likewise."""
    return tuple(sorted(tried, key=lambda one: (-one.to.clean.total, -one.to.difference)))


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
