"""What a verdict stands on: the class that suspect images go to, by how much, and what else could explain it."""

from __future__ import annotations

from dataclasses import dataclass

from decompclip.audit.checks import Checks
from decompclip.audit.controls import Controls
from decompclip.audit.scoring import Change, Setting
from decompclip.audit.shares import ClassShare


@dataclass(frozen=True)
class Target:
    """The class that the audit takes for the attacker's, and how it came to that."""

    index: int
    name: str
    inferred: bool
    over_prediction: tuple[float, float, float] | None  # value, low, high on the images it was inferred from
    images: int  # suspect images it was inferred from
    asked: str | None = None  # the class that was asked for, where suspect images go to this one instead


@dataclass(frozen=True)
class Reference:
    """A clean model on the same images.

    Attributes:
        setting: toward the audited model's target.
        most: the class, whichever it is, that it takes suspect images for more often than clean ones by the most.
    """

    name: str
    setting: Setting
    most: ClassShare


@dataclass(frozen=True)
class Repair:
    """One way of repairing, scored on the same images.

    Attributes:
        setting: the model repaired so.
        change: what that does image by image, beside the model as it is.
        flagged_clean, flagged_suspect: heads of the last layer replaced in a mean image; None where a repair does
            not choose heads.
    """

    setting: Setting
    change: Change
    flagged_clean: float | None = None
    flagged_suspect: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What a verdict stands on."""

    name: str
    class_names: tuple[str, ...]
    counts: dict[str, int]
    target: Target
    twins: bool
    as_it_is: Setting
    class_shares: tuple[ClassShare, ...]  # the over-predicted first
    checks: Checks
    controls: Controls | None = None
    reference: Reference | None = None
    repairs: tuple[Repair, ...] = ()
