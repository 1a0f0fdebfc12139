"""One statement of a report.

What carries the shift toward the target, in plain words: components, kinds and layers.

It is called a trigger, and components infected, only where the verdict is "backdoored".

What repairs and detectors came to, in plain words.

What an audit's numbers say, in plain words: every sentence follows from the numbers and their intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from decompclip.audit.checks import Setting
from decompclip.audit.infected import InfectedPart
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult, Suspicion
from decompclip.audit.words import FEW, STRONG, WEAK, count, difference, outcome, plus_minus, points, share

Weight = Literal["evidence", "no evidence", "unclear", "note"]


@dataclass(frozen=True)
class Finding:
    """One statement, how much it weighs, and the sentence of it."""

    weight: Weight
    title: str
    text: str


FAVOURED = 0.25
"""Clean images that an intervention may send to the target before little room is left for a difference."""


def infection(result: AuditResult) -> Finding:
    """Which components pull suspect images toward the target."""
    parts, infected = result.infection.parts, result.infection.infected
    if not infected:
        text = f"None of {len(parts)} heads and MLPs pulls toward the target beyond chance and more than an equal share."
        return Finding("unclear", f"No {'infected ' if called(result) else ''}component stands out", text)
    n_heads = sum(part.part.kind == "heads" for part in infected)
    names = ", ".join(short(part) for part in infected[:5]) + (", …" if len(infected) > 5 else "")
    text = f"Of {len(parts)} heads and MLPs, {count(n_heads, 'head')} and {count(len(infected) - n_heads, 'MLP')} pull toward the "
    text += f"target beyond chance and more than an equal share: {names}; together they make "
    text += f"{100 * sum(part.share for part in infected):.0f} % of all that pulls (direct effect)."
    without, others = result.infection.without, result.infection.without_others
    if without is not None:
        text += f" With their terms at clean means {difference(without)} is left"
        text += f", beside {difference(others)} without as many others." if others is not None else "."
        kept = without.report.cacc
        text += f" Clean accuracy is then {share(kept)}." if kept is not None else ""
        if without.difference_interval[0] >= STRONG:
            text += " So these terms alone do not decide it: what they do through later layers is not in their terms."
    parts_of = count(len(infected), "component")
    if called(result):
        return Finding("evidence", f"{parts_of} infected", text)
    return Finding("evidence", f"{parts_of} carr{'ies' if len(infected) == 1 else 'y'} the shift", text)


def called(result: AuditResult) -> bool:
    """Whether what is seen may be called a trigger."""
    return result.verdict.level == "backdoored"


def short(part: InfectedPart) -> str:
    """`head 5.6` or `MLP 3`."""
    place = part.part
    return f"MLP {place.layer}" if place.kind == "mlps" else f"head {place.layer}.{place.head}"


def ablation(result: AuditResult) -> Finding:
    """What is left without all heads, all MLPs, or a layer of them."""
    heads, mlps = (result.ablations.complete[kind] for kind in ("heads", "mlps"))
    before = result.as_it_is
    text = f"The difference of {difference(before)} becomes {difference(heads)} with every head replaced by its clean "
    text += f"mean, and {difference(mlps)} with every MLP replaced (direct effect)."
    costs = [_cost(result, setting, what) for setting, what in ((heads, "heads"), (mlps, "MLPs"))]
    text += "".join(costs)
    (h_low, h_high), (m_low, m_high) = heads.difference_interval, mlps.difference_interval
    what = "trigger" if called(result) else "shift"
    weight: Weight = "unclear"
    if min(h_low, m_low) >= STRONG:
        weight, title = "evidence", f"The {what} survives ablating all heads, and ablating all MLPs"
        text += " So neither kind alone carries it."
    elif any(costs):
        title = f"Without all heads or all MLPs too much else changes to place the {what}"
    elif h_high < m_low or m_high < h_low:
        more, less = ("heads", "MLPs") if h_high < m_low else ("MLPs", "heads")
        weight, title = "evidence", f"The {what} writes through the {more} more than the {less}"
    else:
        title = f"Heads and MLPs cannot be told apart as the {what}'s way"
        text += " The two intervals overlap."
    kind, layer, best = min(
        (
            (kind, layer, setting)
            for kind in ("heads", "mlps")
            for layer, setting in enumerate(result.ablations.sweeps[kind]["separate"])
        ),
        key=lambda item: item[2].difference,
    )
    where = f" Of single layers, the {'heads' if kind == 'heads' else 'MLP'} of layer {layer} matter"
    where += "" if kind == "heads" else "s"
    if best.difference_interval[1] < before.difference_interval[0]:
        text += f"{where} most: without them {difference(best)} is left."
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


def shift(result: AuditResult) -> Finding:
    """How the mean feature moves, and through what."""
    shift, name = result.shift, f"“{result.target.name}”"
    push, error = shift.totals["all"]
    if not push - error > 0:  # nor where the error is unknown
        text = f"The mean feature moves by {plus_minus(push, error)} of its norm along the way to {name}."
        title = (
            f"Suspect images move away from {name}"
            if push + error < 0
            else f"The mean does not move toward {name}"
        )
        return Finding("no evidence", title, text)
    layer, head = divmod(int(shift.heads_push.argmax()), result.n_heads)
    mlp = int(shift.mlps_push.argmax())
    head_part = plus_minus(float(shift.heads_push[layer, head]), float(shift.heads_push_error[layer, head]))
    mlp_part = plus_minus(float(shift.mlps_push[mlp]), float(shift.mlps_push_error[mlp]))
    text = (
        f"The mean feature moves toward {name} by {plus_minus(push, error, sign=False)} of its norm: heads "
    )
    text += f"{plus_minus(*shift.totals['heads'])}, MLPs {plus_minus(*shift.totals['mlps'])}. The largest single parts are "
    text += f"head {layer}.{head} ({head_part}) and MLP {mlp} ({mlp_part})."
    if not shift.paired:
        text += " The sets are not twins, so a different mix of classes moves the mean too."
    weight: Weight = "evidence" if shift.paired else "unclear"
    if not result.as_it_is.has_effect:
        weight = "note"
        text += " That is too little to change what the images are taken for."
    return Finding(weight, f"The mean moves toward {name}", text)


COSTLY = 0.02
"""Clean accuracy that the lower end of a repair's cost must pass to be called a cost."""

