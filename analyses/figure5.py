"""Figure 5: similarity of last-layer heads to their prototypes, clean and triggered.

Paper:     He et al. (2025), Figure 5 and section 4: densities, head by head; triggered heads lie lower.
Command:   python -m analyses.figure5 --model-family shapes
Run time:  about 2 minutes, one thread.
Expected:  infected heads of triggered images are far from their prototypes, the others like clean ones.
Writes:    analyses/results/FAMILY/figure5.json, figure5-ATTACK.png

Similarity is the code's dot product of unit terms (`--similarity dot`) or the text's cosine. For each head stands the AUROC of
"less similar to the prototype" in telling triggered images from clean ones. Prototypes are of other clean images.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import gaussian_kde

from analyses.bundled_models import markdown
from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import by_attack, mean
from decompclip.defenses.selector import Selector
from decompclip.evaluation.metrics import auroc
from decompclip.figures.lines import Curve, LinePanel, line_panels

TITLE = "Figure 5: similarity of heads to their prototypes"

POINTS = 80


@dataclass(frozen=True)
class Config:
    """`draw` names attacks whose densities are kept and drawn; those of a family that it has not are passed over."""

    images: int = 1_000
    seed: int = 0
    similarity: str = "cosine"
    draw: tuple[str, ...] = ("BadNet", "Blended")
    heads: int = 12


def measure(case: Case, config: Config) -> dict[str, Any]:
    """AUROC of every last-layer head, and densities on a grid of those drawn."""
    selector = Selector(similarity=config.similarity, convention="paper").fit(case.terms("fit"))  # pyright: ignore[reportArgumentType]
    clean, triggered = (
        selector.similarities(case.terms(part))[case.others][:, -1].double()
        for part in ("clean", "triggered")
    )
    areas = [auroc(-clean[:, head], -triggered[:, head]) for head in range(clean.shape[1])]
    found: dict[str, Any] = {"auroc": areas, "threshold": selector.thresholds_[-1].tolist()}
    if case.member.attack in config.draw and case.member.seed == 0:
        found["densities"] = [
            _density(clean[:, head], triggered[:, head]) for head in range(min(clean.shape[1], config.heads))
        ]
    return found


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
    return {
        "models": {
            member.name: measure(family.case(member, images=config.images, seed=config.seed), config)
            for member in members
        }
    }


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    unit = f"{record['config']['similarity']} similarity"
    figures = {}
    for name, found in record["found"]["models"].items():
        if "densities" not in found:
            continue
        attack = record["models"][name]["attack"]
        panels = [
            LinePanel(
                f"head {head}, AUROC {found['auroc'][head]:.2f}",
                unit if head >= len(found["densities"]) - 4 else "",
                "density",
                {part: Curve(kde["x"], kde[part]) for part in ("clean", "triggered")},
                ends=(0.0, 1.06 * max(*kde["clean"], *kde["triggered"], 1e-9)),
            )
            for head, kde in enumerate(found["densities"])
        ]
        figures[re.sub(r"\W+", "-", attack.lower())] = line_panels(
            panels, columns=4, row_height=130, shared_y=False
        )
    return figures


def table(record: Mapping[str, Any]) -> str:
    models = record["found"]["models"]
    rows = [
        [
            "attack",
            "trigger",
            "AUROC of the best head, mean over seeds",
            "of the median head",
            "heads above 0.8",
        ]
    ]
    for attack, names in by_attack(record).items():
        areas = [sorted(models[name]["auroc"]) for name in names]
        n = len(areas[0])
        rows.append(
            [
                attack,
                record["models"][names[0]]["kind"],
                f"{mean(a[-1] for a in areas):.3f}",
                f"{mean(map(statistics.median, areas)):.3f}",
                f"{mean(sum(x > 0.8 for x in a) for a in areas):.1f} of {n}",
            ]
        )
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    facts, models = record["models"], record["found"]["models"]
    parts = []
    for extent in ("local", "global"):
        areas = [m["auroc"] for name, m in models.items() if facts[name]["kind"].startswith(extent)]
        if areas:
            parts.append(
                f"of {extent} triggers the best head tells triggered from clean images at AUROC {mean(max(a) for a in areas):.2f}, "
                f"{mean(sum(x > 0.8 for x in a) for a in areas):.1f} of {len(areas[0])} heads above 0.8, "
                f"{mean(sum(x < 0.5 for x in a) for a in areas):.1f} on the wrong side of 0.5"
            )
    return (
        f"Similarity to prototypes ({record['config']['similarity']}): {'; '.join(parts)}. A head below 0.5 lies nearer to its prototype "
        "in triggered images: counting far heads then misleads. Other target classes could move other heads."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
