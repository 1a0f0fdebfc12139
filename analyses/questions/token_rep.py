"""Token repair: does an image's own class come back once the patches that carry the answer are filled?

Paper:     He et al. (2025), Section 5, repair heads by prototypes; Table 1 counts what still goes to the target, not what is right.
Command:   python -m analyses.token_rep --model-family shapes
Run time:  about 5 minutes for shapes, 1 for cifar10, 26 for photos with 1,000 images, one thread.
Expected:  of a local trigger, ASR <= 3 %, the own class >= 90 % of clean accuracy, CACC loss <= 0.5 points, AUROC >= 0.98; of a
           global one nothing, for no few patches carry it.
Writes:    analyses/results/FAMILY/token_rep.json, token_rep.png

`TokenRep` is fitted on clean images alone; its options were chosen on validation images of shapes-badnet, cifar10-badnet and
photos-badnet. "Own class": triggered images of other classes than the target's that are told right; beside it what the clean
model, which has no backdoor, makes of the same triggered images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import by_attack, markdown, mean
from decompclip.bench.run import area
from decompclip.defenses.detectors.token_rep import TokenRep, TokenRepaired
from decompclip.evaluation.evaluate import classify
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP

TITLE = "Token repair: the own class comes back where few patches carry the answer"


@dataclass(frozen=True)
class Config:
    images: int = 500
    seed: int = 0


@torch.no_grad()
def measure(
    case: Case, clean_model: HookedCLIP, classifier: Float[Tensor, "class d_embed"]
) -> dict[str, Any]:
    """One model as it is and repaired; `clean_model` and its classifier are the family's."""
    repair = TokenRep(case.model, case.classifier).fit(case.fit)
    plain, calm = (
        _answers(case.model, case.classifier, case.images(part)) for part in ("clean", "triggered")
    )
    unharmed = _answers(clean_model, classifier, case.triggered)
    clean, hit = (repair.repair(case.model.normalize(case.images(part))) for part in ("clean", "triggered"))
    answers = [case.answers(found.features) for found in (clean, hit)]
    others, own = case.others, {}
    for name, found in {"as it is": calm, "repaired": answers[1], "clean model": unharmed}.items():
        own[name] = Rate.of((found == case.labels)[others]).to_dict()
    return {
        "as it is": case.report(plain, calm).to_dict(),
        "repaired": case.report(*answers).to_dict(),
        "own": own,
        "auroc": area(clean.scores, hit.scores[others]),
        "flagged": Rate.of(clean.flagged).to_dict(),
        "passes": {"clean": clean.passes, "triggered": hit.passes},
        "filled": _filled(hit),
    }


def _answers(
    model: HookedCLIP, classifier: Float[Tensor, "class d_embed"], pixels: Float[Tensor, "image 3 h w"]
) -> Int[Tensor, " image"]:
    return torch.cat([classify(model, part, classifier) for part in pixels.split(100)])


def _filled(found: TokenRepaired) -> float:
    """Patches filled in a flagged image, mean."""
    flagged = found.filled[found.flagged]
    return round(flagged.sum(1).double().mean().item(), 2) if len(flagged) else 0.0


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    clean = family.clean_model()
    classifier = family.classifier(clean)
    cases = (family.case(member, images=config.images, seed=config.seed) for member in members)
    return {"models": {case.member.name: measure(case, clean, classifier) for case in cases}}


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    models = record["found"]["models"]
    rows = [f"{name} ({record['models'][name]['kind']})" for name in models]
    own = {
        key: [Point.of(m["own"][key]) for m in models.values()]
        for key in ("as it is", "repaired", "clean model")
    }
    asr = {key: [Point.of(m[key]["asr"]) for m in models.values()] for key in ("as it is", "repaired")}
    panels = [
        Panel("triggered images told right", "images of other classes, %", own, PERCENT),
        Panel("triggered images sent to the target", "images of other classes, %", asr, PERCENT),
    ]
    return {"own_class": point_panels(rows, panels, bars="95 % interval")}


def table(record: Mapping[str, Any]) -> str:
    models = record["found"]["models"]
    rows = [
        [
            "attack",
            "trigger",
            "ASR",
            "repaired",
            "own class",
            "clean model",
            "CACC",
            "repaired",
            "AUROC",
            "flagged",
            "passes",
        ]
    ]
    for attack, names in by_attack(record).items():
        own = [models[name] for name in names]

        def percent(*path: str, own: list[dict[str, Any]] = own) -> str:
            values = []
            for found in own:
                for key in path:
                    found = found[key]  # noqa: PLW2901
                values.append(100 * found["value"])
            return f"{mean(values):.1f}"

        rows.append(
            [
                attack,
                record["models"][names[0]]["kind"],
                percent("as it is", "asr"),
                percent("repaired", "asr"),
                percent("own", "repaired"),
                percent("own", "clean model"),
                percent("as it is", "cacc"),
                percent("repaired", "cacc"),
                f"{mean(m['auroc']['value'] for m in own):.3f}",
                percent("flagged"),
                f"{mean(m['passes']['clean'] for m in own):.2f}",
            ]
        )
    return f"{markdown(rows)}\n\nIn %, mean over seeds; flagged and passes: of clean images."


def aims_met(model: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
    """At most 3 % to the target; the own class for 90 % of clean accuracy; at most half a point of that lost; an AUROC of 0.98."""
    before, after = (model[key]["cacc"]["value"] for key in ("as it is", "repaired"))
    return (
        model["repaired"]["asr"]["value"] <= 0.03,
        model["own"]["repaired"]["value"] >= 0.9 * before,
        before - after <= 0.005 + 1e-9,
        model["auroc"]["value"] >= 0.98,
    )


def finding(record: Mapping[str, Any]) -> str:
    kinds = {"local": "Of local triggers", "global": "Of global ones"}
    parts = []
    for extent, words in kinds.items():
        own = [
            m
            for name, m in record["found"]["models"].items()
            if record["models"][name]["kind"].startswith(extent)
        ]
        if not own:
            continue
        left, told, before = (
            [100 * m[a][b]["value"] for m in own]
            for a, b in (("repaired", "asr"), ("own", "repaired"), ("as it is", "cacc"))
        )
        lost = [100 * (m["as it is"]["cacc"]["value"] - m["repaired"]["cacc"]["value"]) for m in own]
        areas = [m["auroc"]["value"] for m in own]
        parts.append(
            f"{words} ({len(own)} model{'s' if len(own) > 1 else ''}) {mean(left):.1f} % ({min(left):.1f} to {max(left):.1f}) of triggered images still go to the target, and "
            f"{mean(told):.1f} % ({min(told):.1f} to {max(told):.1f}) are told right, where clean images are at {mean(before):.1f}; clean accuracy "
            f"loses {mean(lost):.1f} points (at most {max(lost):.1f}), AUROC {mean(areas):.3f} (worst {min(areas):.3f})."
        )
        if extent == "local":
            met = [aims_met(m) for m in own]
            asr, right, cacc, auroc = map(sum, zip(*met, strict=True))
            parts.append(
                f"Of {len(own)}, {asr} send at most 3 % to the target, {right} give the own class back for 90 % of clean accuracy, {cacc} lose at most half a "
                f"point of it, {auroc} have an AUROC of 0.98: {sum(map(all, met))} meet all four aims."
            )
    return (
        " ".join(parts)
        + " Triggers that are spread over the image are not found; of BadCLIP's patch, which lies across four of the tower's, a part or all stays."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
