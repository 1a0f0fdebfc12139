"""What an audit's numbers say, in plain words: every sentence follows from the numbers and their intervals.

What moves the images is called a trigger, and components infected, only where the verdict is "backdoored".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from decompclip.audit.checks import (
    FEW,
    STRONG,
    WEAK,
    Setting,
    cost,
    count,
    difference,
    outcome,
    plus_minus,
    points,
    share,
)
from decompclip.audit.components import short
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult, Detection, Suspicion
from decompclip.audit.verdict import numbers
from decompclip.display import some
from decompclip.intervals import difference_interval

Weight = Literal["evidence", "no evidence", "unclear", "note"]

FAVOURED = 0.25
"""Clean images that an intervention may send to the target before little room is left for a difference."""

COSTLY = 0.02
"""Clean accuracy that the lower end of a repair's cost must pass to be called a cost."""

USEFUL = 0.7
"""AUROC that the lower end of its interval must pass for a detector to be called one, or its upper end to be
called more than nothing."""

NO_BACKDOOR = (
    " Suspect images are not taken for the target more often: it notices changed images here, not a backdoor."
)


@dataclass(frozen=True)
class Finding:
    """One statement, how much it weighs, and its sentences."""

    weight: Weight
    title: str
    text: str


def findings(result: AuditResult) -> tuple[Finding, ...]:
    """The statements at the top of the report, the most important first."""
    found: list[Finding | None] = [_effect(result), _accuracy(result)]
    if result.as_it_is.has_effect:
        found += [_components(result), _ablation(result), _repair(result)]
    found += [_shift(result), _suspicion(result), _detection(result), *_notes(result)]
    return tuple(finding for finding in found if finding is not None)


def _effect(result: AuditResult) -> Finding:
    name = f"“{result.target.name}”"
    low, high = result.as_it_is.difference_interval
    text = numbers(result)
    if low > 0:
        size = "Strong" if low >= STRONG else "Some" if low >= WEAK else "Weak"
        if result.paired:
            text += " Both sets hold the same images but for what was done to the suspect ones, so that is the cause: a trigger, or "
            text += (
                "a change that leaves too little of the image. The verdict says what tells them apart here."
            )
        else:
            text += " A backdoor does this; so does a suspect set whose images look more like that class."
        if low < WEAK:
            text += " The effect is small: a change to the images can do this in a clean model too."
        return Finding("evidence", f"{size} evidence of a {moved(result)} toward {name}", text)
    if high < 0:
        return Finding("no evidence", f"Suspect images avoid {name}", text)
    if high > WEAK:
        text += f" Effects of up to {100 * high:.1f} points cannot be ruled out: more images would tell."
        return Finding("unclear", f"Too few images to tell of a trigger toward {name}", text)
    text += (
        f" With these images, effects above {100 * high:.1f} points can be ruled out, smaller ones cannot."
    )
    return Finding("no evidence", f"No sign of a trigger toward {name}", text)


def _accuracy(result: AuditResult) -> Finding:
    cacc, guessing = result.as_it_is.report.cacc, result.checks.guessing
    if cacc is None:
        text = "The clean images carry no labels, so accuracy is not known."
        return Finding("note", "Clean accuracy not measured", text)
    text = f"Zero-shot accuracy on clean images is {share(cacc)}; one answer for all, or guessing among "
    text += f"{len(result.class_names)} classes, gives {100 * guessing:.1f} %."
    if cacc.low <= guessing:
        text += " That is no better than guessing can be: check the model, its activation and the class names first."
        return Finding("unclear", "The model may not know these classes", text)
    return Finding("note", "Clean accuracy", text)


