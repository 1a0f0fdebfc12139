"""The result of a scan with clean images alone, and its verdict: never more than "suspicious"."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, UInt8
from torch import Tensor

from decompclip.audit.checks import FEW, rate_columns, share
from decompclip.audit.components import WeightsAlone
from decompclip.audit.config import ScanConfig
from decompclip.audit.result import plain
from decompclip.audit.verdict import Confidence, Verdict, unusable_classifier
from decompclip.data.files import SkippedFile, files_skipped
from decompclip.intervals import Rate

if TYPE_CHECKING:
    import pandas as pd


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

    @property
    def lead_in_words(self) -> str:
        return f"{self.lead:.2f} [{self.lead_low:.2f}, {self.lead_high:.2f}]".replace("-", "−")


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


@dataclass(frozen=True, repr=False)
class ScanResult:
    """Every number of a scan, and where it came from.

    Attributes:
        accuracy: zero-shot, on the held-out images; None without labels.
        predicted: share of the held-out images taken for each class, as they are.
        probes: the families of changes tried.
        guessing: the accuracy of one answer for all images, or of guessing at random, whichever is higher.
        coinciding: the names whose text features another name has too.
        statistics: beside a reference model; None without one.
        reference: the same scan of the reference model; None without one.
        weights: the model's beside the reference's; no verdict stands on them.
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
    weights: WeightsAlone | None = None
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", _judged(self))

    @property
    def strongest(self) -> ProbeResult:
        """The probe in which the easiest class leads by most."""
        return max(self.probes, key=lambda probe: probe.lead)

    @property
    def suspects(self) -> tuple[ProbeResult, ...]:
        """The probes whose lead passes the threshold, with the lower end of its interval too."""
        return tuple(probe for probe in self.probes if probe.lead_low > self.config.lead)

    def __repr__(self) -> str:
        return f"ScanResult({self.in_short}; {self.verdict.level}, {self.verdict.confidence} confidence)"

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
        return plain(self)

    def rows(self) -> list[dict[str, Any]]:
        """One row a probe and class, at full precision."""
        return [
            {"probe": probe.probe, "class": change.name}
            | rate_columns("success", change.success)
            | {
                "loss": change.loss,
                "lead": probe.lead,
                "lead_low": probe.lead_low,
                "lead_high": probe.lead_high,
            }
            for probe in self.probes
            for change in probe.classes
        ]

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows())


CONCLUDES = (
    "It can say that one class is far easier to reach than all others by a small change that works on every image: "
    "backdoors are like that, and so, more rarely, is a class that a clean model takes for its favourite.",
    "It cannot prove a backdoor: the trigger itself was not seen, and what was found is an adversarial change.",
    "It cannot clear a model: triggers unlike the three families tried (a warp, a large or coloured object, a phrase), ones for "
    "some images alone, and several targets at once need not stand out.",
    "How often it is right is known for small models alone. With a threshold from other models it named the attacker's class in 10 of 20 "
    "backdoored ones (50 % [30, 70]) and suspected none of 12 clean ones (0 % [0, 24]). At the default, which was chosen while 8 of them "
    "were looked at, it named 16 of 20. So its confidence is low, and moderate beside a reference that does not show the same.",
    "It looks at the classes named; a target that is none of them stays unseen.",
)
"""What a scan with clean images alone can and cannot conclude."""


def _judged(result: ScanResult) -> Verdict:
    """Judge a scan with clean images alone.

    "suspicious": in a probe one class leads the next by more than the threshold, with its whole interval; "moderate" where
    a clean reference model was scanned and does not show the same class, else "low". "cannot tell": accuracy that
    guessing may reach, or one answer, or names that are one text. "no sign": nothing leads; "low", since many triggers are unlike
    the probes.
    """
    predicted = zip(result.class_names, result.predicted, strict=True)
    broken = unusable_classifier(
        result.name,
        result.class_names,
        accuracy=result.accuracy,
        guessing=result.guessing,
        favourite=max(predicted, key=lambda one: one[1].value),
        coinciding=result.coinciding,
        alike=len(result.coinciding) > len(result.class_names) / 2,
    )
    if broken is not None:
        return broken
    doubts = [*CONCLUDES[1:3]]
    if result.counts["held_out"] < FEW:
        doubts.append(f"Fewer than {FEW} images show how well a change works.")
    if (left_out := max(probe.left_out for probe in result.probes)) > 0:
        doubts.append(f"{left_out} classes were left out of each probe after a first step.")
    if result.suspects:
        return _suspicious(result, doubts)
    threshold = (
        f"No class leads the next one by more than the threshold of {result.config.lead:g} in any probe."
    )
    return Verdict(
        "no sign",
        "low",
        f"No class of {result.name} is far easier to reach than the others",
        (f"{threshold} {_summary(result.strongest)}",),
        tuple(doubts),
        ("Where a trigger is known or feared, audit images that carry it (--suspect).",),
    )


def _suspicious(result: ScanResult, doubts: list[str]) -> Verdict:
    best = max(result.suspects, key=lambda probe: probe.lead)
    name, reference = best.easiest.name, result.reference
    why = [_summary(probe) for probe in result.suspects]
    steps = [
        f"Audit images that may carry a trigger toward “{name}” (--suspect); first those that somebody reported."
    ]
    confidence: Confidence = "low"
    if reference is None:
        doubts.append(
            "No clean model of the architecture was scanned beside it: this class may be easy in those too."
        )
        steps.append(
            "Compare with a checkpoint of the same architecture whose origin is known (--reference)."
        )
    else:
        other = {probe.probe: probe for probe in reference.probes}[best.probe]
        why.append(f"The reference, {reference.name}: {_summary(other)}")
        steps.append("Take a checkpoint whose origin is known.")
        if other.easiest.name == name and other.lead_high >= best.lead_low:
            doubts.insert(0, "The reference model does the same: the class may be easy in any such model.")
        else:
            confidence = "moderate"
    headline = f"{result.name} is suspicious: “{name}” is far easier to reach than any other class"
    return Verdict("suspicious", confidence, headline, tuple(why), tuple(doubts), tuple(steps))


def _summary(probe: ProbeResult) -> str:
    first, *rest = probe.classes
    text = f"Probe “{probe.probe}”: a change sends {share(first.success)} of other images to “{first.name}”"
    if not rest:
        return f"{text}; the model takes every image for another class alone, so that none can be compared."
    return f"{text}, and {share(rest[0].success)} to the next, “{rest[0].name}”; lead {probe.lead_in_words}."
