"""How many clean images detection and repair without a hint need: what fewer of them cost, down to one a class.

Paper:     He et al. (2025) fit on 20 % of the evaluation set, on ImageNet-1K 10,000 images for 1,000 classes.
Command:   python -m analyses.clean_images --model-family photos --models photos-badnet,photos-blended,photos-issba
Run time:  about 8 minutes, one thread.
Expected:  false positives within 1 point of the stated 5 % from 10 images a class on; with fewer, fewer.
Writes:    analyses/results/FAMILY/clean_images.json, clean_images.png

`AgnosticDet` and `AgnosticRep` are fitted on the first `counts` of seeded validation images, and reported on test images. A
class's mean starts with five images at the mean of all, and all classes have one covariance, so that a class of one image, or of none,
is held to what classes share. "Own class": triggered images of other classes than the target's that are told right.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import markdown, mean, rate
from decompclip.bench.run import area
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.figures.curves import Curve, LinePanel, line_panels
from decompclip.intervals import Rate

TITLE = "Clean images: what fewer of them cost detection and repair without a hint"


@dataclass(frozen=True)
class Config:
    """`counts` of clean images to fit on; `images` of the test part; `budget` of the repair."""

    counts: tuple[int, ...] = (200, 500, 1000, 2500)
    images: int = 1200
    budget: float = 0.05
    seed: int = 0


@torch.no_grad()
def measure(case: Case, config: Config) -> dict[str, Any]:
    """The model as it is, and by the number of clean images."""
    clean, hit = case.terms("clean", "centred"), case.terms("triggered", "centred")
    found: dict[str, Any] = {"as it is": case.report_of(None, "centred")}
    for count in config.counts:
        repair = AgnosticRep(case.classifier, budget=config.budget).fit(case.terms("fit", "centred")[:count])
        detector = repair.detector_
        low, high = detector.score(clean), detector.score(hit)
        answers = [case.answers(repair(d).features) for d in (clean, hit)]
        own = (answers[1] == case.labels)[case.others]
        found[str(count)] = {
            "auroc": area(low[case.others], high[case.others]),
            "fpr": Rate.of(low > detector.threshold_at(0.05)).to_dict(),
            "repaired": case.report(*answers).to_dict(),
            "own": Rate.of(own).to_dict(),
        }
    return found


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    """Raises ValueError: more images than there are."""
    found = {}
    for member in members:
        case = family.case(member, images=max(*config.counts, config.images), seed=config.seed)
        fewer = replace(case, clean=case.clean[: config.images], labels=case.labels[: config.images])
        found[member.name] = measure(fewer, config)
    return {"models": found}


COLUMNS = {
    "AUROC": lambda m: m["auroc"],
    "false positives at 5 %": lambda m: m["fpr"],
    "ASR after repair": lambda m: m["repaired"]["asr"],
    "CACC after repair": lambda m: m["repaired"]["cacc"],
    "own class": lambda m: m["own"],
}


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    counts, models = record["config"]["counts"], record["found"]["models"]
    panels = []
    for name, of in COLUMNS.items():
        curves = {}
        for model, found in models.items():
            points = [of(found[str(count)]) for count in counts]
            y, low, high = ([100 * p[key] for p in points] for key in ("value", "low", "high"))
            curves[model] = Curve(counts, y, low, high)
        panels.append(LinePanel(name, "clean images to fit on", "%", curves, log_x=True))
    return {"counts": line_panels(panels, columns=3, shared_y=False)}


def table(record: Mapping[str, Any]) -> str:
    rows = [["model", "clean images", *COLUMNS]]
    for name, found in record["found"]["models"].items():
        plain = found["as it is"]
        rows.append([name, "as it is", "", "", rate(plain["asr"]), rate(plain["cacc"]), ""])
        for count in record["config"]["counts"]:
            cells = [of(found[str(count)]) for of in COLUMNS.values()]
            rows.append([name, str(count), *map(rate, cells)])
    return f"{markdown(rows)}\n\nIn %, of {record['config']['images']} test images; the repair may touch {100 * record['config']['budget']:.0f} % of clean ones."


def finding(record: Mapping[str, Any]) -> str:
    def of(count: int, name: str) -> float:
        return 100 * mean(COLUMNS[name](m[str(count)])["value"] for m in record["found"]["models"].values())

    counts = record["config"]["counts"]
    said = "; ".join(
        f"{name} {', '.join(f'{of(count, name):.1f}' for count in counts)} %" for name in COLUMNS
    )
    return (
        f"Fitted on {', '.join(map(str, counts))} clean images, in the mean over {len(record['found']['models'])} models: {said}. One draw of the "
        "clean images, and each smaller set a part of the larger; other draws would differ."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