def _components(result: AuditResult) -> Finding:
    """Which components contribute to the target on suspect images."""
    parts, infected = result.infection.parts, result.infection.infected
    if not infected:
        text = f"None of {len(parts)} heads and MLPs contributes to the target beyond chance and more than an equal share."
        return Finding("unclear", f"No {'infected ' if backdoored(result) else ''}component stands out", text)
    n_heads = sum(part.part.kind == "heads" for part in infected)
    names = some([short(part.part) for part in infected], 5)
    text = f"Of {len(parts)} heads and MLPs, {count(n_heads, 'head')} and {count(len(infected) - n_heads, 'MLP')} contribute to the "
    text += f"target beyond chance and more than an equal share: {names}. Together they make "
    text += f"{100 * sum(part.share for part in infected):.0f} % of all contributions to it (direct effect)."
    without, others = result.infection.without, result.infection.without_others
    if without is not None:
        text += f" With their terms at clean means {difference(without)} is left"
        text += f", beside {difference(others)} without as many others." if others is not None else "."
        kept = without.report.cacc
        text += f" Clean accuracy is then {share(kept)}." if kept is not None else ""
        if without.difference_interval[0] >= STRONG:
            text += " So these terms alone do not decide it: what they do through later layers is not in their terms."
    these = count(len(infected), "component")
    verb = "carries" if len(infected) == 1 else "carry"
    return Finding("evidence", f"{these} {'infected' if backdoored(result) else f'{verb} the shift'}", text)


def backdoored(result: AuditResult) -> bool:
    """Whether what is seen may be called a trigger, and components infected."""
    return result.verdict.level == "backdoored"


def moved(result: AuditResult) -> str:
    """What moves the images, as far as the verdict goes."""
    return "trigger" if backdoored(result) else "shift"


def _ablation(result: AuditResult) -> Finding:
    """What is left without all heads, all MLPs, or a layer of them."""
    heads, mlps = (result.ablations.complete[kind] for kind in ("heads", "mlps"))
    before, what = result.as_it_is, moved(result)
    text = f"The difference of {difference(before)} becomes {difference(heads)} with every head replaced by its clean "
    text += f"mean, and {difference(mlps)} with every MLP replaced (direct effect)."
    costs = _cost(result, heads, "heads") + _cost(result, mlps, "MLPs")
    text += costs
    (h_low, h_high), (m_low, m_high) = heads.difference_interval, mlps.difference_interval
    weight: Weight = "unclear"
    if min(h_low, m_low) >= STRONG:
        weight, title = "evidence", f"The {what} survives ablating all heads, and ablating all MLPs"
        text += " So neither kind alone carries it."
    elif costs:
        title = f"Without all heads or all MLPs too much else changes to place the {what}"
    elif h_high < m_low or m_high < h_low:
        more, less = ("heads", "MLPs") if h_high < m_low else ("MLPs", "heads")
        weight, title = "evidence", f"The {what} writes through the {more} more than the {less}"
    else:
        title = f"Heads and MLPs cannot be told apart as the {what}'s way"
        text += " The two intervals overlap."
    layers = {
        f"the {name} of layer {layer} matter{s}": setting
        for kind, name, s in (("heads", "heads", ""), ("mlps", "MLP", "s"))
        for layer, setting in enumerate(result.ablations.sweeps[kind]["separate"])
    }
    where, best = min(layers.items(), key=lambda item: item[1].difference)
    if best.difference_interval[1] < before.difference_interval[0]:
        text += f" Of single layers, {where} most: without them {difference(best)} is left."
        text += " (Picked as the largest of many, so that its interval is too narrow.)"
    else:
        text += " No single layer's ablation lowers it beyond the uncertainty."
    return Finding(weight, title, text)


def _cost(result: AuditResult, setting: Setting, what: str) -> str:
    """What an ablation does to clean images, where that is so much that the rest says little."""
    before, after = result.as_it_is.report.cacc, setting.report.cacc
    words = ""
    if before is not None and after is not None and after.value < before.value / 2:
        words += f" Without {what}, clean accuracy falls to {share(after)}."
    if setting.control.value - result.as_it_is.control.value > FAVOURED:
        words += f" Without {what}, {share(setting.control)} of the clean images are taken for the target too, which leaves "
        words += f"a difference of at most {100 * (1 - setting.control.value):.0f} points."
    return words


