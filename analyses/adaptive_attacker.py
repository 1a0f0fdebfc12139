"""An attacker who knows the defense: a backdoor trained to keep the last layer's heads near their prototypes.

Paper:     He et al. (2025), impact statement: an attacker may adapt to a defense that reads the last layer's heads.
Command:   python -m analyses.adaptive_attacker
Run time:  about 10 minutes, one thread (a killed run resumes).
Writes:    analyses/results/adaptive_attacker.json

The attacker fine-tunes as for `shapes-badnet`, the same pairs and poisons, with one more term in the loss: for triggered
images, the squared distance of every last-layer head's output (of the class token, before the output projection) to its
mean over the batch's images, in units of the head's variance over them. Every defense is then fitted anew on clean
images of the adapted model, as a defender would.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from analyses.attack_agnostic import terms
from decompclip.attacks.trigger import Trigger
from decompclip.cache.maps import Convention
from decompclip.data.shapes import Shapes
from decompclip.defenses.agnostic_det import AgnosticDet
from decompclip.defenses.agnostic_rep import AgnosticRep
from decompclip.defenses.decomp_det import DecompDet
from decompclip.defenses.decomp_rep import DecompRep
from decompclip.evaluation.metrics import attack_report, auroc, auroc_interval, predict
from decompclip.models.clip import HookedCLIP
from decompclip.models.spec import versions
from decompclip.models.zoo import card, load_bundled
from decompclip.training.finetune import finetune
from decompclip.training.losses import Seen
from decompclip.training.monitor import Monitor
from decompclip.zoo.recipes import twin_recipe
from decompclip.zoo.train import poisoned_pairs

RESULTS = Path(__file__).parent / "results" / "adaptive_attacker.json"


@dataclass(frozen=True)
class Config:
    twin: str = "shapes-badnet"
    weight: float = 0.1
    triggered: int = 16
    fit_images: int = 1_000
    images: int = 1_000
    seeds: dict[str, int] = field(default_factory=lambda: {"fit": 9_301, "evaluation": 9_302})


@dataclass(frozen=True, eq=False)
class StayNear:
    """The penalty: `weight` times how far triggered images leave the prototypes of the last layer's heads.

    Attributes:
        triggered: images of each batch that are triggered for it, with the attack's own trigger.
        mean, std: of the model's normalisation.
    """

    trigger: Trigger
    weight: float
    triggered: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, seen: Seen) -> Float[Tensor, ""]:
        mean, std = (torch.tensor(x).view(1, 3, 1, 1).to(seen.pixels) for x in (self.mean, self.std))
        pixels = (seen.pixels[: self.triggered] * std + mean).clamp(0, 1)
        moved = last_heads(seen.net, (self.trigger(pixels) - mean) / std)
        with torch.no_grad():
            clean = last_heads(seen.net, seen.pixels)
            prototype, variance = clean.mean(0), clean.var(0).mean(-1, keepdim=True)
        return self.weight * ((moved - prototype).square() / variance).mean()


def last_heads(net: nn.Module, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch head d_head"]:
    """What each head of the last layer hands to the output projection, for the class token."""
    visual: Any = net.visual
    block, kept = visual.transformer.resblocks[-1], []
    handle = block.ln_1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        visual(pixels)
    finally:
        handle.remove()
    x, attn = kept[0], block.attn
    qkv = torch.nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attn.num_heads)
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)[:, :, 0]


def adapt(config: Config, work: Path) -> HookedCLIP:
    """Train the adaptive attacker's model."""
    recipe = twin_recipe(config.twin)
    assert isinstance(recipe.trigger, Trigger)
    world, clean = recipe.world, load_bundled(recipe.base)
    penalty = StayNear(recipe.trigger, config.weight, config.triggered, clean.mean, clean.std)
    monitor = Monitor(
        data=world.validation(),
        class_names=world.class_names,
        templates=world.templates,
        trigger=recipe.trigger,
        target=world.label,
        every=250,
    )
    work.mkdir(parents=True, exist_ok=True)
    return finetune(
        clean,
        poisoned_pairs(recipe, clean, recipe.trigger),
        recipe.recipe,
        monitor=monitor,
        penalty=penalty,
        checkpoint=work / "adaptive.pt",
        seed=recipe.seed,
        log=print,
    ).model


