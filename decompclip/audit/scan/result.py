"""What a scan found: frozen, with its uncertainty, ready for words, tables and JSON."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, UInt8
from torch import Tensor

from decompclip.audit.result import jsonable
from decompclip.audit.scan.config import ScanConfig
from decompclip.data.files import SkippedFile, files_skipped
from decompclip.evaluation.intervals import Rate

if TYPE_CHECKING:
    import pandas as pd

    from decompclip.audit.verdict import Verdict


@dataclass(frozen=True)
class ClassChange:
    """How far the best change found sends held-out images to a class.

    Attributes:
        success: of images that the model takes for another class, those that become this one.
        loss: mean cross-entropy toward the class that is left on them, in nats.
    """

    name: str
    success: Rate
    loss: float


@dataclass(frozen=True)
class ProbeResult:
    """One family of changes, class by class, the easiest first.

    Attributes:
        lead: log of the next class's loss over that of the easiest: 0 where both are as hard; 0.7 where it is twice.
        lead_low, lead_high: its 95 % interval over the held-out images.
        left_out: classes that a first step left out.
        pictures: held-out images as they are and with the change for the easiest class.
    """

    probe: str
    classes: tuple[ClassChange, ...]
    lead: float
    lead_low: float
    lead_high: float
    left_out: int
    pictures: UInt8[Tensor, "image 2 h w 3"]

    @property
    def easiest(self) -> ClassChange:
        return self.classes[0]


@dataclass(frozen=True)
class HeadStatistics:
    """How unlike the terms of two models are on the same clean images.

    Attributes:
        heads, mlps: mean squared difference of a component's centred terms over the sum of both variances: 0 where they say
            the same, 1 where they are unrelated.
        reference: name of the other model.
    """

    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    reference: str


@dataclass(frozen=True)
class ScanResult:
    """Every number of a scan, and where it came from.

    Attributes:
        accuracy: zero-shot, on the held-out images; None without labels.
        predicted: share of the held-out images taken for each class, as they are.
        probes: the families of changes tried.
        guessing: the accuracy that always giving one answer, or any, would reach.
        coinciding: the names whose text features another name has too.
        statistics: beside a reference model; None without one.
        reference: the same scan of the reference model; None without one.
    """

    name: str
    provenance: Mapping[str, Any]
    config: ScanConfig
    clean_name: str
    counts: dict[str, int]
    class_names: tuple[str, ...]
    accuracy: Rate | None
    predicted: tuple[Rate, ...]
    probes: tuple[ProbeResult, ...]
    skipped: tuple[SkippedFile, ...]
    guessing: float
    coinciding: tuple[str, ...]
    statistics: HeadStatistics | None = None
    reference: ScanResult | None = None
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        from decompclip.audit.scan.verdict import judged

        object.__setattr__(self, "verdict", judged(self))

    @property
    def strongest(self) -> ProbeResult:
        """The probe in which the easiest class leads by most."""
        return max(self.probes, key=lambda probe: probe.lead)

    @property
    def suspects(self) -> tuple[ProbeResult, ...]:
        """The probes whose lead passes the threshold, with the lower end of its interval too."""
        return tuple(probe for probe in self.probes if probe.lead_low > self.config.lead)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.in_short)}</p>{self.verdict._repr_html_()}"

    @property
    def in_short(self) -> str:
        """What was looked at, in a line."""
        skipped = f"; {files_skipped(len(self.skipped))}, see the report" if self.skipped else ""
        return (
            f"{self.name}: {sum(self.counts.values())} clean images, {len(self.class_names)} classes{skipped}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number, without pictures."""
        return {part.name: jsonable(getattr(self, part.name)) for part in fields(self)}

    def to_frame(self) -> pd.DataFrame:
        """One row a probe and class."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "probe": probe.probe,
                    "class": change.name,
                    "success": change.success.value,
                    "success_low": change.success.low,
                    "success_high": change.success.high,
                    "loss": change.loss,
                }
                for probe in self.probes
                for change in probe.classes
            ]
        )
