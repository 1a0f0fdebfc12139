"""What an audit found: frozen, labelled, ready for figures, for JSON and for words."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decompclip.audit.checks import Checks, Setting
from decompclip.audit.config import AuditConfig
from decompclip.audit.controls import Controls
from decompclip.audit.evidence import Evidence, Reference, Repair, Shift, Target
from decompclip.audit.infected import Infection
from decompclip.audit.shares import ClassShare
from decompclip.audit.verdict import Verdict, judged
from decompclip.data.files import SkippedFile, files_skipped
from decompclip.intervals import Rate
from decompclip.operators.sweep_results import Kind, Scheme

KINDS: tuple[Kind, ...] = ("heads", "mlps")
SCHEMES: tuple[Scheme, ...] = ("forward", "backward", "separate")


@dataclass(frozen=True)
class Ablations:
    """Mean-ablation (docs/method.md, section 2, direct effect): of all heads or MLPs at once, and layer by layer."""

    complete: dict[str, Setting]  # kind
    sweeps: dict[str, dict[str, tuple[Setting, ...]]]  # kind, scheme; one setting a layer


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
class Suspicion:
    """Detection without a hint about the attack (`AgnosticDet`), calibrated on clean images that are reported nowhere.

    Attributes:
        stated: share of clean images that the threshold was set to flag.
        threshold: the score above which an image is flagged; higher is more suspicious.
        false_positives, true_positives: clean and suspect images over it.
        edges: of the histogram's bins, alike for both sets; what lies beyond the last is in the last bin.
    """

    stated: float
    threshold: float
    auroc: float
    auroc_low: float
    auroc_high: float
    false_positives: Rate
    true_positives: Rate
    edges: Float[Tensor, " edge"]
    clean_counts: Int[Tensor, " bin"]
    suspect_counts: Int[Tensor, " bin"]


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
    infection: Infection
    repairs: tuple[Repair, ...]
    detectors: tuple[Detector, ...]
    suspicion: Suspicion | None
    checks: Checks
    controls: Controls | None  # where suspect images have more than a small effect, and are twins
    examples: Examples | None
    skipped: dict[str, tuple[SkippedFile, ...]]
    left_out: dict[str, str] = field(default_factory=dict)  # what could not be measured, and why
    reference: Reference | None = None  # where one was audited beside
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        known = {part.name: getattr(self, part.name) for part in fields(Evidence)}
        object.__setattr__(self, "verdict", judged(Evidence(**known)))

    @property
    def n_layers(self) -> int:
        return self.shift.heads_push.shape[0]

    @property
    def n_heads(self) -> int:
        return self.shift.heads_push.shape[1]

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.in_short)}</p>{self.verdict._repr_html_()}"

    @property
    def in_short(self) -> str:
        """What was looked at, in a line."""
        skipped = sum(map(len, self.skipped.values()))
        counts = f"{self.counts['clean']} clean and {self.counts['suspect']} suspect images"
        return f"{self.name}: {counts}{f'; {files_skipped(skipped)}, see the report' if skipped else ''}"

    def beside(self, reference: AuditResult) -> AuditResult:
        """This audit, with a clean model's on the same images as its reference.

        Raises:
            ValueError: the reference was audited on other images, or toward another class.
        """
        for what in ("clean_name", "suspect_name", "counts", "target"):
            own, other = getattr(self, what), getattr(reference, what)
            if what == "target":
                own, other = own.index, other.index
            if own != other:
                raise ValueError(
                    f"expected a reference audited on the same images and target; its {what.replace('_', ' ')} is {other}, "
                    f"here {own}; audit both with the same options"
                )
        return replace(
            self, reference=Reference(reference.name, reference.as_it_is, reference.class_shares[0])
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number; of the pictures only their captions and the maps over them."""
        return {part.name: jsonable(getattr(self, part.name)) for part in fields(self)}


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
        return {part.name: jsonable(getattr(value, part.name)) for part in fields(value)}
    return value if isinstance(value, int | bool | str | None) else str(value)