def _shift(result: AuditResult) -> Finding:
    """How the mean feature moves, and through what."""
    shift, name = result.shift, f"“{result.target.name}”"
    whole, error = shift.totals["all"]
    if not whole - error > 0:  # nor where the error is unknown
        text = f"The mean feature moves by {plus_minus(whole, error)} of its norm along the way to {name}."
        away = f"Suspect images move away from {name}"
        return Finding(
            "no evidence", away if whole + error < 0 else f"The mean does not move toward {name}", text
        )
    head, mlp = int(shift.heads_contribution.argmax()), int(shift.mlps_contribution.argmax())
    head_part = plus_minus(
        float(shift.heads_contribution.flatten()[head]), float(shift.heads_error.flatten()[head])
    )
    mlp_part = plus_minus(float(shift.mlps_contribution[mlp]), float(shift.mlps_error[mlp]))
    text = (
        f"The mean feature moves toward {name} by {plus_minus(whole, error, sign=False)} of its norm: heads "
    )
    text += f"{plus_minus(*shift.totals['heads'])}, MLPs {plus_minus(*shift.totals['mlps'])}. The largest single parts are "
    text += f"head {head // result.n_heads}.{head % result.n_heads} ({head_part}) and MLP {mlp} ({mlp_part})."
    if not shift.paired:
        text += " The images are not paired, so a different mix of classes moves the mean too."
    weight: Weight = "evidence" if shift.paired else "unclear"
    if not result.as_it_is.has_effect:
        weight = "note"
        text += " That is too little to change what the images are taken for."
    return Finding(weight, f"The mean moves toward {name}", text)


def _repair(result: AuditResult) -> Finding:
    """What the best repair leaves, saves and costs."""
    before, n = result.as_it_is, len(result.repairs)
    low = before.difference_interval[0]
    works = sum(repair.setting.difference_interval[1] < low for repair in result.repairs)
    best = min(result.repairs, key=lambda repair: repair.setting.difference)
    left, change = best.setting, best.change
    text = f"Of {n} repairs, {works or 'none'} lower{'s' if works < 2 else ''} the difference beyond its "
    text += f"uncertainty. The lowest is left by {left.name}: {difference(left)}. {outcome(change)}"
    text += f". Clean accuracy: {cost(change)}." if change.cost is not None else "."
    text += f" (Picked as the best of {n}, so that its interval is too narrow.)"
    if not works:
        missing = {what: reason for what, reason in result.left_out.items() if "repair" in what}
        for what, reason in missing.items():  # those that know nothing of the attack, as a rule the best
            text += f" {what.capitalize()} could not be measured: {reason}."
        return Finding(
            "unclear" if missing else "note", f"None of the {n} repairs measured helps this model", text
        )
    costly = change.cost is not None and change.cost[1] > COSTLY
    text += " That costs clean accuracy beyond its uncertainty." if costly else ""
    if left.control.low > before.control.high:
        costly = True
        text += f" It sends clean images to the target as well: {share(left.control)}."
    gone = left.difference_interval[0] <= 0 or change.saved.low > 1 - WEAK
    title = "A repair takes the difference away" if gone else "Repair lowers the difference, in part"
    return Finding("unclear" if costly else "evidence", title, text)


def _detection(result: AuditResult) -> Finding:
    """What Decomp-Det finds, under the best of its rules."""
    n = len(result.detectors)
    best = max(result.detectors, key=lambda found: found.auroc)
    lowest = min(found.auroc for found in result.detectors)
    text = f"Of {n} rules, {rule_name(best.similarity, best.threshold)} has the highest AUROC: {area(best)} "
    text += f"(0.5 is guessing; the lowest is {lowest:.3f}). At its own threshold, more than {best.zeta} flagged heads, it flags "
    text += (
        f"{share(best.true_positives)} of the suspect and {share(best.false_positives)} of the clean images."
    )
    text += f" (Picked as the best of {n}, so that its interval is too narrow.)"
    if result.n_heads <= best.zeta:
        text += f" (The last layer has {result.n_heads} heads, so that no image can pass it: choose a smaller --zeta.)"
    if best.auroc_low <= 0.5:
        return Finding("note", "Decomp-Det does not tell suspect images from clean ones", text)
    if best.auroc_high < USEFUL:
        return Finding("note", "Decomp-Det hardly tells suspect images from clean ones", text)
    usable = best.true_positives.low > best.false_positives.high
    title = f"Decomp-Det ranks suspect images above clean ones{'' if usable else ', but fails at its own threshold'}"
    if not result.as_it_is.has_effect:
        return Finding("note", title, text + NO_BACKDOOR)
    return Finding("evidence" if best.auroc_low > USEFUL and usable else "unclear", title, text)


