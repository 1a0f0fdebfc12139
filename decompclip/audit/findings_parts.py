"""What carries the shift toward the target, in plain words: components, kinds and layers.

It is called a trigger, and components infected, only where the verdict is "backdoored".
"""

from __future__ import annotations

from decompclip.audit.finding import Finding, Weight
from decompclip.audit.infected import InfectedPart
from decompclip.audit.result import AuditResult
from decompclip.audit.scoring import Setting
from decompclip.audit.words import STRONG, count, difference, plus_minus, share

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
