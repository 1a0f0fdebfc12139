"""One way of running the model, scored on the audit's clean and suspect images; and what it changes image by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from decompclip.evaluation.metrics import AttackReport, attack_report
from decompclip.intervals import Paired, Rate, difference_interval

Answers = tuple[Int[Tensor, " clean"], Int[Tensor, " suspect"]]
"""Predicted classes of the clean and of the suspect images."""


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

    def change(self, before: Answers, after: Answers) -> Change:
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
