"""Fine-tuning defenses, and repairs on top of them: the plug-and-play rows of Table 1.

Paper:     He et al. (2025), Table 1: CleanCLIP, and Decomp-Rep on the model that CleanCLIP leaves.
Command:   python -m analyses.tuning_defenses             (a killed run resumes)
Run time:  about 8 minutes a twin, one thread.
Writes:    analyses/results/tuning_defenses.json

Each twin is fine-tuned on the same clean pairs, of a stream that neither its training nor any measurement has seen, by the
loss of each defense; then the paper's Decomp-Rep (with the right hint) and `AgnosticRep` are fitted on the tuned model. The
rate is above CleanCLIP's 5e-6: models of 1.7 M parameters hardly move at that.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from analyses.attack_agnostic import terms
from analyses.bundled_models import markdown, rate
from decompclip.attacks.registry import from_card
from decompclip.cache.decomposition import Decomposition
from decompclip.data.shapes import Shapes
from decompclip.data.shapes_pairs import ShapesPairs
from decompclip.defenses.agnostic_rep import AgnosticRep
from decompclip.defenses.clean_finetuning import PAR, CleanCLIP, CleanFineTuning, TuningDefense
from decompclip.defenses.decomp_rep import DecompRep
from decompclip.evaluation.metrics import attack_report, predict
from decompclip.models.clip import HookedCLIP
from decompclip.models.spec import versions
from decompclip.models.zoo import card, load_bundled
from decompclip.training.recipes import FineTuning

RESULTS = Path(__file__).parent / "results" / "tuning_defenses.json"

RECIPE = FineTuning(epochs=2, batch_size=64, lr=1e-4)


@dataclass(frozen=True)
class Config:
    twins: tuple[str, ...] = ("shapes-badnet", "shapes-blended")
    pairs: int = 9_600
    recipe: FineTuning = RECIPE
    pairs_seed: int = 9_501
    fit_seed: int = 9_502
    seed: int = 9_503
    images: int = 1_000


def defenses(config: Config) -> dict[str, TuningDefense | None]:
    recipe = config.recipe
    return {
        "none": None,
        "clean fine-tuning": CleanFineTuning(recipe=recipe),
        "CleanCLIP": CleanCLIP(recipe=replace(recipe, loss="cleanclip")),
        "PAR": PAR(recipe=recipe),
    }


@torch.no_grad()
def measure(model: HookedCLIP, twin: str, config: Config) -> dict[str, Any]:
    """The model as it is, and with each repair fitted on it."""
    backdoor = card(twin)["backdoor"]
    trigger, target = from_card(backdoor["trigger"]), model.class_names.index(backdoor["target"])
    fit, data = Shapes(config.images, seed=config.fit_seed), Shapes(config.images, seed=config.seed)
    labels, classifier = data.draw(range(len(data))).labels, model.zero_shot_classifier(model.class_names)

    def sets(convention: Any) -> list[Decomposition]:
        return [terms(model, s, t, convention) for s, t in ((fit, None), (data, None), (data, trigger))]

    centred, paper = sets("centred"), sets("paper")
    edits = {
        "as it is": (lambda d: d, centred),
        "Decomp-Rep": (DecompRep.paper(trigger=trigger.extent).fit(paper[0]), paper),
        "agnostic": (AgnosticRep(classifier).fit(centred[0]), centred),
    }
    found = {}
    for name, (edit, (_, clean, hit)) in edits.items():
        answers = [predict(edit(d).features, classifier) for d in (clean, hit)]
        found[name] = attack_report(answers[0], labels, answers[1], labels, target).to_dict()
    return found


def run(config: Config, work: Path = Path(".training")) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    pairs = ShapesPairs(config.pairs, seed=config.pairs_seed, order_seed=config.pairs_seed)
    found: dict[str, Any] = {}
    for twin in config.twins:
        for name, defense in defenses(config).items():
            model, slug = load_bundled(twin), name.replace(" ", "-").lower()
            if defense is not None:
                path = work / f"tuned-{twin}-{slug}.pt"
                model = defense.apply(model, pairs, checkpoint=path, log=print).model
            found.setdefault(twin, {})[name] = measure(model, twin, config)
            print(
                twin, name, {k: round(v["asr"]["value"], 3) for k, v in found[twin][name].items()}, flush=True
            )
    return {"config": asdict(config), "versions": versions(), "models": found}


def table(found: dict[str, Any]) -> str:
    rows = [["twin", "fine-tuning", "then", "ASR", "control", "CACC"]]
    for twin, by_defense in found["models"].items():
        for defense, by_repair in by_defense.items():
            rows += [
                [f"`{twin}`", defense, repair, *(rate(report[key]) for key in ("asr", "control", "cacc"))]
                for repair, report in by_repair.items()
            ]
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--twins", nargs="+", default=list(Config.twins))
    parser.add_argument("--work", type=Path, default=Path(".training"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = run(Config(twins=tuple(options.twins)), options.work)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