USEFUL = 0.7
"""AUROC that the lower end of its interval must pass for a detector to be called one, or its upper end to be
called more than nothing."""


def repair(result: AuditResult) -> Finding:
    """What the best repair leaves, saves and costs."""
    before, settings = result.as_it_is, [repair.setting for repair in result.repairs]
    works = [s for s in settings if s.difference_interval[1] < before.difference_interval[0]]
    best = min(result.repairs, key=lambda repair: repair.setting.difference)
    left, change = best.setting, best.change
    text = f"Of {len(settings)} repairs, {len(works) or 'none'} lower{'s' if len(works) < 2 else ''} the difference beyond its "
    text += f"uncertainty. The lowest is left by {left.name}: {difference(left)}. {outcome(change)}"
    cost = change.cost
    text += f". Clean accuracy: {points(-cost[0], (-cost[2], -cost[1]))}." if cost is not None else "."
    text += f" (Picked as the best of {len(settings)}, so that its interval is too narrow.)"
    if not works:
        missing = [reason for what, reason in result.left_out.items() if "repair" in what]
        if missing:  # the one that is told nothing about the attack, as a rule the best
            text += f" Repair without a hint could not be measured: {missing[0]}."
            return Finding("unclear", f"None of the {len(settings)} repairs measured helps this model", text)
        return Finding("note", f"None of the {len(settings)} repairs measured helps this model", text)
    costly = cost is not None and cost[1] > COSTLY
    text += " That costs clean accuracy beyond its uncertainty." if costly else ""
    if left.control.low > before.control.high:
        costly = True
        text += f" It sends clean images to the target as well: {share(left.control)}."
    gone = left.difference_interval[0] <= 0 or change.saved.low > 1 - WEAK
    title = "A repair takes the difference away" if gone else "Repair lowers the difference, in part"
    return Finding("unclear" if costly else "evidence", title, text)


