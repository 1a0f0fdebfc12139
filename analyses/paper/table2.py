"""Table 2: detection of triggered images.

Paper:     He et al. (2025), Table 2: AUROC of STRIP, SCALE-UP, TeCo and Decomp-Det.
Command:   python -m analyses.table2 --model-family shapes
Run time:  about 15 minutes, one thread: STRIP and TeCo take dozens of passes an image, and see fewer images; nine minutes a twin of
           photos, with `--images 400 --slow-images 100`.
Expected:  Decomp-Det 0.92 to 0.99, the three others 0.63 to 0.89.
Writes:    analyses/results/FAMILY/table2.json, table2.png

Clean images of other classes than the target, against the same images with the trigger; higher is more suspicious for every detector. The
control puts other clean images in the place of the triggered ones. `--detectors` takes any of `decompclip.DETECTORS`; all of them on
the whole zoo are in the leaderboard (`python -m analyses.leaderboard`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from analyses.paper.published import SETTING, TABLE2
from analyses.study.case import LEAST_FIT, Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.rates import BARS
from analyses.study.summary import by_attack, interval_text, markdown, mean, over_seeds
from decompclip.bench.plan import SLOW
from decompclip.bench.run import Remembering, area
from decompclip.defenses.detectors import DETECTORS
from decompclip.figures.scatter import Panel, point_panels

TITLE = "Table 2: detection of triggered images"


@dataclass(frozen=True)
class Config:
    """`slow_images` are those of STRIP and TeCo."""

    images: int = 1_000
    slow_images: int = 200
    seed: int = 0
    detectors: tuple[str, ...] = (
        *("STRIP", "SCALE-UP", "TeCo", "Decomp-Det (paper)"),
        *("Decomp-Det (cosine, quantile)", "Mahalanobis by class", "agnostic"),
    )

    def __post_init__(self) -> None:
        if unknown := [name for name in self.detectors if name not in DETECTORS]:
            raise ValueError(f"expected detectors of {', '.join(DETECTORS)}; received {unknown[0]!r}")


def measure(case: Case, name: str, model: Remembering, images: int) -> dict[str, Any]:
    """AUROC with its interval, and of the control: the second half of the clean images against the first."""
    detector = DETECTORS[name](model, case.classifier).fit(case.fit[: max(images, LEAST_FIT)])
    others = case.others[:images]
    clean = detector.score(case.clean[:images])[others]
    suspect = detector.score(case.triggered[:images][others])
    half = len(clean) // 2
    return {"auroc": area(clean, suspect), "control": area(clean[:half], clean[half:])}


@torch.no_grad()
def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    found = {}
    for member in members:
        case = family.case(member, images=config.images, seed=config.seed)
        model = Remembering(case.model)
        for images in (case.fit, case.clean, case.triggered):
            model.remember(images)
        found[member.name] = {
            name: measure(
                case, name, model, min(config.images, config.slow_images) if name in SLOW else config.images
            )
            for name in config.detectors
        }
    return {"models": found}


def _detectors(record: Mapping[str, Any]) -> list[str]:
    return list(next(iter(record["found"]["models"].values())))


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    attacks, models = by_attack(record), record["found"]["models"]
    rows = [f"{attack} ({record['models'][names[0]]['kind']})" for attack, names in attacks.items()]
    points = {
        d: [over_seeds([models[n][d]["auroc"] for n in names], 1) for names in attacks.values()]
        for d in _detectors(record)
    }
    panel = Panel(
        "clean images against the same images with the trigger",
        "AUROC (0.5 is chance)",
        points,
        (-0.03, 1.03),
        0.5,
    )
    return {"auroc": point_panels(rows, [panel], bars=BARS)}


def table(record: Mapping[str, Any]) -> str:
    """A row an attack; the paper's value in brackets where it has one."""
    models, detectors = record["found"]["models"], _detectors(record)
    rows = [["attack", "trigger", *detectors]]
    for attack, names in by_attack(record).items():
        cells = [attack, record["models"][names[0]]["kind"]]
        for detector in detectors:
            theirs = TABLE2.get(attack, {}).get(detector)
            ours = interval_text(over_seeds([models[n][detector]["auroc"] for n in names], 1), 3)
            cells.append(ours + (f"; paper {theirs:.3f}" if theirs else ""))
        rows.append(cells)
    for label, key in (("mean", "auroc"), ("control", "control")):
        values = [f"{mean(m[d][key]['value'] for m in models.values()):.3f}" for d in detectors]
        rows.append([label, "", *values])
    return f"{markdown(rows)}\n\n{SETTING[0].upper()}{SETTING[1:]}."


def finding(record: Mapping[str, Any]) -> str:
    models = list(record["found"]["models"].values())
    means = {d: mean(m[d]["auroc"]["value"] for m in models) for d in _detectors(record)}
    worst = {d: min(m[d]["auroc"]["value"] for m in models) for d in means}
    best = max(means, key=means.__getitem__)
    parts = [f"{d} {value:.3f} (worst {worst[d]:.3f})" for d, value in means.items()]
    paper = means.get("Decomp-Det (paper)")
    rivals = [means[d] for d in ("STRIP", "SCALE-UP", "TeCo") if d in means]
    verdict = ""
    if paper is not None and rivals:
        verdict = f" The paper's order, Decomp-Det above STRIP, SCALE-UP and TeCo, {'holds' if paper > max(rivals) else 'does not hold'}."
    return (
        f"Mean AUROC over {len(models)} models: {', '.join(parts)}; {best} is highest.{verdict} The paper counts "
        "more than 5 of 12 heads; `shapes` and `cifar10` have 8 in a layer, `photos` 12."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
