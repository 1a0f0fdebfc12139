"""Figure 5: similarity of last-layer heads to their prototypes, clean and triggered.

Paper:     He et al. (2025), Figure 5 and section 4: densities, head by head; triggered heads lie lower.
Command:   python -m analyses.figure5 --model-family shapes
Run time:  about 2 minutes, one thread.
Expected:  infected heads of triggered images are far from their prototypes, the others like clean ones.
Writes:    analyses/results/FAMILY/figure5.json, figure5-ATTACK-SIMILARITY.png

Similarity is the text's cosine and the code's dot product. For each head stand the AUROC of "less similar to the prototype" in telling
triggered images from clean ones, and the overlap of the two densities (1 where they are the same). Prototypes are of other clean images.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import gaussian_kde

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import by_attack, markdown, mean
from decompclip.defenses.selector import Selector, Similarity
from decompclip.evaluation.metrics import auroc
from decompclip.figures.curves import Curve, LinePanel, line_panels

TITLE = "Figure 5: similarity of heads to their prototypes"

POINTS = 80


@dataclass(frozen=True)
class Config:
    """`draw` names attacks whose densities are kept and drawn; those of a family that it has not are passed over."""

    images: int = 1_000
    seed: int = 0
    similarities: tuple[Similarity, ...] = ("cosine", "dot")
    draw: tuple[str, ...] = ("BadNet", "Blended")
    heads: int = 12


def measure(case: Case, config: Config) -> dict[str, Any]:
    """Of each similarity AUROC and overlap of every last-layer head, and densities on a grid of those drawn."""
    return {similarity: _measure(case, config, similarity) for similarity in config.similarities}


def _measure(case: Case, config: Config, similarity: Similarity) -> dict[str, Any]:
    selector = Selector(similarity=similarity, convention="paper").fit(case.terms("fit"))
    clean, triggered = (
        selector.similarities(case.terms(part))[case.others][:, -1].double()
        for part in ("clean", "triggered")
    )
    heads = range(clean.shape[1])
    densities = [_density(clean[:, head], triggered[:, head]) for head in heads]
    found: dict[str, Any] = {
        "auroc": [round(auroc(-clean[:, head], -triggered[:, head]), 5) for head in heads],
        "overlap": [round(_overlap(density), 4) for density in densities],
        "threshold": selector.thresholds_[-1].tolist(),
    }
    if case.member.attack in config.draw and case.member.seed == 0:
        found["densities"] = densities[: config.heads]
    return found


def _overlap(density: Mapping[str, list[float]]) -> float:
    """Area under both curves at once, each brought to an area of 1 on the grid."""
    clean, triggered = (np.array(density[name]) for name in ("clean", "triggered"))
    return float(np.minimum(clean / max(clean.sum(), 1e-30), triggered / max(triggered.sum(), 1e-30)).sum())


def _density(clean: torch.Tensor, triggered: torch.Tensor) -> dict[str, list[float]]:
    both = np.concatenate([clean.numpy(), triggered.numpy()])
    low, high = np.quantile(both, [0.002, 0.998])
    margin = 0.1 * max(high - low, 1e-9)
    x = np.linspace(low - margin, high + margin, POINTS)
    found = {"x": x}
    for name, values in (("clean", clean.numpy()), ("triggered", triggered.numpy())):
        spread = values.std() > 1e-9
        found[name] = gaussian_kde(values)(x) if spread else np.zeros(POINTS)
    return {name: [float(f"{v:.4g}") for v in values] for name, values in found.items()}


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return family.measured(members, config, measure)


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    figures = {}
    for name, found in record["found"]["models"].items():
        for similarity, of in found.items():
            if "densities" in of:
                attack = re.sub(r"\W+", "-", record["models"][name]["attack"].lower())
                figures[f"{attack}-{similarity}"] = _panels(of, *UNITS[similarity])
    return figures


UNITS = {"cosine": ("cosine similarity", 1.0, 1.0), "dot": ("dot product × 1000", 1000.0, math.inf)}
"""Unit, what it multiplies, and the largest value there is: an estimate of a density spreads past it."""


def _panels(found: Mapping[str, Any], unit: str, scale: float, most: float) -> Any:
    panels = [
        LinePanel(
            f"last layer, head {head}<br>AUROC {found['auroc'][head]:.2f}, overlap {found['overlap'][head]:.2f}",
            unit if head >= len(found["densities"]) - 4 else "",
            "density" if head % 4 == 0 else "",
            {
                part: Curve(
                    [scale * x for x in shown],
                    [y / scale for x, y in zip(kde["x"], kde[part], strict=True) if x in shown],
                )
                for part in ("clean", "triggered")
            },
            ends=(0.0, 1.06 * max(*kde["clean"], *kde["triggered"], 1e-9) / scale),
        )
        for head, kde in enumerate(found["densities"])
        for shown in [[x for x in kde["x"] if abs(x) <= most]]
    ]
    return line_panels(panels, columns=4, row_height=130, shared_y=False)


def table(record: Mapping[str, Any]) -> str:
    models = record["found"]["models"]
    rows = [
        [
            "attack",
            "trigger",
            "similarity",
            "AUROC of the best head",
            "of the median head",
            "heads above 0.8",
            "mean overlap",
        ]
    ]
    for attack, names in by_attack(record).items():
        for similarity in record["config"]["similarities"]:
            found = [models[name][similarity] for name in names]
            areas = [sorted(of["auroc"]) for of in found]
            rows.append(
                [
                    attack,
                    record["models"][names[0]]["kind"],
                    similarity,
                    f"{mean(a[-1] for a in areas):.3f}",
                    f"{mean(map(statistics.median, areas)):.3f}",
                    f"{mean(sum(x > 0.8 for x in a) for a in areas):.1f} of {len(areas[0])}",
                    f"{mean(mean(of['overlap']) for of in found):.2f}",
                ]
            )
    return f"{markdown(rows)}\n\nMeans over seeds."


def finding(record: Mapping[str, Any]) -> str:
    facts, models = record["models"], record["found"]["models"]
    parts = []
    for extent in ("local", "global"):
        own = [m for name, m in models.items() if facts[name]["kind"].startswith(extent)]
        for similarity in record["config"]["similarities"] if own else ():
            areas, overlap = (
                [m[similarity]["auroc"] for m in own],
                mean(mean(m[similarity]["overlap"]) for m in own),
            )
            parts.append(
                f"{extent} triggers, {similarity}: best head AUROC {mean(max(a) for a in areas):.2f}, {mean(sum(x > 0.8 for x in a) for a in areas):.1f} of "
                f"{len(areas[0])} heads above 0.8, {mean(sum(x < 0.5 for x in a) for a in areas):.1f} on the wrong side of 0.5, overlap {overlap:.2f}"
            )
    return (
        f"Similarity of heads to their prototypes, triggered against clean images: {'; '.join(parts)}. A head below 0.5 lies nearer to its "
        "prototype in triggered images: counting far heads then misleads. Other target classes could move other heads."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
