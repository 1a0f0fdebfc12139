"""What repairs and detectors came to, in plain words."""

from __future__ import annotations

from decompclip.audit.finding import Finding
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult, Suspicion
from decompclip.audit.words import WEAK, difference, outcome, points, share

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
