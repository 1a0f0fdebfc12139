"""Whether an audit's numbers mean anything: do the names differ, does the classifier tell clean images apart, are suspect images new?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.collect import ImageSet, Split
from decompclip.intervals import Rate, difference_interval

ALIKE = 1e-5
"""Squared distance of unit texts below which two names are one to the model."""


@dataclass(frozen=True)
class Checks:
    """What the images and the names say before any effect is looked for.

    Attributes:
        favourite: the class that clean images are taken for most often, and how often.
        guessing: the accuracy that always giving one answer, or any, would reach; without labels one over the classes.
        coinciding: the names whose text features another name has too.
        copies: suspect images that are clean ones pixel by pixel, as the model takes them.
        distinct: of the clean and of the suspect images, those that differ from all before them.
        kept: suspect images that keep their answer: the right one where labels tell, that of the clean twin else; with the
            same share of the clean images (all of them, by their twin). None where neither is known.
    """

    favourite: tuple[str, Rate]
    guessing: float
    coinciding: tuple[str, ...]
    copies: Rate
    distinct: dict[str, Rate]
    kept: tuple[Rate, Rate] | None

    @property
    def disturbed(self) -> bool:
        """Whether suspect images lose their answers, beyond chance, by more than a tenth."""
        if self.kept is None:
            return False
        clean, suspect = self.kept
        return difference_interval(clean, suspect)[0] > 0.1


def checks(
    split: Split,
    answers: tuple[Int[Tensor, " clean"], Int[Tensor, " suspect"]],
    classifier: Float[Tensor, "class d_embed"],
    class_names: Sequence[str],
) -> Checks:
    """Look at what an audit's verdict stands on."""
    clean, suspect = answers
    counts = torch.bincount(clean, minlength=len(class_names))
    place = int(counts.argmax())
    known = {*split.clean.digests, *split.validation.digests}
    return Checks(
        favourite=(class_names[place], Rate(int(counts[place]), len(clean))),
        guessing=guessing(split.clean.labels, len(class_names)),
        coinciding=coinciding(classifier, class_names),
        copies=Rate(sum(digest in known for digest in split.suspect.digests), len(suspect)),
        distinct={"clean": _distinct(split.clean), "suspect": _distinct(split.suspect)},
        kept=_kept(split, clean, suspect),
    )


def guessing(labels: Int[Tensor, " image"] | None, n_classes: int) -> float:
    """The accuracy that always giving one answer, or any, would reach."""
    if labels is None or not len(labels):
        return 1 / n_classes
    return max(1 / n_classes, int(torch.bincount(labels).max()) / len(labels))


def coinciding(
    classifier: Float[Tensor, "class d_embed"], class_names: Sequence[str], block: int = 1_024
) -> tuple[str, ...]:
    """Names that are one text to the model with another: unknown words, or the same name again."""
    texts = F.normalize(classifier.double(), dim=-1)
    found = torch.zeros(len(texts), dtype=torch.bool)
    for start in range(0, len(texts), block):
        part = texts[start : start + block]
        near = 2 - 2 * part @ texts.T < ALIKE
        near[torch.arange(len(part)), torch.arange(start, start + len(part))] = False
        found[start : start + block] = near.any(1)
    return tuple(name for name, one in zip(class_names, found.tolist(), strict=True) if one)


def _distinct(images: ImageSet) -> Rate:
    return Rate(len(set(images.digests)), len(images))


def _kept(split: Split, clean: Tensor, suspect: Tensor) -> tuple[Rate, Rate] | None:
    own, other = split.clean.labels, split.suspect.labels
    if own is not None and other is not None:
        return Rate.of(clean == own), Rate.of(suspect == other)
    return (Rate(len(clean), len(clean)), Rate.of(suspect == clean)) if split.twins else None