def _suspicion(result: AuditResult) -> Finding | None:
    """What detection without a hint finds; None where it was not measured."""
    found = result.suspicion
    if found is None:
        return None
    text = f"Set to flag {100 * found.stated:g} % of clean images, it flags {share(found.false_positives)} of the reported clean "
    text += f"ones and {share(found.true_positives)} of the suspect ones; AUROC {area(found)} (0.5 is guessing). {alarms(found)}"
    if found.auroc_low <= 0.5:
        return Finding("note", "Detection without a hint does not tell suspect images from clean ones", text)
    if not result.as_it_is.has_effect:
        return Finding("note", "Detection without a hint tells the two sets apart", text + NO_BACKDOOR)
    usable = found.true_positives.low > found.false_positives.high
    title = f"Detection without a hint {'finds' if usable else 'hardly finds'} suspect images"
    return Finding("evidence" if found.auroc_low > USEFUL and usable else "unclear", title, text)


def area(found: Detection | Suspicion) -> str:
    """The AUROC with its interval."""
    return f"{found.auroc:.3f} [{found.auroc_low:.3f}, {found.auroc_high:.3f}]"


def gap(found: Detection) -> str:
    """By how much more of the suspect than of the clean images are flagged."""
    true, false = found.true_positives, found.false_positives
    return points(true.value - false.value, difference_interval(true, false))


def alarms(found: Suspicion) -> str:
    """False alarms to expect in use."""
    rate = found.false_positives
    low, high = round(1000 * rate.low), round(1000 * rate.high)
    return f"Of 1,000 clean images expect {1000 * rate.value:.0f} [{low}, {high}] false alarms."


def _notes(result: AuditResult) -> Iterator[Finding]:
    target, n = result.target, len(result.class_names)
    if target.over_prediction is not None:
        value, low, high = target.over_prediction
        more, largest = (
            points(value, (low, high)),
            f"(the largest of {n}, so that the interval is too narrow)",
        )
        if target.asked is not None and result.as_it_is.has_effect:
            text = f"Asked for “{target.asked}”. Suspect images go to “{target.name}” instead: {more} of all images. Every "
            text += f"number here is toward that class {largest}."
            yield Finding("evidence", f"Suspect images go to “{target.name}”, not “{target.asked}”", text)
        elif target.inferred and target.asked is None:
            text = f"No target was named. On {target.images} suspect images that serve nothing else, “{target.name}” is the "
            text += f"class predicted more often than on clean images by the most: {more} {largest}."
            text += " That is within chance: the target below is a guess." if low <= 0 else ""
            yield Finding("unclear" if low <= 0 else "note", f"The target “{target.name}” is inferred", text)
    if not result.as_it_is.excludes_target:
        missing = "suspect" if result.as_it_is.report.asr is None else "clean"
        text = f"The {missing} images carry no labels, so target-class images "
        text += "cannot be left out. Attack success and control count all images, and more true target-class images "
        text += "on one side look like an attack."
        yield Finding("unclear", "Attack success without labels", text)
    for what, reason in result.left_out.items():
        yield Finding("note", f"Not measured: {what}", f"{reason[0].upper()}{reason[1:]}.")
    for side in ("clean", "suspect"):
        if (few := result.counts[side]) < FEW:
            text = f"Only {few} {side} images are evaluated; the intervals are as wide as that makes them."
            yield Finding("note", f"Few {side} images", text)
        if skipped := len(result.skipped[side]):
            files = f"{skipped} {side} file{'s' if skipped > 1 else ''} skipped"
            yield Finding("note", files, "The end of the report lists what and why.")
