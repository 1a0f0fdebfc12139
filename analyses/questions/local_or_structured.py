"""Local or structured: does it depend on a trigger's extent whether heads or MLPs carry it, or on its structure?

Paper:     He et al. (2025), Finding 1, of local *structured* patches against global *noise*: two things change at once.
Command:   python -m analyses.local_or_structured --model-family shapes
Run time:  about 3 minutes, one thread.
Expected:  if the paper's reading is right, extent decides; structure alone could explain its data too.
Measured:  extent +12.5 points of the contribution, structure -8.2: both count.
Writes:    analyses/results/FAMILY/local_or_structured.json, local_or_structured.png

Four kinds of trigger (local or global, one fixed pattern or noise drawn anew for each image), three seeds of training each.
Measured on each twin: the share of the contribution toward the target that heads make themselves (the rest is MLPs'), and how much more
of the attack is left without MLPs than without heads. Effects are differences of means over the 2 x 2, with 95 % intervals of
Student's t over seeds (pooled variance).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from scipy.stats import t

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.rates import excess
from analyses.study.summary import markdown, mean
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.figures.scatter import Panel, Point, point_panels
from decompclip.operators.ablation import MeanAblate

TITLE = "Local or structured: what decides whether heads or MLPs carry a trigger?"

MEASURES = {
    "share": "share of the contribution toward the target that heads make, %",
    "gap": "attack left without MLPs less without heads, points",
}
EFFECTS = {"extent": "local less global", "structure": "structured less noise", "both": "interaction"}


@dataclass(frozen=True)
class Config:
    images: int = 1_000
    seed: int = 0


def measure(case: Case) -> dict[str, Any]:
    """Contribution of heads and MLPs, layer by layer, and attack success without either."""
    direction = case.classifier[case.target] - case.classifier[
        torch.arange(len(case.classifier)) != case.target
    ].mean(0)
    clean, triggered = (case.terms(part, "centred")[case.others] for part in ("clean", "triggered"))
    contributions = {
        "heads": ((triggered.heads - clean.heads).sum(2) @ direction).mean(0),
        "mlps": ((triggered.mlps - clean.mlps) @ direction).mean(0),
    }
    moments = Moments.of(case.terms("fit", "centred"), second=False)
    left = {
        name: excess(case.report_of(edit, "centred"))
        for name, edit in {
            "as it is": None,
            "heads": MeanAblate(heads, moments),
            "mlps": MeanAblate(mlps, moments),
        }.items()
    }
    total = {kind: float(values.sum()) for kind, values in contributions.items()}
    return {
        "push": {kind: [round(x, 5) for x in values.tolist()] for kind, values in contributions.items()},
        "left": left,
        "share": 100 * total["heads"] / (total["heads"] + total["mlps"]),
        "gap": left["mlps"] - left["heads"],
    }


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    """Raises ValueError: the family has not all four kinds of trigger, two models each."""
    crossed = [m for m in members if m.attack.removesuffix(", noise") in ("BadNet", "Blended")]
    for extent in ("local", "global"):
        for structure in ("structured", "noise"):
            kind = f"{extent}, {structure}"
            if sum(m.kind == kind for m in crossed) < 2:
                raise ValueError(
                    f"expected BadNet and Blended twins of all four kinds, two seeds each; received fewer of {kind!r} in "
                    f"{family.name}; the family `shapes` has them: --model-family shapes"
                )
    return {
        "models": {m.name: measure(family.case(m, images=config.images, seed=config.seed)) for m in crossed}
    }


def cells(record: Mapping[str, Any], key: str) -> dict[tuple[str, str], list[float]]:
    """Values by extent and structure."""
    found: dict[tuple[str, str], list[float]] = {}
    for name, model in record["found"]["models"].items():
        extent, structure = record["models"][name]["kind"].split(", ")
        found.setdefault((extent, structure), []).append(model[key])
    return found


def effects(values: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, Point]:
    """Main effects and interaction of a 2 x 2 with its 95 % intervals; of different seeds, pooled variance."""

    def sign(effect: str, extent: str, structure: str) -> int:
        of_extent, of_structure = 2 * (extent == "local") - 1, 2 * (structure == "structured") - 1
        return {"extent": of_extent, "structure": of_structure, "both": of_extent * of_structure}[effect]

    means = {cell: mean(found) for cell, found in values.items()}
    freedom = sum(len(found) - 1 for found in values.values())
    variance = sum((x - means[cell]) ** 2 for cell, found in values.items() for x in found) / freedom
    half = (
        float(t.ppf(0.975, freedom)) * sqrt(variance * sum(1 / len(found) for found in values.values())) / 2
    )
    found = {}
    for name in EFFECTS:
        effect = sum(sign(name, *cell) * means[cell] for cell in values) / 2
        found[name] = Point(effect, effect - half, effect + half)
    return found


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    panels = []
    for key, unit in MEASURES.items():
        found = cells(record, key)
        rows = [", ".join(cell) for cell in found]
        n = max(len(x) for x in found.values())
        series = {
            f"seed {i}": [Point(values[i]) if i < len(values) else None for values in found.values()]
            for i in range(n)
        }
        panels.append(
            Panel(unit, "%" if key == "share" else "points", series, line=50.0 if key == "share" else 0.0)
        )
    return {"kinds": point_panels(rows, panels)}


def table(record: Mapping[str, Any]) -> str:
    rows = [
        [
            "measure",
            *(f"{'/'.join(cell)}, mean (range)" for cell in cells(record, "share")),
            *EFFECTS.values(),
        ]
    ]
    for key, unit in MEASURES.items():
        found = cells(record, key)
        shown = [f"{mean(x):.1f} ({min(x):.1f}..{max(x):.1f})" for x in found.values()]
        rows.append([unit, *shown, *(_said(point) for point in effects(found).values())])
    return markdown(rows)


def _said(point: Point) -> str:
    return f"{point.value:+.1f} [{point.low:+.1f}, {point.high:+.1f}]"


def finding(record: Mapping[str, Any]) -> str:
    parts = []
    for key, unit in MEASURES.items():
        found = effects(cells(record, key))
        sure = [
            name
            for name, p in found.items()
            if p.low is not None and p.high is not None and p.low * p.high > 0
        ]
        deciding = ", ".join(EFFECTS[name] for name in sure) or "nothing"
        words = ", ".join(f"{EFFECTS[name]} {_said(point)}" for name, point in found.items())
        parts.append(f"{unit}: {words} (beyond chance: {deciding})")
    return (
        f"{'; '.join(parts)}. {len(record['found']['models'])} models. The paper's reading is that extent alone "
        "decides, with both measures higher for local triggers. Triggers of other sizes and strengths, or a deeper tower, would change the answer."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