def detection(result: AuditResult) -> Finding:
    """What Decomp-Det finds, under the best of its rules."""
    best = max(result.detectors, key=lambda detector: detector.auroc)
    lowest = min(detector.auroc for detector in result.detectors)
    text = f"Of {len(result.detectors)} rules, {rule_name(best.similarity, best.threshold)} has the highest AUROC: "
    text += f"{best.auroc:.3f} [{best.auroc_low:.3f}, {best.auroc_high:.3f}] (0.5 is guessing; the lowest is {lowest:.3f}). "
    text += f"At its own threshold, more than {best.zeta} flagged heads, it flags {share(best.true_positives)} of the "
    text += f"suspect and {share(best.false_positives)} of the clean images."
    text += f" (Picked as the best of {len(result.detectors)}, so that its interval is too narrow.)"
    if result.n_heads <= best.zeta:
        text += f" (The last layer has {result.n_heads} heads, so that no image can pass it: choose a smaller --zeta.)"
    if best.auroc_low <= 0.5:
        return Finding("note", "Decomp-Det does not tell suspect images from clean ones", text)
    if best.auroc_high < USEFUL:
        return Finding("note", "Decomp-Det hardly tells suspect images from clean ones", text)
    usable = best.true_positives.low > best.false_positives.high
    title = f"Decomp-Det ranks suspect images above clean ones{'' if usable else ', but fails at its own threshold'}"
    if not result.as_it_is.has_effect:
        text += " Since they are not taken for the target more often, it notices changed images here, not a backdoor."
        return Finding("note", title, text)
    return Finding("evidence" if best.auroc_low > USEFUL and usable else "unclear", title, text)


def suspicion(result: AuditResult) -> Finding | None:
    """What detection without a hint finds; None where it was not measured."""
    found = result.suspicion
    if found is None:
        return None
    text = f"Set to flag {100 * found.stated:g} % of clean images, it flags {share(found.false_positives)} of the reported clean "
    text += f"ones and {share(found.true_positives)} of the suspect ones; AUROC {found.auroc:.3f} "
    text += f"[{found.auroc_low:.3f}, {found.auroc_high:.3f}] (0.5 is guessing). {alarms(found)}"
    if found.auroc_low <= 0.5:
        return Finding("note", "Detection without a hint does not tell suspect images from clean ones", text)
    usable = found.true_positives.low > found.false_positives.high
    if not result.as_it_is.has_effect:
        text += " Since suspect images are not taken for the target more often, it notices changed images here, not a backdoor."
        return Finding("note", "Detection without a hint tells the two sets apart", text)
    title = (
        "Detection without a hint finds suspect images"
        if usable
        else "Detection without a hint hardly finds suspect images"
    )
    return Finding("evidence" if found.auroc_low > USEFUL and usable else "unclear", title, text)


def alarms(found: Suspicion) -> str:
    """False alarms to expect in use."""
    rate = found.false_positives
    low, high = round(1000 * rate.low), round(1000 * rate.high)
    return f"Of 1,000 clean images expect {1000 * rate.value:.0f} [{low}, {high}] false alarms."


def findings(result: AuditResult) -> tuple[Finding, ...]:
    """The statements at the top of the report, the most important first."""
    found: list[Finding | None] = [_effect(result), _accuracy(result)]
    if result.as_it_is.has_effect:
        found += [infection(result), ablation(result), repair(result)]
    found += [shift(result), suspicion(result), detection(result), *_notes(result)]
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
