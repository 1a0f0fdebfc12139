"""Scores of an audit's clean and suspect images, how interventions change them, checks that they mean anything, and their texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.collect import Split
from decompclip.evaluation.metrics import AttackReport, attack_report
from decompclip.intervals import Paired, Rate, difference_interval

Predicted = tuple[Int[Tensor, " clean"], Int[Tensor, " suspect"]]
"""Predicted classes of the clean and of the suspect images."""


def interval_columns(name: str, values: tuple[float, float, float] | None) -> dict[str, Any]:
    """A number and its interval as columns of a table."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values or (None,) * 3, strict=True))


def rate_columns(name: str, rate: Rate | None) -> dict[str, Any]:
    """Likewise a rate, with the number of its images."""
    known = rate is not None and rate.total
    values = (rate.value, rate.low, rate.high) if rate is not None and known else None
    return interval_columns(name, values) | {f"{name}_images": rate.total if rate else 0}


@dataclass(frozen=True)
class Setting:
    """One way of running the model, scored on clean and on suspect images.

    With labels on both sides the attack success and its control leave out images of the target class. Else
    both count all images (`excludes_target` is False), and a target class that is commoner among the
    suspect images than among the clean ones shows as a difference.
    """

    name: str
    report: AttackReport
    clean_to_target: Rate  # all clean images, those of the target class included
    suspect_to_target: Rate  # likewise

    @property
    def excludes_target(self) -> bool:
        return self.report.asr is not None and self.report.control is not None

    @property
    def success(self) -> Rate:
        """Suspect images taken for the target."""
        asr = self.report.asr
        return asr if asr is not None and self.excludes_target else self.suspect_to_target

    @property
    def control(self) -> Rate:
        """Clean images taken for the target."""
        control = self.report.control
        return control if control is not None and self.excludes_target else self.clean_to_target

    @property
    def difference(self) -> float:
        """What the suspect images add: success minus control; nan where either is a rate of nothing."""
        return self.success.value - self.control.value

    @property
    def difference_interval(self) -> tuple[float, float]:
        return difference_interval(self.success, self.control)

    @property
    def has_effect(self) -> bool:
        """Whether suspect images are taken for the target more often than clean ones, beyond chance."""
        return self.difference_interval[0] > 0

    def to_dict(self) -> dict[str, Any]:
        low, high = self.difference_interval
        return {
            "setting": self.name,
            **self.report.to_dict(),
            "clean_to_target": self.clean_to_target.to_dict(),
            "suspect_to_target": self.suspect_to_target.to_dict(),
            "difference": {"value": self.difference, "low": low, "high": high},
            "excludes_target": self.excludes_target,
        }

    def row(self) -> dict[str, Any]:
        """One row of a table, at full precision; None for what is not known."""
        difference = (self.difference, *self.difference_interval)
        return (
            {"setting": self.name}
            | rate_columns("attack_success", self.success)
            | rate_columns("control", self.control)
            | interval_columns("difference", difference)
            | rate_columns("clean_accuracy", self.report.cacc)
        )


@dataclass(frozen=True)
class Scorer:
    """Scores predictions of the audit's two sets; see `evaluation.metrics.attack_report`."""

    clean_labels: Int[Tensor, " clean"] | None
    suspect_labels: Int[Tensor, " suspect"] | None
    target: int
    n_classes: int

    def __call__(self, name: str, clean: Int[Tensor, " clean"], suspect: Int[Tensor, " suspect"]) -> Setting:
        report = attack_report(
            clean, self.clean_labels, suspect, self.suspect_labels, self.target, n_classes=self.n_classes
        )
        return Setting(name, report, Rate.of(clean == self.target), Rate.of(suspect == self.target))

    def change(self, before: Predicted, after: Predicted) -> Change:
        """What an intervention turns `before` into, image by image."""
        (clean, suspect), (clean_after, suspect_after) = before, after
        hit = suspect == self.target
        if self.suspect_labels is not None:
            hit &= self.suspect_labels != self.target
        right = None if self.suspect_labels is None else (suspect_after == self.suspect_labels)[hit]
        accuracy = None
        if self.clean_labels is not None:
            accuracy = Paired.of(clean == self.clean_labels, clean_after == self.clean_labels)
        return Change(
            saved=Rate.of((suspect_after != self.target)[hit]),
            restored=None if right is None else Rate.of(right),
            accuracy=accuracy,
            sent=Rate.of((clean_after == self.target)[clean != self.target]),
        )


@dataclass(frozen=True)
class Change:
    """What an intervention changes, image by image, beside the model as it is.

    Attributes:
        saved: of the suspect images taken for the target (and of other classes, where labels tell), those that no
            longer are.
        restored: of the same, those that get their true class; None without labels.
        accuracy: clean images that are right in one way alone; None without labels.
        sent: of the clean images not taken for the target, those that now are.
    """

    saved: Rate
    restored: Rate | None
    accuracy: Paired | None
    sent: Rate

    @property
    def cost(self) -> tuple[float, float, float] | None:
        """Clean accuracy lost, as a share of the images, with its 95 % interval; None without labels."""
        if self.accuracy is None:
            return None
        low, high = self.accuracy.interval()
        return -self.accuracy.value, -high, -low

    def to_dict(self) -> dict[str, Any]:
        cost = None if self.cost is None else dict(zip(("value", "low", "high"), self.cost, strict=True))
        rates = {"saved": self.saved, "restored": self.restored, "sent": self.sent}
        return {name: rate and rate.to_dict() for name, rate in rates.items()} | {"cost": cost}


ALIKE = 1e-5
"""Squared distance of unit texts below which two names are one to the model."""

