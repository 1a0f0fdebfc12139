"""What an audit found: frozen, labelled, ready for figures, for JSON and for words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decompclip.audit.config import AuditConfig
from decompclip.data.images import SkippedFile
from decompclip.evaluation.intervals import Rate, difference_interval
from decompclip.evaluation.metrics import AttackReport, attack_report
from decompclip.operators.sweep_results import Kind, Scheme

KINDS: tuple[Kind, ...] = ("heads", "mlps")
SCHEMES: tuple[Scheme, ...] = ("forward", "backward", "separate")


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


@dataclass(frozen=True)
class Target:
    """The class that the audit takes for the attacker's, and how it came to that."""

    index: int
    name: str
    inferred: bool
    over_prediction: tuple[float, float, float] | None  # value, low, high on the images it was inferred from
    images: int  # suspect images it was inferred from


@dataclass(frozen=True)
class ClassShare:
    """How often a class is predicted, on clean and on suspect images."""

    name: str
    clean: Rate
    suspect: Rate


@dataclass(frozen=True)
class Ablations:
    """Mean-ablation (METHOD 2, direct effect): of all heads or MLPs at once, and layer by layer."""

    complete: dict[str, Setting]  # kind
    sweeps: dict[str, dict[str, tuple[Setting, ...]]]  # kind, scheme; one setting a layer


@dataclass(frozen=True)
class Shift:
    """Difference of a component's mean between suspect and clean images, in units of the feature's norm.

    Attributes:
        *_distance: norm of the difference of the mean terms.
        *_floor: norm to expect from sampling alone, were the means equal.
        *_push: its part along (target text - mean of the other classes' texts), where positive pulls
            suspect images toward the target; *_push_error: half-width of its 95 % interval.
        paired: whether differences were taken between twins.
    """

    heads_distance: Float[Tensor, "layer head"]
    heads_floor: Float[Tensor, "layer head"]
    heads_push: Float[Tensor, "layer head"]
    heads_push_error: Float[Tensor, "layer head"]
    mlps_distance: Float[Tensor, " layer"]
    mlps_floor: Float[Tensor, " layer"]
    mlps_push: Float[Tensor, " layer"]
    mlps_push_error: Float[Tensor, " layer"]
    totals: dict[str, tuple[float, float]]  # "all", "heads", "mlps", "rest": push and half-width
    paired: bool


@dataclass(frozen=True)
class Repair:
    """Decomp-Rep under one rule, and how many heads of the last layer it flags on average."""

    similarity: str
    threshold: str
    setting: Setting
    flagged_clean: float
    flagged_suspect: float


@dataclass(frozen=True)
class Detector:
    """Decomp-Det under one rule: flagged heads per image, higher = more suspicious."""

    similarity: str
    threshold: str
    zeta: int
    auroc: float
    auroc_low: float
    auroc_high: float
    false_positives: Rate  # clean images over its own threshold
    true_positives: Rate  # suspect images over it
    clean_counts: Int[Tensor, " count"]  # images with 0, 1, ... flagged heads
    suspect_counts: Int[Tensor, " count"]


@dataclass(frozen=True)
class HeadMaps:
    """What one head's pooled row attends to, and what each patch contributes toward the target."""

    layer: int
    head: int
    affected: str  # "most" or "least"
    attention: Float[Tensor, "image rows columns"]
    class_token: Float[Tensor, " image"]  # attention on the class token itself
    contribution: Float[Tensor, "image rows columns"]


@dataclass(frozen=True)
class Examples:
    """Pictures, what the model takes them for, and maps of a few heads over them."""

    pictures: UInt8[Tensor, "image h w 3"]
    captions: tuple[str, ...]
    sides: tuple[str, ...]  # "suspect" or "clean"
    heads: tuple[HeadMaps, ...]


@dataclass(frozen=True)
class AuditResult:
    """Every number of an audit, and where it came from."""

    name: str
    provenance: Mapping[str, Any]
    config: AuditConfig
    clean_name: str
    suspect_name: str
    counts: dict[str, int]
    class_names: tuple[str, ...]
    target: Target
    twins: bool
    as_it_is: Setting
    class_shares: tuple[ClassShare, ...]
    ablations: Ablations
    shift: Shift
    repairs: tuple[Repair, ...]
    detectors: tuple[Detector, ...]
    examples: Examples | None
    skipped: dict[str, tuple[SkippedFile, ...]]

    @property
    def n_layers(self) -> int:
        return self.shift.heads_push.shape[0]

    @property
    def n_heads(self) -> int:
        return self.shift.heads_push.shape[1]

    @property
    def chance(self) -> float:
        return 1 / len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number; of the pictures only their captions and the maps over them."""
        return {field.name: jsonable(getattr(self, field.name)) for field in fields(self)}


def jsonable(value: Any) -> Any:
    """Plain lists, dictionaries and numbers; None for what is no number. Pictures are left out."""
    if isinstance(value, Tensor):
        return None if value.dtype == torch.uint8 else jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    if (to_dict := getattr(value, "to_dict", None)) is not None:
        return jsonable(to_dict())
    if is_dataclass(value):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    return value if isinstance(value, int | bool | str | None) else str(value)
