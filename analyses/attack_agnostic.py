"""Designs of detection and repair without a hint, side by side: what was tried before `AgnosticDet` and `AgnosticRep`.

Command:   python -m analyses.attack_agnostic
Run time:  about 5 minutes, one thread.
Writes:    analyses/results/attack_agnostic.json

Designs were compared on streams 211 and 212 of the world while they were made; here they are measured on streams that
nothing was chosen on, over all bundled twins of `shapes`.

Detection: each view of `AgnosticDet` alone, their sum (what was settled on) and their maximum, and the distances of all heads
and MLPs, one by one, combined by a Mahalanobis distance over the 54 of them.
Repair, all at a clean budget of 1 %: where the story changes (what was settled on); everything after the first half of the
layers, in images that are flagged; and the heads and MLPs that are flagged themselves, replaced by their means.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.bundled_models import markdown
from decompclip.attacks.registry import from_card
from decompclip.attacks.trigger import Trigger
from decompclip.cache.components import everything
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention
from decompclip.data.shapes import Shapes
from decompclip.defenses.agnostic_det import VIEWS
from decompclip.defenses.agnostic_rep import AgnosticRep
from decompclip.defenses.class_distance import ClassDistance
from decompclip.defenses.component_distances import ComponentDistances
from decompclip.evaluation.metrics import attack_report, auroc, predict
from decompclip.models.clip import HookedCLIP
from decompclip.models.spec import versions
from decompclip.models.zoo import bundled, card, load_bundled
from decompclip.operators.ablation import MeanAblate

RESULTS = Path(__file__).parent / "results" / "attack_agnostic.json"
DETECTION = (*VIEWS, "sum of the three", "largest of the three", "components")
REPAIR = ("none", "where the story changes", "after the first half", "flagged components")
BUDGET = 0.01


@dataclass(frozen=True)
class Config:
    fit_images: int = 1_000
    images: int = 1_000
    fit_seed: int = 9_401
    seed: int = 9_402


@torch.no_grad()
def terms(
    model: HookedCLIP, data: Shapes, trigger: Trigger | None = None, convention: Convention = "centred"
) -> Decomposition:
    """Of unit features, of clean or of triggered images."""
    return Decomposition.cat(
        [
            model.decompose(
                model.normalize(b.images if trigger is None else trigger(b.images, b.indices)),
                normalize=True,
                convention=convention,
            )
            for b in data.batches(250)
        ]
    )


def scores(
    repair: AgnosticRep, distances: ComponentDistances, fit: Decomposition, d: Decomposition
) -> dict[str, Float[Tensor, " batch"]]:
    """Every design of detection on the same images."""
    views = repair.detector_.views(d)
    one = torch.zeros(len(fit), dtype=torch.long)
    joint = ClassDistance.fit(distances.score(fit)[:, None], one, 1)
    return {
        **{name: views[:, place] for place, name in enumerate(VIEWS)},
        "sum of the three": views.sum(1),
        "largest of the three": views.amax(1),
        "components": joint(distances.score(d)[:, None], torch.zeros(len(d), dtype=torch.long))[:, 0],
    }


def repaired(
    repair: AgnosticRep, distances: ComponentDistances, d: Decomposition
) -> Iterator[tuple[str, Decomposition]]:
    """Every design of repair on the same images."""
    yield "none", d
    yield "where the story changes", repair(d)
    detector = repair.detector_
    flagged = detector.predict(d, fpr=BUDGET)
    cut = detector.expected_.cut
    expected = detector.expected_.extrapolation(detector.look(d).before)[:, cut].to(d.embed)
    mlps = d.mlps.clone()
    mlps[:, -1] += torch.where(flagged[:, None], expected - d.features, 0)
    yield "after the first half", d.edit(mlps=mlps)
    where = distances.flags(d, fpr=BUDGET) & flagged[:, None]
    yield "flagged components", MeanAblate(everything, repair.moments_).on(where)(d)


def measure(name: str, config: Config) -> dict[str, Any]:
    model, backdoor = load_bundled(name), card(name)["backdoor"]
    classifier = model.zero_shot_classifier(model.class_names)
    data, target = Shapes(config.images, seed=config.seed), model.class_names.index(backdoor["target"])
    labels = data.draw(range(len(data))).labels
    fit = terms(model, Shapes(config.fit_images, seed=config.fit_seed))
    clean, hit = terms(model, data), terms(model, data, from_card(backdoor["trigger"]))
    repair = AgnosticRep(classifier, budget=BUDGET).fit(fit)
    distances = ComponentDistances(classifier).fit(fit)
    others = labels != target
    low, high = (scores(repair, distances, fit, d) for d in (clean, hit[others]))
    found: dict[str, Any] = {
        "auroc": {design: auroc(low[design], high[design]) for design in DETECTION},
        "fpr_at_5": repair.detector_.predict(clean).double().mean().item(),
        "repair": {},
    }
    edits = zip(repaired(repair, distances, clean), repaired(repair, distances, hit), strict=True)
    for (design, before), (_, after) in edits:
        answers = [predict(d.features, classifier) for d in (before, after)]
        report = attack_report(answers[0], labels, answers[1], labels, target)
        right = (answers[1][others] == labels[others]).double().mean().item()
        found["repair"][design] = report.to_dict() | {"accuracy_on_triggered": right}
    return found


def run(config: Config, names: list[str]) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "versions": versions(),
        "weights": {name: card(name)["sha256"] for name in names},
        "models": {name: measure(name, config) for name in names},
    }


def table(found: dict[str, Any]) -> str:
    """Means over models, with the least favourable one in brackets."""
    models = found["models"].values()
    rows = [["detection", "AUROC, mean (worst)"]]
    for design in DETECTION:
        values = [m["auroc"][design] for m in models]
        rows.append([design, f"{np.mean(values):.3f} ({min(values):.3f})"])
    fpr = [100 * m["fpr_at_5"] for m in models]
    fixed = [["repair", "ASR, mean (worst)", "CACC, mean (worst)", "right on triggered, mean"]]
    for design in REPAIR:
        asr, cacc = ([100 * m["repair"][design][rate]["value"] for m in models] for rate in ("asr", "cacc"))
        right = [100 * m["repair"][design]["accuracy_on_triggered"] for m in models]
        fixed.append(
            [
                design,
                f"{np.mean(asr):.1f} ({max(asr):.1f})",
                f"{np.mean(cacc):.1f} ({min(cacc):.1f})",
                f"{np.mean(right):.1f}",
            ]
        )
    said = f"False positives at a stated 5 %: {np.mean(fpr):.1f} % ({min(fpr):.1f} to {max(fpr):.1f})."
    return f"{markdown(rows)}\n\n{said}\n\n{markdown(fixed)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=Config.images)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    names = [name for name in bundled() if name.startswith("shapes-")]
    found = run(Config(images=options.images), names)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