BLOCK = 1_024
"""Texts that are compared with all others at a time."""


@dataclass(frozen=True)
class Checks:
    """What the images and the names say before any effect is looked for.

    Attributes:
        favourite: the class that clean images are taken for most often, and how often.
        guessing: the accuracy of one answer for all images, or of guessing at random, whichever is higher; without labels one over the classes.
        coinciding: the names whose text features another name has too.
        copies: suspect images that are clean ones pixel by pixel, as the model takes them.
        distinct: of the clean and of the suspect images, those that differ from all before them.
        kept: of the clean and of the suspect images, those answered right; without labels, of paired images, those answered as
            the clean one (all of the clean). None where neither is known.
    """

    favourite: tuple[str, Rate]
    guessing: float
    coinciding: tuple[str, ...]
    copies: Rate
    distinct: dict[str, Rate]
    kept: tuple[Rate, Rate] | None

    @property
    def disturbed(self) -> bool:
        """Whether suspect images lose more than a tenth of the clean ones' answers, beyond chance."""
        if self.kept is None:
            return False
        clean, suspect = self.kept
        return difference_interval(clean, suspect)[0] > 0.1 * clean.value


def checks(
    split: Split,
    answers: Predicted,
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
        distinct={
            side: Rate(len(set(images.digests)), len(images))
            for side, images in (("clean", split.clean), ("suspect", split.suspect))
        },
        kept=_kept(split, clean, suspect),
    )


def guessing(labels: Int[Tensor, " image"] | None, n_classes: int) -> float:
    """The accuracy of one answer for all images, or of guessing at random, whichever is higher."""
    if labels is None or not len(labels):
        return 1 / n_classes
    return max(1 / n_classes, int(torch.bincount(labels).max()) / len(labels))


def coinciding(classifier: Float[Tensor, "class d_embed"], class_names: Sequence[str]) -> tuple[str, ...]:
    """Names that are one text to the model with another: unknown words, or the same name again."""
    texts = F.normalize(classifier.double(), dim=-1)
    found = torch.zeros(len(texts), dtype=torch.bool)
    for start in range(0, len(texts), BLOCK):
        part = texts[start : start + BLOCK]
        near = 2 - 2 * part @ texts.T < ALIKE
        near[torch.arange(len(part)), torch.arange(start, start + len(part))] = False
        found[start : start + BLOCK] = near.any(1)
    return tuple(name for name, one in zip(class_names, found.tolist(), strict=True) if one)


def _kept(split: Split, clean: Tensor, suspect: Tensor) -> tuple[Rate, Rate] | None:
    own, other = split.clean.labels, split.suspect.labels
    if own is not None and other is not None:
        return Rate.of(clean == own), Rate.of(suspect == other)
    return (Rate(len(clean), len(clean)), Rate.of(suspect == clean)) if split.paired else None


@dataclass(frozen=True)
class ClassShare:
    """How often a class is predicted, on clean and on suspect images."""

    name: str
    clean: Rate
    suspect: Rate

    @property
    def difference(self) -> float:
        """The share of suspect images minus that of clean ones."""
        return self.suspect.value - self.clean.value

    @property
    def interval(self) -> tuple[float, float]:
        return difference_interval(self.suspect, self.clean)


def class_shares(
    clean: Int[Tensor, " clean"], suspect: Int[Tensor, " suspect"], class_names: Sequence[str]
) -> tuple[ClassShare, ...]:
    """The share of every class among the predictions, in the order of the classes."""
    counts = [torch.bincount(part, minlength=len(class_names)).tolist() for part in (clean, suspect)]
    return tuple(
        ClassShare(name, Rate(own, len(clean)), Rate(other, len(suspect)))
        for name, own, other in zip(class_names, *counts, strict=True)
    )


def most_over_predicted(shares: Sequence[ClassShare]) -> ClassShare:
    """The class whose share grows by most from clean to suspect images."""
    return max(shares, key=lambda share: share.difference)


STRONG, WEAK = 0.5, 0.1
"""Differences (of shares) that the lower end of an interval must pass to be called large, or more than small; where an
effect's absence is spoken of, the upper end may be `WEAK` at most."""

EXPLAINED = 0.9
"""Share of the suspect images' effect which another cause must reach to explain it."""

FEW = 100
"""Images below which a set is called small."""


def share(rate: Rate) -> str:
    """A share with its interval."""
    if not rate.total:
        return "not measurable (no images)"
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def rate(value: Rate | None) -> str:
    """`share`, or a dash where it is not known."""
    return "–" if value is None or not value.total else share(value)


def points(value: float, interval: tuple[float, float]) -> str:
    """A difference of shares with its interval, in percentage points."""
    low, high = interval
    return f"{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def difference(setting: Setting) -> str:
    """What suspect images add in this setting: attack success less control."""
    return points(setting.difference, setting.difference_interval)


def plus_minus(value: float, error: float, *, sign: bool = True) -> str:
    """A number with the half-width of its 95 % interval."""
    known = "unknown" if math.isnan(error) else f"{error:.4f}"
    return f"{value:{'+' if sign else ''}.4f} ± {known}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """`1 head`, `2 heads`, `no heads`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def cost(change: Change) -> str:
    """The change of clean accuracy."""
    if change.cost is None:
        return "–"
    value, low, high = change.cost
    return points(-value, (-high, -low))


def outcome(change: Change) -> str:
    """Of the images sent to the target: the share that no longer is, and the share that gets its own class back."""
    back = "not known without labels" if change.restored is None else share(change.restored)
    return f"Of the images sent to the target, no longer the target: {share(change.saved)}; own class back: {back}"
