"""What an audit's numbers say, in plain words: every sentence follows from the numbers and their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult, Setting
from decompclip.evaluation.intervals import Rate

Weight = Literal["evidence", "no evidence", "unclear", "note"]

STRONG, WEAK = 0.5, 0.1
"""Differences (of shares) that the lower end of an interval must pass to be called large, or more than small."""

FAVOURED = 0.25
"""Clean images that an intervention may send to the target before little room is left for a difference."""

USEFUL = 0.7
"""AUROC that the lower end of its interval must pass for a detector to be called one, or its upper end to be
called more than nothing."""

WEAK_BOUND = 0.1
"""The most that the upper end of a difference's interval may be where the absence of an effect is spoken of."""

FEW = 100
"""Images below which a set is called small."""


@dataclass(frozen=True)
class Finding:
    """One statement, how much it weighs, and the sentence of it."""

    weight: Weight
    title: str
    text: str


def findings(result: AuditResult) -> tuple[Finding, ...]:
    """The statements at the top of the report, the most important first."""
    found = [_effect(result), _accuracy(result)]
    if _has_effect(result):
        found += [_ablation(result), _repair(result)]
    found += [_shift(result), _detection(result), *_notes(result)]
    return tuple(found)


def _has_effect(result: AuditResult) -> bool:
    return result.as_it_is.difference_interval[0] > 0


def share(rate: Rate) -> str:
    """A share with its interval, in words of the report."""
    if not rate.total:
        return "not measurable (no images)"
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def points(value: float, interval: tuple[float, float]) -> str:
    """A difference of shares with its interval, in percentage points."""
    low, high = interval
    return f"{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def difference(setting: Setting) -> str:
    return points(setting.difference, setting.difference_interval)


def _effect(result: AuditResult) -> Finding:
    setting, name = result.as_it_is, f"“{result.target.name}”"
    low, high = setting.difference_interval
    whose = f" of other classes than {name}" if setting.excludes_target else ""
    numbers = (
        f"Of the suspect images{whose}, {share(setting.success)} are taken for {name}; of the clean ones "
        f"{share(setting.control)}. Difference: {difference(setting)}."
    )
    if low > 0:
        size = "Strong" if low >= STRONG else "Some" if low >= WEAK else "Weak"
        why = (
            " Both sets hold the same images but for what was done to the suspect ones, so that is the cause."
            if result.twins
            else " A backdoor does this; so does a suspect set whose images look more like that class."
        )
        small = (
            ""
            if low >= WEAK
            else " The effect is small: a change to the images can also do this in a clean model."
        )
        return Finding("evidence", f"{size} evidence of a trigger toward {name}", numbers + why + small)
    if high < 0:
        return Finding("no evidence", f"Suspect images avoid {name}", numbers)
    if high > WEAK_BOUND:
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
    text = f"Zero-shot accuracy on clean images is {share(cacc)}; guessing among {n} classes gives {100 / n:.1f} %."
    if cacc.low <= result.chance:
        text += " That is no better than guessing can be: check the model, its activation and the class names first."
        return Finding("unclear", "The model may not know these classes", text)
    return Finding("note", "Clean accuracy", text)


def _ablation(result: AuditResult) -> Finding:
    heads, mlps = (result.ablations.complete[kind] for kind in ("heads", "mlps"))
    before = result.as_it_is
    text = f"The difference of {difference(before)} becomes {difference(heads)} with every head replaced by its clean "
    text += f"mean, and {difference(mlps)} with every MLP replaced (direct effect)."
    costs = [_cost(result, setting, what) for setting, what in ((heads, "heads"), (mlps, "MLPs"))]
    text += "".join(costs)
    (h_low, h_high), (m_low, m_high) = heads.difference_interval, mlps.difference_interval
    weight: Weight = "unclear"
    if min(h_low, m_low) >= STRONG:
        weight, title = "evidence", "The trigger survives ablating all heads, and ablating all MLPs"
        text += " So neither kind alone carries it."
    elif any(costs):
        title = "Without all heads or all MLPs too much else changes to place the trigger"
    elif h_high < m_low or m_high < h_low:
        more, less = ("heads", "MLPs") if h_high < m_low else ("MLPs", "heads")
        weight, title = "evidence", f"The trigger writes through the {more} more than the {less}"
    else:
        title = "Heads and MLPs cannot be told apart as the trigger's way"
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


def _repair(result: AuditResult) -> Finding:
    before, settings = result.as_it_is, [repair.setting for repair in result.repairs]
    works = [s for s in settings if s.difference_interval[1] < before.difference_interval[0]]
    best = min(settings, key=lambda setting: setting.difference)
    kept = best.report.cacc
    text = f"Of {len(settings)} rules, {len(works) or 'none'} lower{'s' if len(works) < 2 else ''} the difference beyond its "
    text += f"uncertainty. The lowest is left by {best.name}: {difference(best)}, attack success {share(best.success)}"
    text += f", clean accuracy {share(kept)}." if kept is not None else "."
    text += f" (Picked as the best of {len(settings)}, so that its interval is too narrow.)"
    if not works:
        return Finding("note", "Decomp-Rep does not repair this model", text)
    before_cacc = before.report.cacc
    costly = kept is not None and before_cacc is not None and kept.high < before_cacc.low
    text += " That costs clean accuracy beyond its uncertainty." if costly else ""
    if best.control.low > before.control.high:
        costly = True
        text += f" It sends clean images to the target as well: {share(best.control)}."
    gone = best.difference_interval[0] <= 0
    title = "Decomp-Rep takes the difference away" if gone else "Decomp-Rep lowers the difference, in part"
    return Finding("unclear" if costly else "evidence", title, text)


def plus_minus(value: float, error: float, *, sign: bool = True) -> str:
    """A number with the half-width of its 95 % interval."""
    known = "unknown" if math.isnan(error) else f"{error:.4f}"
    return f"{value:{'+' if sign else ''}.4f} ± {known}".replace("-", "−")


def _shift(result: AuditResult) -> Finding:
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
    if not _has_effect(result):
        weight = "note"
        text += " That is too little to change what the images are taken for."
    return Finding(weight, f"The mean moves toward {name}", text)


def _detection(result: AuditResult) -> Finding:
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
    if not _has_effect(result):
        text += " Since they are not taken for the target more often, it notices changed images here, not a backdoor."
        return Finding("note", title, text)
    return Finding("evidence" if best.auroc_low > USEFUL and usable else "unclear", title, text)


def _notes(result: AuditResult) -> Iterator[Finding]:
    target, counts = result.target, result.counts
    if target.inferred and target.over_prediction is not None:
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