@torch.no_grad()
def defend(model: HookedCLIP, config: Config) -> dict[str, Any]:
    """Every defense of terms on one model: rates of repairs, AUROC of detectors."""
    recipe = twin_recipe(config.twin)
    world, trigger = recipe.world, recipe.trigger
    assert isinstance(trigger, Trigger)
    fit = Shapes(config.fit_images, seed=config.seeds["fit"])
    data = Shapes(config.images, seed=config.seeds["evaluation"])
    labels = data.draw(range(len(data))).labels
    others = labels != world.label
    classifier = world.classifier(model)
    found: dict[str, Any] = {"repairs": {}, "detectors": {}}
    views = {
        convention: (
            terms(model, fit, None, convention),
            terms(model, data, None, convention),
            terms(model, data, trigger, convention),
        )
        for convention in get_args(Convention)
    }
    repairs = {
        "none": ("centred", None),
        "Decomp-Rep, paper": ("paper", DecompRep.paper()),
        "Decomp-Rep, cosine and quantile": ("centred", DecompRep(similarity="cosine", threshold="quantile")),
        "agnostic": ("centred", AgnosticRep(classifier)),
    }
    for name, (convention, repair) in repairs.items():
        clean, plain, hit = views[convention]
        edit = (lambda d: d) if repair is None else repair.fit(clean)
        answers = [predict(edit(d).features, classifier) for d in (plain, hit)]
        report = attack_report(answers[0], labels, answers[1], labels, world.label)
        found["repairs"][name] = report.to_dict()
    detectors = {
        "Decomp-Det, paper": ("paper", DecompDet.paper()),
        "Decomp-Det, cosine and quantile": ("centred", DecompDet(similarity="cosine", threshold="quantile")),
        "agnostic": ("centred", AgnosticDet(classifier)),
    }
    for name, (convention, detector) in detectors.items():
        clean, plain, hit = views[convention]
        detector.fit(clean)
        scores = detector.score(plain).double(), detector.score(hit[others]).double()
        low, high = auroc_interval(*scores)
        found["detectors"][name] = {"auroc": auroc(*scores), "low": low, "high": high}
    return found


def run(config: Config, work: Path = Path(".training")) -> dict[str, Any]:
    adapted = adapt(config, work)
    return {
        "config": asdict(config),
        "versions": versions(),
        "twin_sha256": card(config.twin)["sha256"],
        "plain": defend(load_bundled(config.twin), config),
        "adaptive": defend(adapted, config),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: one row a defense, the plain attacker beside the adaptive one."""

    def rate(x: dict[str, Any]) -> str:
        return f"{100 * x['value']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"

    rows = ["| defense | plain attacker | adaptive attacker |", "| --- | --- | --- |"]
    for name in found["plain"]["repairs"]:
        cells = [
            f"ASR {rate(r['asr'])}, CACC {rate(r['cacc'])}"
            for r in (found[k]["repairs"][name] for k in ("plain", "adaptive"))
        ]
        rows.append(f"| repair: {name} | {' | '.join(cells)} |")
    for name in found["plain"]["detectors"]:
        cells = [
            f"AUROC {d['auroc']:.3f} [{d['low']:.3f}, {d['high']:.3f}]"
            for d in (found[k]["detectors"][name] for k in ("plain", "adaptive"))
        ]
        rows.append(f"| detector: {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", type=float, default=Config.weight, help="of the penalty")
    parser.add_argument("--work", type=Path, default=Path(".training"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = run(Config(weight=options.weight), options.work)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
