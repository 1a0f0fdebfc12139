"""What an audit found: frozen, labelled, ready for figures, for JSON and for words."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decompclip.audit.checks import Setting
from decompclip.audit.components import Infection, Shift, WeightsAlone
from decompclip.audit.config import AuditConfig
from decompclip.audit.verdict import Evidence, Reference
from decompclip.data.files import SkippedFile, files_skipped
from decompclip.intervals import Rate
from decompclip.operators.sweep_results import Kind, Scheme

if TYPE_CHECKING:
    import pandas as pd

KINDS: tuple[Kind, ...] = ("heads", "mlps")
SCHEMES: tuple[Scheme, ...] = ("forward", "backward", "separate")


@dataclass(frozen=True)
class Ablations:
    """Mean-ablation (docs/method.md, section 2, direct effect): of all heads or MLPs at once, and layer by layer."""

    complete: dict[str, Setting]  # kind
    sweeps: dict[str, dict[str, tuple[Setting, ...]]]  # kind, scheme; one setting a layer


@dataclass(frozen=True)
class Detection:
    """What Decomp-Det finds under one rule; its score is the number of flagged heads.

    Attributes:
        similarity, threshold: the rule.
        zeta: more flagged heads than this make an image suspicious.
        auroc, auroc_low, auroc_high: of suspect against clean images, with its 95 % interval.
        false_positives, true_positives: clean and suspect images over zeta.
        clean_counts, suspect_counts: images with 0, 1, ... flagged heads.
    """

    similarity: str
    threshold: str
    zeta: int
    auroc: float
    auroc_low: float
    auroc_high: float
    false_positives: Rate
    true_positives: Rate
    clean_counts: Int[Tensor, " count"]
    suspect_counts: Int[Tensor, " count"]


@dataclass(frozen=True)
class Suspicion:
    """What detection without a hint about the attack (`AgnosticDet`) finds; calibrated on clean images that are reported nowhere.

    Attributes:
        stated: share of clean images that the threshold was set to flag.
        threshold: the score above which an image is flagged; higher is more suspicious.
        auroc, auroc_low, auroc_high: as in `Detection`.
        false_positives, true_positives: clean and suspect images over the threshold.
        edges: of the histogram's bins, alike for both sets; what lies beyond the last is in the last bin.
        clean_counts, suspect_counts: images in each bin.
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


@dataclass(frozen=True, kw_only=True, repr=False)
class AuditResult(Evidence):
    """Every number of an audit, where it came from, and the verdict."""

    provenance: Mapping[str, Any]
    config: AuditConfig
    clean_name: str
    suspect_name: str
    ablations: Ablations
    shift: Shift
    infection: Infection
    detectors: tuple[Detection, ...]
    suspicion: Suspicion | None
    examples: Examples | None
    skipped: dict[str, tuple[SkippedFile, ...]]
    left_out: dict[str, str] = field(default_factory=dict)  # what could not be measured, and why
    weights: WeightsAlone | None = None  # beside the reference's; no verdict stands on it

    @property
    def n_layers(self) -> int:
        return self.shift.heads_distance.shape[0]

    @property
    def n_heads(self) -> int:
        return self.shift.heads_distance.shape[1]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The model as it is, without all heads, without all MLPs, and without the infected components."""
        without = (self.infection.without, self.infection.without_others)
        found = (self.as_it_is, *self.ablations.complete.values(), *without)
        return tuple(setting for setting in found if setting is not None)

    def to_frame(self) -> pd.DataFrame:
        """One row a setting or repair: attack success, its control, their difference, clean accuracy, with intervals."""
        import pandas as pd

        repairs = (repair.setting for repair in self.repairs)
        return pd.DataFrame([setting.row() for setting in (*self.settings, *repairs)])

    def __repr__(self) -> str:
        return f"AuditResult({self.in_short}; {self.verdict.level}, {self.verdict.confidence} confidence)"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.in_short)}</p>{self.verdict._repr_html_()}"

    @property
    def in_short(self) -> str:
        """What was looked at, in a line."""
        skipped = sum(map(len, self.skipped.values()))
        counts = f"{self.counts['clean']} clean and {self.counts['suspect']} suspect images"
        return f"{self.name}: {counts}{f'; {files_skipped(skipped)}, see the report' if skipped else ''}"

    def beside(self, reference: AuditResult, *, weights: WeightsAlone | None = None) -> AuditResult:
        """This audit, with a clean model's on the same images as its reference.

        Args:
            reference: the clean model's audit.
            weights: what `decompclip.audit.components.weights_alone` finds between the two models.

        Raises:
            ValueError: the reference was audited on other images, or toward another class.
        """
        for what in ("clean_name", "suspect_name", "counts", "target"):
            own, other = (getattr(result, what) for result in (self, reference))
            own, other = (own.index, other.index) if what == "target" else (own, other)
            if own != other:
                raise ValueError(
                    f"expected a reference audited on the same images and target; its {what.replace('_', ' ')} is {other}, "
                    f"here {own}; audit both with the same options"
                )
        most = reference.class_shares[0]
        beside = Reference(reference.name, reference.as_it_is, most)
        return replace(self, reference=beside, weights=weights)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number; of the pictures only their captions and the maps over them."""
        return plain(self)


def plain(result: Any) -> dict[str, Any]:
    """A dataclass for JSON, by the names that its fields have in files."""
    return {
        part.metadata.get("key", part.name): jsonable(getattr(result, part.name)) for part in fields(result)
    }


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
        return plain(value)
    return value if isinstance(value, int | bool | str | None) else str(value)
