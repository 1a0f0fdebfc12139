"""Designs of detection and repair without a hint, side by side: what was tried before `AgnosticDet` and `AgnosticRep`.

Paper:     our own; the paper's repair must be told whether a trigger is local or global (`table1` and `table5` measure it).
Command:   python -m analyses.attack_agnostic --model-family photos --images 2500
Run time:  about four minutes a twin of photos, 15 seconds of the others, one thread.
Expected:  no single view finds every attack; 10 points of ASR left at 2 points of CACC.
Writes:    analyses/results/FAMILY/attack_agnostic.json, attack_agnostic-detection.png, attack_agnostic-repair.png

Designs were compared on other images while they were made (streams 211 and 212 of the drawn world; photographs that no run of
the leaderboard's first seed sees); here they are measured on images that nothing was chosen on.

Detection: each view of `AgnosticDet` alone; how odd an image is by the three distances together; that and how much was written, told early and
how long the feature is (what was settled on); the largest of all; and the distances of all heads and MLPs, one by one, combined by a Mahalanobis
distance. Repair, all at a clean budget of 1 %, in images that are flagged: without the answer (what was settled on); what two thirds of the layers
let expect; and the heads and MLPs that are flagged themselves, replaced by their means. Last, the strongest patches filled first (`TokenRep`, at 2 %).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.study.case import BATCH, Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.rates import excess, rates_figure
from analyses.study.summary import by_attack, markdown, mean, over_models, spread
from decompclip.decomposition.components import everything
from decompclip.decomposition.decomposition import Decomposition
from decompclip.defenses.agnostic import DISTANCES, VIEWS, AgnosticDet, AgnosticRep
from decompclip.defenses.detectors.token_rep import TokenRep
from decompclip.defenses.distances import ClassDistance, ComponentDistances
from decompclip.defenses.guard import Guard
from decompclip.evaluation.metrics import auroc
from decompclip.figures.scatter import Panel, Point, point_panels
from decompclip.operators.ablation import MeanAblate

TITLE = "Without a hint: designs of detection and repair"

SETTLED = "odd, or loud"
DETECTION = (*VIEWS, "odd", SETTLED, "largest of all", "components")
REPAIRED, BOTH = "without the answer", "patches filled, then without the answer"
REPAIR = ("none", REPAIRED, BOTH, "what two thirds expect", "flagged components")
BUDGET = 0.01


@dataclass(frozen=True)
class Config:
    images: int = 1_000
    seed: int = 0


def scores(
    detector: AgnosticDet, distances: ComponentDistances, fit: Decomposition, d: Decomposition
) -> dict[str, Float[Tensor, " batch"]]:
    """Every design of detection on the same images."""
    views = detector.views(d)
    one = torch.zeros(len(fit), dtype=torch.long)
    joint = ClassDistance.fit(distances.score(fit)[:, None], one, 1)
    return {
        **{name: views[:, place] for place, name in enumerate(VIEWS)},
        "odd": views[:, : len(DISTANCES)].sum(1),
        SETTLED: detector.score(d),
        "largest of all": views.amax(1),
        "components": joint(distances.score(d)[:, None], torch.zeros(len(d), dtype=torch.long))[:, 0],
    }


def repaired(
    repair: AgnosticRep, distances: ComponentDistances, d: Decomposition
) -> Iterator[tuple[str, Decomposition]]:
    """Every design of repair on the same images."""
    yield "none", d
    yield REPAIRED, repair(d)
    flagged, expected = (
        repair.flags(d),
        repair.detector_.expected_.extrapolation(repair.detector_.look(d).before),
    )
    mlps = d.mlps.clone()
    mlps[:, -1] += torch.where(flagged[:, None], expected.to(d.embed) - d.features, 0)
    yield "what two thirds expect", d.edit(mlps=mlps)
    where = distances.flags(d, fpr=BUDGET) & flagged[:, None]
    yield "flagged components", MeanAblate(everything, repair.moments_).on(where)(d)


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    fit, clean, hit = (case.terms(part, "centred") for part in ("fit", "clean", "triggered"))
    repair = AgnosticRep(case.classifier, budget=BUDGET).fit(fit)
    distances = ComponentDistances(case.classifier).fit(fit)
    low, high = (scores(repair.detector_, distances, fit, d[case.others]) for d in (clean, hit))
    found: dict[str, Any] = {
        "auroc": {design: auroc(low[design], high[design]) for design in DETECTION},
        "fpr_at_5": repair.detector_.predict(clean).double().mean().item(),
        "right": {},
    }
    edits = zip(repaired(repair, distances, clean), repaired(repair, distances, hit), strict=True)
    for (design, before), (_, after) in edits:
        answers = [case.answers(d.features) for d in (before, after)]
        found[design] = case.report(*answers).to_dict()
        found["right"][design] = (answers[1] == case.labels)[case.others].double().mean().item()
    guard = Guard(case.model, repair, fill=TokenRep(case.model, case.classifier).fit(case.fit))
    answers = [
        torch.cat(
            [
                case.answers(guard.encode_image(case.model.normalize(x)))
                for x in case.images(part).split(BATCH)
            ]
        )
        for part in ("clean", "triggered")
    ]
    found[BOTH] = case.report(*answers).to_dict()
    found["right"][BOTH] = (answers[1] == case.labels)[case.others].double().mean().item()
    return found


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return {
        "models": {m.name: measure(family.case(m, images=config.images, seed=config.seed)) for m in members}
    }


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    attacks, models = by_attack(record), record["found"]["models"]
    rows = [f"{attack} ({record['models'][names[0]]['kind']})" for attack, names in attacks.items()]
    series = {}
    for design in (*VIEWS, SETTLED):
        values = [[models[n]["auroc"][design] for n in names] for names in attacks.values()]
        series[design] = [Point(mean(v), min(v), max(v)) if len(v) > 1 else Point(v[0]) for v in values]
    panel = Panel(
        "clean images against the same images with the trigger",
        "AUROC (0.5 is chance)",
        series,
        (-0.03, 1.03),
        0.5,
    )
    return {
        "detection": point_panels(rows, [panel], bars="range over models"),
        "repair": rates_figure(record, REPAIR),
    }


def table(record: Mapping[str, Any]) -> str:
    """Means over models, with the least favourable one in brackets."""
    models = record["found"]["models"].values()
    rows = [["detection", "AUROC, mean (worst)"]]
    for design in DETECTION:
        values = [m["auroc"][design] for m in models]
        rows.append([design, f"{mean(values):.3f} ({min(values):.3f})"])
    fixed = [["repair", "ASR, mean (worst)", "CACC, mean (worst)", "right on triggered, mean"]]
    for design in REPAIR:
        asr, cacc = ([100 * m[design][rate]["value"] for m in models] for rate in ("asr", "cacc"))
        right = [100 * m["right"][design] for m in models if design in m["right"]]
        fixed.append(
            [
                design,
                f"{mean(asr):.1f} ({max(asr):.1f})",
                f"{mean(cacc):.1f} ({min(cacc):.1f})",
                f"{mean(right):.1f}" if right else "",
            ]
        )
    return f"{markdown(rows)}\n\n{markdown(fixed)}"


def finding(record: Mapping[str, Any]) -> str:
    models = list(record["found"]["models"].values())
    areas = {design: mean(m["auroc"][design] for m in models) for design in DETECTION}
    best = max(areas, key=areas.__getitem__)
    fpr = [100 * m["fpr_at_5"] for m in models]
    left = {row: over_models(excess(m[row]) for m in models) for row in (REPAIRED, BOTH)}
    cacc = {row: mean(100 * m[row]["cacc"]["value"] for m in models) for row in ("none", REPAIRED, BOTH)}
    right = {row: mean(100 * m["right"][row] for m in models) for row in ("none", REPAIRED, BOTH)}
    return (
        f'Fitted on {record["config"]["images"]} clean images and reported on as many, "{SETTLED}" finds triggered images at a mean AUROC of {areas[SETTLED]:.3f} (worst of {len(models)} models '
        f"{min(m['auroc'][SETTLED] for m in models):.3f}), the best design here is {best} ({areas[best]:.3f}); oddness alone {areas['odd']:.3f}. At a "
        f"stated 5 % it flags {mean(fpr):.1f} % of fresh clean images ({min(fpr):.1f} to {max(fpr):.1f}). Of attack success over its control, in points, repair without a "
        f"hint leaves {left[REPAIRED]} ({spread(len(models))}; worst {max(excess(m[REPAIRED]) for m in models):.1f}) at CACC {cacc[REPAIRED]:.1f}, with the strongest patches filled first {left[BOTH]} at "
        f"{cacc[BOTH]:.1f}; CACC without repair is {cacc['none']:.1f}. Told right are {right['none']:.1f} % of triggered images as they "
        f"are, {right[REPAIRED]:.1f} repaired, {right[BOTH]:.1f} with patches filled first. Attacks that imitate clean features, tell their answer late and write no more "
        "than clean images would change this: none in the zoo does."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
