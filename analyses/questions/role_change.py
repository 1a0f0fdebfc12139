"""Change of role: do infected heads say something else on triggered images, and MLPs the same as before?

Paper:     He et al. (2025), Finding 3, Figures 3 and 4, by eye (its second limitation).
Command:   python -m analyses.role_change --model-family shapes
Run time:  about 10 minutes, one thread.
Expected:  texts of infected MLPs, the late ones, and of many infected heads change; some heads keep their roles.
Writes:    analyses/results/FAMILY/role_change.json, role_change.png

TEXTSPAN describes each last-layer head and each of the last five MLPs on images without and with the trigger; measured is
how near the two sets of texts are (mean cosine to the nearest of the other set, pool's mean taken off), and what share of the
triggered terms' variance the clean texts' span explains. Beside them, as a control, two halves of the clean images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import by_attack, markdown, mean, mean_point, over_models, spread
from analyses.study.words import late, words
from decompclip.figures.scatter import Panel, Point, point_panels
from decompclip.operators.roles import role_change

TITLE = "Change of role: what heads and MLPs say about triggered images"

KINDS = {"heads": "last layer's heads", "mlps": "last five MLPs"}
MEASURES = ("similarity", "explained")

KEPT, CHANGED = 0.05, 0.2
"""Similarity lost against halves of clean images: of a head that keeps its role at most, of one that changes it at least."""


@dataclass(frozen=True)
class Config:
    images: int = 1_000
    seed: int = 0
    n_texts: int = 10
    draws: int = 200


def measure(case: Case, config: Config) -> list[dict[str, Any]]:
    """One row a component: both measures for paired images and for halves of clean images."""
    found = words(case, late(case.terms("clean", "centred").n_layers), n_texts=config.n_texts)
    rows = []
    for before, after, first, second in zip(
        found.clean, found.triggered, found.first, found.second, strict=True
    ):
        options = {"pool": found.pool.features, "draws": config.draws, "seed": config.seed}
        paired, halves = role_change(before, after, **options), role_change(first, second, **options)
        part = before.part
        terms = {
            name: d.heads[:, part.layer, part.head] if part.kind == "heads" else d.mlps[:, part.layer]
            for name, d in found.sets.items()
        }
        rows.append(
            {
                "kind": part.kind,
                "layer": part.layer,
                "head": part.head,
                "similarity": round(paired.similarity.value, 4),
                "chance": paired.similarity.chance,
                "similarity_halves": round(halves.similarity.value, 4),
                "explained": round(_share(before.directions, terms["triggered"]), 4),
                "explained_halves": round(_share(first.directions, terms["second"]), 4),
                "shared": len(paired.shared),
            }
        )
    return rows


def _share(directions: Any, terms: Any) -> float:
    """Of the terms' variance about their mean, in the span of orthonormal directions."""
    centred = (terms - terms.mean(0)).double()
    inside = centred @ directions.to(centred).T
    return float(inside.square().sum() / centred.square().sum().clamp_min(1e-30))


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return family.measured(members, config, measure)


def change(rows: list[dict[str, Any]], kind: str, key: str) -> float:
    """By how much paired images are less alike than halves of the clean images, mean over components."""
    return mean(row[f"{key}_halves"] - row[key] for row in rows if row["kind"] == kind)


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    attacks, models = by_attack(record), record["found"]["models"]
    rows = [f"{attack} ({record['models'][names[0]]['kind']})" for attack, names in attacks.items()]
    titles = {"similarity": "similarity of texts lost", "explained": "explained variance lost"}
    panels = []
    for key, title in titles.items():
        series = {}
        for kind, label in KINDS.items():
            points = []
            for names in attacks.values():
                values = [change(models[name], kind, key) for name in names]
                points.append(
                    Point(mean(values), min(values), max(values)) if len(values) > 1 else Point(values[0])
                )
            series[label] = points
        panels.append(Panel(title, "halves of clean images less paired images", series, line=0.0))
    return {"change": point_panels(rows, panels, bars="range over models")}


def table(record: Mapping[str, Any]) -> str:
    head = ["attack", "trigger"]
    for label in KINDS.values():
        head += [
            f"{label}: similarity, paired images",
            "halves",
            "explained, paired images",
            "halves",
            "texts shared",
        ]
    rows = [head]
    models = record["found"]["models"]
    for attack, names in by_attack(record).items():
        cells = [attack, record["models"][names[0]]["kind"]]
        for kind in KINDS:
            parts = [row for name in names for row in models[name] if row["kind"] == kind]
            for key in MEASURES:
                cells += [f"{mean(row[k] for row in parts):.2f}" for k in (key, f"{key}_halves")]
            cells.append(f"{mean(row['shared'] for row in parts):.1f} of {record['config']['n_texts']}")
        rows.append(cells)
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    models = record["found"]["models"]

    lost_by = {
        (kind, key): [change(rows, kind, key) for rows in models.values()]
        for kind in KINDS
        for key in MEASURES
    }
    said = {of: over_models(values, 2) for of, values in lost_by.items()}
    least = mean_point(lost_by["mlps", "similarity"]).low
    gap = over_models(
        (a - b for a, b in zip(lost_by["heads", "similarity"], lost_by["mlps", "similarity"], strict=True)), 2
    )
    lost = [
        r["similarity_halves"] - r["similarity"]
        for rows in models.values()
        for r in rows
        if r["kind"] == "heads"
    ]
    kept, changed = sum(x <= KEPT for x in lost), sum(x > CHANGED for x in lost)
    shows = least is not None and least > 0 and min(kept, changed) >= 0.1 * len(lost)
    return (
        f"Against halves of clean images, texts of triggered images lose {said['heads', 'similarity']} of similarity in the last layer's heads and "
        f"{said['mlps', 'similarity']} in the last five MLPs ({spread(len(models))}); heads change by "
        f"{gap} more than MLPs. {kept} of {len(lost)} heads keep their role (lose {KEPT} at most), {changed} change it (lose more than "
        f"{CHANGED}). That late MLPs' texts change while some heads keep their roles and others do not, Finding 3, "
        f"{'shows' if shows else 'does not show'} in this measure. Explained variance falls by "
        f"{said['heads', 'explained']} and {said['mlps', 'explained']}. The pool of texts, and how many are picked, could "
        "change the sizes; two halves of the same images show how far."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
