"""What a scan allows to be said: never more than "suspicious", and what it cannot tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decompclip.audit.verdict import ONE_ANSWER, Verdict
from decompclip.audit.words import FEW, share

if TYPE_CHECKING:
    from decompclip.audit.scan.result import ProbeResult, ScanResult

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
