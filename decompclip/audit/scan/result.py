"""What a scan can be asked to do otherwise.

What a scan found: frozen, with its uncertainty, ready for words, tables and JSON.

What a scan allows to be said: never more than "suspicious", and what it cannot tell.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, UInt8
from torch import Tensor

from decompclip.audit.result import jsonable
from decompclip.audit.verdict import ONE_ANSWER, Verdict
from decompclip.audit.words import FEW, share
from decompclip.data.files import SkippedFile, files_skipped
from decompclip.intervals import Rate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Options of a scan with clean images alone.

    Attributes:
        bound: most that the probe "everywhere" changes a pixel, in the images' range of 0 to 1.
        patch: side of the patch probes, as a share of the image's shorter side.
        steps, images: of the search for each class's change, and images a step.
        fit: most clean images that the search sees; the others, at most `held_out`, tell how well a change works.
        most_classes: classes that are searched in full; of more, those are left that one step gets furthest with.
        lead: of a class over the next one (see `ProbeResult`) from which the scan calls it a likely target: twice the
            largest that clean models showed, which are not among those reported (`python -m analyses.audit_scan`).
        batch_size: images a forward pass.
        seed: of the split, and of places.
    """

    bound: float = 8 / 255
    patch: float = 1 / 6
    steps: int = 30
    images: int = 24
    fit: int = 192
    held_out: int = 300
    most_classes: int = 16
    lead: float = 0.5
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bound", "patch"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1; received {getattr(self, name)}")
        if not (math.isfinite(self.lead) and self.lead > 0):
            raise ValueError(f"expected a lead above 0; received {self.lead}")
        least = {
            "steps": 1,
            "images": 1,
            "fit": 1,
            "held_out": 20,
            "most_classes": 2,
            "batch_size": 1,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"expected {name} of at least {low}; received {getattr(self, name)}")


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


CONCLUDES = (
    "It can say that one class is far easier to reach than all others by a small change that works on every image: "
    "backdoors are like that, and so, more rarely, is a class that a clean model takes for its favourite.",
    "It cannot prove a backdoor: the trigger itself was not seen, and what was found is an adversarial change.",
    "It cannot clear a model: triggers unlike the three families tried (a warp, a large or coloured object, a phrase), ones for "
    "some images alone, and several targets at once need not stand out.",
    "How often it is right is known for small models alone: with a threshold from other models it named the attacker's class in 8 of 14 "
    "backdoored ones (57 % [33, 79]) and suspected none of 5 clean ones (0 % [0, 43]); 12 of 14 at the default, which was chosen while 8 of them "
    "were looked at. So it is said with low confidence, moderate beside a reference that does not show the same.",
    "It looks at the classes named; a target that is none of them stays unseen.",
)
"""What a scan with clean images alone can and cannot conclude."""


def scan_verdict(result: ScanResult) -> Verdict:
    """The verdict of a scan, which it holds."""
    return result.verdict


def judged(result: ScanResult) -> Verdict:
    """Judge a scan with clean images alone.

    "suspicious": in a probe one class leads the next by more than the threshold, with its whole interval; "moderate" where
    a clean reference model was scanned and does not show the same class, else "low". "cannot tell": accuracy that
    guessing may reach, or one answer, or names that are one text. "no sign": nothing leads; "low", since many triggers are unlike the probes.
    """
    if (broken := _unusable(result)) is not None:
        return broken
    doubts = [*CONCLUDES[1:3]]
    if result.counts["held_out"] < FEW:
        doubts.append(f"Fewer than {FEW} images told how well a change works.")
    if (left_out := max(probe.left_out for probe in result.probes)) > 0:
        doubts.append(f"{left_out} classes were left out of each probe after a first step.")
    if not result.suspects:
        best = result.strongest
        why = (
            f"No class leads the next one by more than the threshold of {result.config.lead:g} in any probe. {_said(best)}",
        )
        steps = ("Where a trigger is known or feared, audit images that carry it (--suspect).",)
        return Verdict(
            "no sign",
            "low",
            f"No class of {result.name} is far easier to reach than the others",
            why,
            tuple(doubts),
            steps,
        )
    return _suspicious(result, doubts)


def _unusable(result: ScanResult) -> Verdict | None:
    """A classifier that does not tell clean images apart."""
    favourite, often = max(
        zip(result.class_names, result.predicted, strict=True), key=lambda one: one[1].value
    )
    same, n = len(result.coinciding), len(result.class_names)
    if same > n / 2:
        why = f"{same} of {n} names have a text feature that another name has too: {', '.join(result.coinciding[:5])}"
        why += ", …." if same > 5 else "."
    elif result.accuracy is not None and result.accuracy.low <= result.guessing:
        why = f"Clean accuracy is {share(result.accuracy)}; one answer for all, or guessing, gives {100 * result.guessing:.1f} %."
    elif result.accuracy is None and often.value >= ONE_ANSWER:
        why = f"{share(often)} of the clean images are taken for “{favourite}”."
    else:
        return None
    return Verdict(
        "cannot tell",
        "low",
        f"{result.name} may not know these classes: nothing can be said of a backdoor",
        (why,),
        ("The wrong activation, normalisation or class names look like this.",),
        ("Run `decompclip diagnose` on the clean images and mend what it finds; then scan again.",),
    )


def _suspicious(result: ScanResult, doubts: list[str]) -> Verdict:
    best = max(result.suspects, key=lambda probe: probe.lead)
    name = best.easiest.name
    why = [_said(probe) for probe in result.suspects]
    confidence = "low"
    if (reference := result.reference) is None:
        doubts.append(
            "No clean model of the architecture was scanned beside it: this class may be easy in those too."
        )
    else:
        twin = {probe.probe: probe for probe in reference.probes}[best.probe]
        why.append(f"The reference, {reference.name}: {_said(twin)}")
        if twin.easiest.name == name and twin.lead_high >= best.lead_low:
            doubts.insert(0, "The reference model does the same: the class may be easy in any such model.")
        else:
            confidence = "moderate"
    steps = [
        f"Audit images that may carry a trigger toward “{name}” (--suspect); those that somebody reported, first.",
        "Compare with a checkpoint of the same architecture whose origin is known (--reference)."
        if reference is None
        else "Take a checkpoint whose origin is known.",
    ]
    headline = f"{result.name} is suspicious: “{name}” is far easier to reach than any other class"
    return Verdict("suspicious", confidence, headline, tuple(why), tuple(doubts), tuple(steps))


def _said(probe: ProbeResult) -> str:
    first, *rest = probe.classes
    said = f"Probe “{probe.probe}”: a change sends {share(first.success)} of other images to “{first.name}”"
    if not rest:
        return f"{said}; the model takes every image for another class alone, so that none can be compared."
    lead = f"lead {probe.lead:.2f} [{probe.lead_low:.2f}, {probe.lead_high:.2f}]".replace("-", "−")
    return f"{said}, and {share(rest[0].success)} to the next, “{rest[0].name}”; {lead}."
