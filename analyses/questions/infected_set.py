"""Infected set: how many heads and MLPs, of any layer, carry a backdoor together?

Paper:     He et al. (2025), Finding 1, asks for kinds and layers; nobody says that a backdoor keeps to one.
Command:   python -m analyses.infected_set --model-family shapes
Run time:  about 3 minutes, one thread.
Expected:  if a trigger keeps to heads or to MLPs, a mixed set does no better than all of the kind (figure 1).
Writes:    analyses/results/FAMILY/infected_set.json, infected_set.png

Components are ordered by what their terms contribute to the target on triggered images, measured on the images that means are fitted on;
their terms are then replaced by clean means, the strongest 1, 2, 4, ... together, on the reported images (direct effect). Thin lines:
as many components of the same kinds, drawn from the others, mean of five draws. As many others may cost less clean accuracy:
beside the 16 strongest, others of any kind are drawn until they cost as much, five times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from statistics import median_low
from typing import Any

import torch
from torch.nn import functional as F

from analyses.study.case import FRESH, Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import RANGE, by_attack, curve, groups, markdown, mean, over_models, spread
from decompclip.audit.components import as_many, infected_parts, shift
from decompclip.data.pairs import permuted
from decompclip.decomposition.components import Part
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.figures.curves import LinePanel, line_panels
from decompclip.figures.scatter import PERCENT
from decompclip.operators.ablation import MeanAblate

TITLE = "Infected set: how many components carry a backdoor together"
HALF = "half gone at"
REPORTED = 16
"""How many components the sentence and the table report on, and others are matched to."""


@dataclass(frozen=True)
class Config:
    images: int = 1_000
    seed: int = 0
    sizes: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 12, 16, 20, 27)
    draws: int = 5

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] != 0 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"expected rising sizes from 0 on; received {self.sizes}")
        if self.draws < 1:
            raise ValueError(f"expected at least 1 draw; received {self.draws}")


@torch.no_grad()
def ordered(case: Case) -> list[Part]:
    """Components by their contribution to the target, the strongest first, on the images to fit on."""
    clean = case.terms("fit")
    triggered = case.member.trigger(case.fit, FRESH + torch.arange(len(case.fit)))
    terms = Decomposition.cat(
        [
            case.model.decompose(case.model.normalize(x), convention="paper", normalize=True)
            for x in triggered.split(250)
        ]
    )
    others = torch.arange(len(case.class_names)) != case.target
    toward = F.normalize(case.classifier[case.target] - case.classifier[others].mean(0), dim=0)
    return [found.part for found in infected_parts(shift(clean, terms, toward, paired=True), affected=True)]


def reported(sizes: Sequence[int]) -> int:
    """The place of `REPORTED` among the sizes; the last where it is none of them."""
    return sizes.index(REPORTED) if REPORTED in sizes else len(sizes) - 1


def as_costly(
    rates: Callable[[list[Part]], dict[str, float]], others: list[Part], cacc: float
) -> dict[str, float]:
    """Rates in % without the first of the others, as many as bring clean accuracy down to `cacc`, in %, or below; all, where no number does.

    Accuracy need not fall with each: of several such numbers bisection finds one.
    """
    few, many = -1, len(others)  # `few` are too few
    while few + 1 < many:
        middle = (few + many) // 2
        few, many = (middle, many) if rates(others[:middle])["cacc"] > cacc else (few, middle)
    found = rates(others[:many])
    return found | {"components": many, "all_cost_less": float(found["cacc"] > cacc)}


def measure(case: Case, config: Config) -> dict[str, Any]:
    """Rates in % without the strongest, without as many others, and without others that cost as much clean accuracy."""
    order, moments = ordered(case), Moments.of(case.terms("fit"), second=False)

    def without(parts: list[Part]) -> dict[str, float]:
        edit = MeanAblate(reduce(or_, parts), moments) if parts else None
        report = case.report_of(edit)
        return {key: round(100 * report[key]["value"], 3) for key in ("asr", "control", "cacc")}

    sizes = [size for size in config.sizes if size <= len(order)]
    drawn = [
        [without(as_many(order[:size], order[size:], config.seed + draw)) for draw in range(config.draws)]
        for size in sizes
    ]
    strongest, at = [without(order[:size]) for size in sizes], reported(sizes)
    rest = order[sizes[at] :]
    costly = [
        as_costly(
            without,
            [rest[i] for i in permuted(len(rest), config.seed + draw)],
            strongest[at]["cacc"],
        )
        for draw in range(config.draws if rest else 0)
    ]
    return {
        "order": [str(part) for part in order[: max(sizes)]],
        "components": len(order),
        "strongest": strongest,
        "others": [_mean(draws) for draws in drawn],
        "as_costly": _mean(costly) if costly else None,
    }


def _mean(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(mean(d[key] for d in draws), 3) for key in draws[0]}


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return family.measured(members, config, measure)


def left_of(rates: Mapping[str, float]) -> float:
    """Attack success less its control, in points."""
    return rates["asr"] - rates["control"]


def excesses(model: Mapping[str, Any], kind: str) -> list[float]:
    """`left_of`, size by size."""
    return [left_of(step) for step in model[kind]]


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    models, panels = record["found"]["models"], []
    for title, unit, of in (
        ("attack success less control", "points", excesses),
        ("clean accuracy", "images, %", lambda model, kind: [step["cacc"] for step in model[kind]]),
    ):
        curves = {}
        for group, names in groups(record).items():
            values, thin = ([of(models[name], kind) for name in names] for kind in ("strongest", "others"))
            curves[group] = curve(record["config"]["sizes"][: len(values[0])], values, thin)
        panels.append(LinePanel(title, "components mean-ablated", unit, curves, ends=PERCENT))
    return {
        "sizes": line_panels(
            panels,
            columns=2,
            row_height=260,
            shared_y=False,
            bands=RANGE,
            thin="as many others of the same kinds",
        )
    }


def half(model: Mapping[str, Any], sizes: list[int]) -> int | None:
    """The least size measured without which no more than half of the excess is left."""
    left = excesses(model, "strongest")
    return next((size for size, value in zip(sizes, left, strict=False) if value <= left[0] / 2), None)


def table(record: Mapping[str, Any]) -> str:
    models, sizes = record["found"]["models"], record["config"]["sizes"]
    shown, at = [size for size in (0, 4, 8, 16, 27) if size in sizes], reported(sizes)
    rows = [
        [
            "attack",
            "trigger",
            *(f"{size} fewer" for size in shown),
            HALF,
            f"CACC at {sizes[at]}",
            f"{sizes[at]} others",
            "others as costly",
            "strongest",
        ]
    ]
    for attack, names in by_attack(record).items():
        own = [models[name] for name in names]
        left = [[excesses(m, "strongest")[sizes.index(size)] for m in own] for size in shown]
        costly = [left_of(m["as_costly"]) for m in own if m["as_costly"]]
        rows.append(
            [
                attack,
                record["models"][names[0]]["kind"],
                *(f"{mean(values):.1f}" for values in left),
                ", ".join(str(half(m, sizes) or "–") for m in own),
                f"{mean(m['strongest'][at]['cacc'] for m in own):.1f}",
                f"{mean(excesses(m, 'others')[at] for m in own):.1f}",
                f"{mean(costly):.1f}" if costly else "–",
                ", ".join(own[0]["order"][:4]),
            ]
        )
    return (
        f"{markdown(rows)}\n\nAttack success less its control, in points, mean over seeds; {HALF}: components, each model; others as costly: "
        "drawn until they cost as much clean accuracy as the strongest, or none is left."
    )


def finding(record: Mapping[str, Any]) -> str:
    named, sizes = record["found"]["models"], record["config"]["sizes"]
    models = list(named.values())
    at = reported(sizes)
    before, after = (over_models(excesses(m, "strongest")[p] for m in models) for p in (0, at))
    others = over_models(excesses(m, "others")[at] for m in models)
    lost, lost_others = (
        mean(m[kind][0]["cacc"] - m[kind][at]["cacc"] for m in models) for kind in ("strongest", "others")
    )
    matched = ""
    if drawn := [m for m in models if m["as_costly"]]:
        costly = [m["as_costly"] for m in drawn]
        lost_costly = mean(m["strongest"][0]["cacc"] - m["as_costly"]["cacc"] for m in drawn)
        all_less = mean(100 * c["all_cost_less"] for c in costly)
        matched = (
            f" Others of any kind were drawn until they cost as much ({mean(c['components'] for c in costly):.0f} components, {lost_costly:.1f} points; in "
            f"{all_less:.0f} % of the draws all of them cost less): without them {over_models(map(left_of, costly))} are left."
        )
    mixed = sum(len({name.split("[")[0] for name in m["order"][: sizes[at]]}) > 1 for m in models)
    gone = []
    for extent in ("local", "global"):
        own = [m for name, m in named.items() if record["models"][name]["kind"].startswith(extent)]
        halves = [found for m in own if (found := half(m, sizes)) is not None]
        if own:
            median = f" (at {median_low(halves)} components, median of those)" if halves else ""
            gone.append(f"in {len(halves)} of {len(own)} models of {extent} triggers{median}")
    return (
        f"Without the {sizes[at]} components of {models[0]['components']} that contribute most, attack success over its control goes from {before} to "
        f"{after} points at {lost:.1f} points of CACC ({spread(len(models))}); without {sizes[at]} others of the same kinds {others} are left, at "
        f"{lost_others:.1f}.{matched} Half of it is gone {' and '.join(gone)}. Those {sizes[at]} hold both heads and MLPs in {mixed} of {len(models)} models: a "
        "backdoor keeps to no kind and no layer here. A larger model, in which heads are specialised, could hold it in fewer."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
