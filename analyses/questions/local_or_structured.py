"""Local or structured: does it depend on a trigger's extent whether heads or MLPs carry it, or on its structure?

Paper:     He et al. (2025), Finding 1, of local *structured* patches against global *noise*: two things change at once.
Command:   python -m analyses.local_or_structured --model-family shapes
Run time:  about 6 minutes, one thread.
Expected:  if the paper's reading is right, extent decides; structure alone could explain its data too.
Writes:    analyses/results/FAMILY/local_or_structured.json, local_or_structured-kinds.png, local_or_structured-paths.png

Four kinds of trigger (local or global, one fixed pattern or noise drawn anew for each image), three seeds of training each.
Measured on each twin: the share of the contribution toward the target that heads make themselves (the rest is MLPs'), and how much more
of the attack is left without MLPs than without heads: direct, causal, and direct at equal accuracy, since what an ablation does to the attack
says little where it takes the classes with it. There all terms of one kind move toward their means until the accuracy is that of the milder
of the two ablations. Triggers of different strength are no fair cells either: the same once more with each mixed into the clean image
until it changes pixels as little as the faintest of all does (mean square). Effects are differences of means over the 2 x 2, with 95 % intervals of
Student's t over seeds (pooled variance).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.evaluation.metrics import attack_report
from decompclip.figures.curves import Curve, LinePanel, line_panels
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels
from decompclip.figures.theme import STYLES, Style
from decompclip.operators.ablation import MeanAblate

TITLE = "Local or structured: what decides whether heads or MLPs carry a trigger?"

MEASURES = {
    "share": "share of the contribution toward the target that heads make, %",
    "gap": "attack left without MLPs less without heads, points",
    "matched": "the same at equal clean accuracy, points",
    "faint": "the same at equal clean accuracy, all triggers as faint as the faintest, points",
    "causal": "attack left without MLPs less without heads, causal, points",
}
PANELS = {
    "share": "heads' share of contribution",
    "gap": "left without MLPs<br>less without heads",
    "matched": "the same,<br>at equal accuracy",
    "faint": "the same,<br>equal accuracy,<br>equally faint",
    "causal": "left without MLPs<br>less without heads,<br>causal",
}
PARTS = {"heads": heads, "mlps": mlps}
NAMES = {"heads": "heads", "mlps": "MLPs"}
STRENGTHS = 20
"""Steps from the terms as they are to all of them at their means."""
EFFECTS = {"extent": "local less global", "structure": "structured less noise", "both": "interaction"}


@dataclass(frozen=True)
class Config:
    """`causal_images` of the images are run again without heads, and without MLPs."""

    images: int = 1_000
    seed: int = 0
    causal_images: int = 300


@torch.no_grad()
def measure(case: Case, config: Config, faintest: float) -> dict[str, Any]:
    """Contribution of heads and MLPs, layer by layer, and attack success without either, by ever stronger ablation.

    Args:
        case: whose trigger is measured.
        config: as it is run.
        faintest: `energy` that the trigger is mixed down to for `faint`.
    """
    direction = case.classifier[case.target] - case.classifier[
        torch.arange(len(case.classifier)) != case.target
    ].mean(0)
    clean, triggered = (case.terms(part, "centred") for part in ("clean", "triggered"))
    mixed = sqrt(faintest / energy(case))
    faint = case.decompose(torch.lerp(case.clean, case.triggered, mixed), "centred")
    contributions = {
        "heads": ((triggered.heads - clean.heads).sum(2) @ direction)[case.others].mean(0),
        "mlps": ((triggered.mlps - clean.mlps) @ direction)[case.others].mean(0),
    }
    batches = (case.model.normalize(x) for x in case.fit.split(64))
    moments = Moments.fit(case.model, batches, normalize=True, second=False, stream=True)
    edits = {name: MeanAblate(parts, moments) for name, parts in PARTS.items()}
    paths, faint_paths = (
        {name: path(case, edit, clean, d) for name, edit in edits.items()} for d in (triggered, faint)
    )
    left, faint_left = (
        {"as it is": found["heads"]["left"][0]} | {name: each["left"][-1] for name, each in found.items()}
        for found in (paths, faint_paths)
    )
    causal = {name: _causal(case, edit, config.causal_images) for name, edit in edits.items()}
    total = {kind: float(values.sum()) for kind, values in contributions.items()}
    return {
        "push": {kind: [round(x, 5) for x in values.tolist()] for kind, values in contributions.items()},
        "left": left,
        "paths": paths,
        "causal_left": causal,
        "mixed": mixed,
        "faint_left": faint_left,
        "share": 100 * total["heads"] / (total["heads"] + total["mlps"]),
        "gap": left["mlps"] - left["heads"],
        "matched": at_equal_accuracy(paths["mlps"], paths["heads"]),
        "causal": causal["mlps"]["left"] - causal["heads"]["left"],
        "faint": at_equal_accuracy(faint_paths["mlps"], faint_paths["heads"]),
    }


def energy(case: Case) -> float:
    """The mean square of what the trigger changes, over pixels in [0, 1]."""
    return float((case.triggered - case.clean).square().mean())


def path(
    case: Case, edit: MeanAblate, clean: Decomposition, triggered: Decomposition
) -> dict[str, list[float]]:
    """CACC and ASR less its control, in points, while the ablated terms move from what they are to their means."""
    ends = [(d.features, edit(d).features) for d in (clean, triggered)]
    found: dict[str, list[float]] = {"cacc": [], "left": []}
    for step in range(STRENGTHS + 1):
        share = step / STRENGTHS
        report = case.report(*(case.answers((1 - share) * a + share * b) for a, b in ends)).to_dict()
        found["cacc"].append(round(100 * report["cacc"]["value"], 3))
        found["left"].append(round(excess(report), 3))
    return found


def at_equal_accuracy(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> float:
    """Attack left on one path less on the other, where both have come down to the accuracy that the milder one ends at."""
    level = max(found["cacc"][-1] for found in (one, other))

    def reached(found: Mapping[str, Sequence[float]]) -> float:
        """Between the last two steps around the level."""
        last = max(step for step, accuracy in enumerate(found["cacc"]) if accuracy >= level)
        if last + 1 == len(found["cacc"]):
            return found["left"][last]
        (high, low), (before, after) = (found[key][last : last + 2] for key in ("cacc", "left"))
        return before + (after - before) * (high - level) / (high - low)

    return reached(one) - reached(other)


def _causal(case: Case, edit: MeanAblate, images: int) -> dict[str, float]:
    answers, model = [], case.model
    with model.hooks(edit):
        for pixels in (case.clean[:images], case.triggered[:images]):
            features = [model.encode_image(model.normalize(x), normalize=True) for x in pixels.split(64)]
            answers.append(case.answers(torch.cat(features)))
    clean, triggered = answers
    labels = case.labels[:images]
    report = attack_report(
        clean, labels, triggered, labels, case.target, n_classes=len(case.class_names)
    ).to_dict()
    return {"cacc": round(100 * report["cacc"]["value"], 3), "left": round(excess(report), 3)}


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
    energies = family.measured(tuple(crossed), config, lambda case, _: energy(case))["models"]
    return family.measured(tuple(crossed), config, partial(measure, faintest=min(energies.values())))


def cells(record: Mapping[str, Any], key: str) -> dict[tuple[str, str], list[Any]]:
    """Values by extent and structure."""
    found: dict[tuple[str, str], list[Any]] = {}
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
    for key, title in PANELS.items():
        found = cells(record, key)
        rows = [", ".join(cell) for cell in found]
        n = max(len(x) for x in found.values())
        series = {
            f"seed {i}": [Point(values[i]) if i < len(values) else None for values in found.values()]
            for i in range(n)
        }
        panels.append(
            Panel(title, "%" if key == "share" else "points", series, line=50.0 if key == "share" else 0.0)
        )
    return {
        "kinds": point_panels(rows, panels),
        "paths": line_panels(_paths(record), columns=2, styles=_styles(record)),
    }


def _styles(record: Mapping[str, Any]) -> dict[str, Style]:
    """A colour a part, and a dash and a marker a seed."""
    seeds = max(len(found) for found in cells(record, "paths").values())
    return {
        f"{NAMES[part]}, seed {seed}": replace(STYLES[seed], colour=STYLES[place].colour)
        for place, part in enumerate(PARTS)
        for seed in range(seeds)
    }


def _paths(record: Mapping[str, Any]) -> list[LinePanel]:
    """Of each kind of trigger: attack left against accuracy left, a curve a seed."""
    panels = []
    for (extent, structure), found in cells(record, "paths").items():
        curves = {
            f"{NAMES[part]}, seed {seed}": Curve(paths[part]["cacc"], paths[part]["left"])
            for part in PARTS
            for seed, paths in enumerate(found)
        }
        panels.append(
            LinePanel(
                f"{extent}, {structure}",
                "clean accuracy, %",
                "attack success less control, points",
                curves,
                ends=PERCENT,
            )
        )
    return panels


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


def _by_extent(record: Mapping[str, Any], key: str) -> str:
    values: dict[str, list[float]] = {}
    for (extent, _), found in cells(record, key).items():
        values.setdefault(extent, []).extend(found)
    return " and ".join(
        f"{mean(found):.1f} points more for {extent} triggers" for extent, found in values.items()
    )


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
    faint = [model["faint_left"]["as it is"] for model in record["found"]["models"].values()]
    return (
        f"{'; '.join(parts)}. {len(record['found']['models'])} models, with {min(faint):.1f} to {max(faint):.1f} points of attack success at the "
        f"energy of the faintest. At equal clean accuracy {_by_extent(record, 'matched')} are left without MLPs than without heads, and "
        f"{_by_extent(record, 'faint')} where all are as faint: where both are far above zero, heads carry both kinds. The paper's reading is that extent alone "
        "decides, with all measures higher for local triggers. Triggers of other sizes, or a deeper tower, could change the answer."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
