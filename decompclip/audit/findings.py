"""What an audit's numbers say, in plain words: every sentence follows from the numbers and their intervals."""

from __future__ import annotations

from collections.abc import Iterator

from decompclip.audit import findings_defenses as defenses
from decompclip.audit import findings_parts as parts
from decompclip.audit.finding import Finding
from decompclip.audit.result import AuditResult
from decompclip.audit.words import FEW, STRONG, WEAK, difference, points, share


def findings(result: AuditResult) -> tuple[Finding, ...]:
    """The statements at the top of the report, the most important first."""
    found: list[Finding | None] = [_effect(result), _accuracy(result)]
    if result.as_it_is.has_effect:
        found += [parts.infection(result), parts.ablation(result), defenses.repair(result)]
    found += [parts.shift(result), defenses.suspicion(result), defenses.detection(result), *_notes(result)]
    return tuple(finding for finding in found if finding is not None)


def _effect(result: AuditResult) -> Finding:
    setting, name = result.as_it_is, f"“{result.target.name}”"
    sought = "a trigger" if result.verdict.level == "backdoored" else "a shift"
    low, high = setting.difference_interval
    whose = f" of other classes than {name}" if setting.excludes_target else ""
    numbers = (
        f"Of the suspect images{whose}, {share(setting.success)} are taken for {name}; of the clean ones "
        f"{share(setting.control)}. Difference: {difference(setting)}."
    )
    if low > 0:
        size = "Strong" if low >= STRONG else "Some" if low >= WEAK else "Weak"
        why = (
            " Both sets hold the same images but for what was done to the suspect ones, so that is the cause: a trigger, or a "
            "change that leaves too little of the image; the verdict says what tells them apart here."
            if result.twins
            else " A backdoor does this; so does a suspect set whose images look more like that class."
        )
        small = (
            ""
            if low >= WEAK
            else " The effect is small: a change to the images can also do this in a clean model."
        )
        return Finding("evidence", f"{size} evidence of {sought} toward {name}", numbers + why + small)
    if high < 0:
        return Finding("no evidence", f"Suspect images avoid {name}", numbers)
    if high > WEAK:
        bound = f" Effects of up to {100 * high:.1f} points cannot be ruled out: more images would tell."
        return Finding("unclear", f"Too few images to tell of a trigger toward {name}", numbers + bound)
    bound = (
        f" With these images, effects above {100 * high:.1f} points can be ruled out, smaller ones cannot."
    )
    return Finding("no evidence", f"No sign of a trigger toward {name}", numbers + bound)


def _accuracy(result: AuditResult) -> Finding:
    cacc, n = result.as_it_is.report.cacc, len(result.class_names)
    if cacc is None:
        text = "The clean images carry no labels (no sub-folder is named after a class), so accuracy is not known."
        return Finding("note", "Clean accuracy not measured", text)
    text = f"Zero-shot accuracy on clean images is {share(cacc)}; one answer for all, or guessing among {n} classes, gives {100 * result.checks.guessing:.1f} %."
    if cacc.low <= result.checks.guessing:
        text += " That is no better than guessing can be: check the model, its activation and the class names first."
        return Finding("unclear", "The model may not know these classes", text)
    return Finding("note", "Clean accuracy", text)


def _notes(result: AuditResult) -> Iterator[Finding]:
    target, counts = result.target, result.counts
    if target.asked is not None and target.over_prediction is not None and result.as_it_is.has_effect:
        value, *interval = target.over_prediction
        text = f"Asked for “{target.asked}”. Suspect images go to “{target.name}” instead: {points(value, (interval[0], interval[1]))} of "
        text += f"all images; every number here is toward that class (the largest of {len(result.class_names)}, so that the interval is too narrow)."
        yield Finding("evidence", f"Suspect images go to “{target.name}”, not “{target.asked}”", text)
    elif target.inferred and target.asked is None and target.over_prediction is not None:
        value, *interval = target.over_prediction
        text = f"No target was named. On {target.images} suspect images that serve nothing else, “{target.name}” is the "
        text += f"class predicted more often than on clean images by the most: {points(value, (interval[0], interval[1]))}"
        text += f" (the largest of {len(result.class_names)}, so that the interval is too narrow)."
        doubtful = interval[0] <= 0
        text += " That is within chance: the target below is a guess." if doubtful else ""
        yield Finding("unclear" if doubtful else "note", f"The target “{target.name}” is inferred", text)
    if not result.as_it_is.excludes_target:
        missing = "suspect" if result.as_it_is.report.asr is None else "clean"
        text = f"The {missing} images carry no labels (no sub-folder is named after a class), so target-class images "
        text += "cannot be left out: attack success and control count all images, and more true target-class images "
        text += "on one side look like an attack."
        yield Finding("unclear", "Attack success without labels", text)
    for what, reason in result.left_out.items():
        yield Finding("note", f"Not measured: {what}", f"{reason[0].upper()}{reason[1:]}.")
    for side in ("clean", "suspect"):
        if counts[side] < FEW:
            text = f"Only {counts[side]} {side} images are evaluated; the intervals are as wide as that makes them."
            yield Finding("note", f"Few {side} images", text)
        if skipped := len(result.skipped[side]):
            yield Finding(
                "note",
                f"{skipped} {side} file{'s' if skipped > 1 else ''} skipped",
                "The end of the report lists what and why.",
            )
