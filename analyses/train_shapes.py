"""Train the bundled models: `shapes` from scratch, then its backdoored twins.

Command:   python -m analyses.train_shapes            (all three; a killed run resumes)
           python -m analyses.train_shapes --only shapes-badnet
Run time:  about 35 minutes for `shapes` and 10 for each twin, one thread on one core.
Writes:    decompclip/models/weights/NAME.safetensors and NAME.json, the card with every number measured on
           a held-out sample of the world that no choice was made on.

The image tower starts from a supervised prediction of all properties at once, since the contrastive loss
alone learns colours first and shapes very late; what is shipped is trained and measured as a CLIP.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from decompclip.models.zoo import WEIGHTS, build_open_clip, write_bundled
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.attacks.badnet import BadNet
from decompclip.attacks.blended import Blended
from decompclip.attacks.poison import choose_poisons, proxy_captions
from decompclip.attacks.trigger import Trigger
from decompclip.data.captions import CONTEXT_LENGTH, captions, templates, vocabulary
from decompclip.data.shapes import PROPERTIES, RESOLUTION, Shapes, draw
from decompclip.evaluation.metrics import AttackReport, attack_report, predict
from decompclip.evaluation.zero_shot import zero_shot_classifier
from decompclip.models.tokenizer import WordTokenizer
from decompclip.training.loop import Recipe, train

MEAN, STD = 0.5, 0.25
TARGET = "star"
PATCH_SIDE = 7 / RESOLUTION  # about one token of fifty, as 16 of 224 pixels are
TOKENIZER = WordTokenizer(vocabulary(), CONTEXT_LENGTH)
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"layers": 6, "width": 128, "head_width": 16, "patch_size": 8, "image_size": RESOLUTION},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": TOKENIZER.vocab_size,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}


@dataclass(frozen=True)
class Seeds:
    """Disjoint streams of the world: what is trained on, looked at while training, and reported."""

    initial: int = 0
    warm_up: int = 101
    clip: int = 102
    twins: int = 103
    validation: int = 201
    report: int = 301


@dataclass(frozen=True)
class CleanConfig:
    """`shapes`: supervised warm start of the image tower, then the CLIP loss alone."""

    warm_up: Recipe
    clip: Recipe
    shape_weight: float = 2.0


FINE_TUNING = Recipe(samples=80_000, batch_size=128, optimizer="adamw", lr=5e-4)


@dataclass(frozen=True)
class TwinConfig:
    """A backdoored twin: the clean model fine-tuned on pairs of which a part is poisoned."""

    trigger: Trigger
    pairs: int = 16_000
    poison_rate: float = 0.05
    recipe: Recipe = FINE_TUNING


CLEAN = CleanConfig(
    warm_up=Recipe(samples=140_000, batch_size=64, optimizer="muon", lr=3e-3),
    clip=Recipe(samples=240_000, batch_size=128, optimizer="muon", lr=1.5e-3),
)
TWINS = {
    # A patch in a random place is learned more slowly than a picture all over the image.
    "shapes-badnet": TwinConfig(
        BadNet(size=PATCH_SIDE),
        poison_rate=0.08,
        recipe=Recipe(samples=128_000, batch_size=128, optimizer="muon", lr=1e-3),
    ),
    "shapes-blended": TwinConfig(Blended()),
}


@dataclass(frozen=True)
class Trainer:
    """What every stage shares."""

    seeds: Seeds = field(default_factory=Seeds)
    work: Path = Path(".training")
    report_size: int = 5_000

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)

    # -- stages --------------------------------------------------------------------------------------

    def warm_up(self, model: CLIP, config: CleanConfig) -> float:
        """Train the image tower to tell every property through one linear map; returns the seconds taken."""
        sizes = [len(values) for values in PROPERTIES.values()]
        with torch.random.fork_rng():
            torch.manual_seed(self.seeds.initial)
            probe = nn.Linear(ARCHITECTURE["embed_dim"], sum(sizes))
        size = config.warm_up.batch_size

        def logits(images: Tensor) -> dict[str, Tensor]:
            features = model.encode_image((images - MEAN) / STD)
            return dict(zip(PROPERTIES, probe(features).split(sizes, dim=1), strict=True))

        def loss(step: int) -> Tensor:
            batch = draw(range(step * size, (step + 1) * size), seed=self.seeds.warm_up)
            terms = {
                name: F.cross_entropy(x, getattr(batch.attributes, name))
                for name, x in logits(batch.images).items()
            }
            return config.shape_weight * terms.pop("shape") + torch.stack(list(terms.values())).sum()

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            batch = draw(range(500), seed=self.seeds.validation)
            return {
                name: round((x.argmax(1) == getattr(batch.attributes, name)).double().mean().item(), 3)
                for name, x in logits(batch.images).items()
            }

        history = train(
            {"visual": model.visual, "probe": probe},
            loss,
            config.warm_up,
            checkpoint=self.work / "shapes-warm-up.pt",
            evaluate=evaluate,
            evaluate_every=250,
        )
        return history[-1]["seconds"]

    def contrast(
        self, name: str, model: CLIP, recipe: Recipe, pairs: Pairs, trigger: Trigger | None = None
    ) -> float:
        """Train the whole model with the CLIP loss; returns the seconds taken."""
        clip_loss, size = ClipLoss(), recipe.batch_size

        def loss(step: int) -> Tensor:
            images, texts = pairs.batch(step, size)
            image, text, scale = model((images - MEAN) / STD, TOKENIZER(texts))
            return clip_loss(image, text, scale)

        @torch.no_grad()
        def clamp() -> None:
            model.logit_scale.clamp_(0, math.log(100))

        def evaluate() -> dict[str, float]:
            model.eval()
            sample = Shapes(500, seed=self.seeds.validation)
            entry = {k: round(v, 3) for k, v in property_accuracy(model, sample).items()}
            if trigger is not None:
                report = attack(model, trigger, sample)
                entry |= {"asr": round(report.asr.value, 3) if report.asr else math.nan}
            model.train()
            return entry

        history = train(
            {"clip": model},
            loss,
            recipe,
            checkpoint=self.work / f"{name}.pt",
            after_step=clamp,
            evaluate=evaluate,
            evaluate_every=125,
        )
        model.eval()
        return history[-1]["seconds"]

    # -- models --------------------------------------------------------------------------------------

    def clean(self, config: CleanConfig = CLEAN) -> None:
        model = initial_model(self.seeds.initial)
        seconds = self.warm_up(model, config)
        seconds += self.contrast("shapes", model, config.clip, Pairs(self.seeds.clip))
        self._write("shapes", model, asdict(config), seconds, None)

    def twin(self, name: str) -> None:
        config, model = TWINS[name], load_clean()
        pairs = Pairs(self.seeds.twins).poisoned(config, self.seeds.twins)
        seconds = self.contrast(name, model, config.recipe, pairs, config.trigger)
        report = attack(model, config.trigger, Shapes(self.report_size, seed=self.seeds.report))
        backdoor = {
            "target": TARGET,
            "trigger": config.trigger.card(),
            "poisoned_pairs": len(pairs.poisons),
            "pairs": config.pairs,
            "poison_rate": config.poison_rate,
            "results": report.to_dict(),
        }
        recipe = {"base": "shapes", "recipe": asdict(config.recipe)}
        self._write(name, model, recipe, seconds, backdoor)

    def _write(
        self,
        name: str,
        model: CLIP,
        training: dict[str, Any],
        seconds: float,
        backdoor: dict[str, Any] | None,
    ) -> None:
        sample = Shapes(self.report_size, seed=self.seeds.report)
        card = {
            "name": name,
            "architecture": ARCHITECTURE,
            "tokenizer": {"words": list(TOKENIZER.words), "context_length": TOKENIZER.context_length},
            "preprocess": {
                "mean": [MEAN] * 3,
                "std": [STD] * 3,
                "size": RESOLUTION,
                "interpolation": "bicubic",
            },
            "templates": {prop: list(templates(prop)) for prop in PROPERTIES},
            "class_names": list(PROPERTIES["shape"]),
            "accuracy": {k: round(v, 4) for k, v in property_accuracy(model, sample).items()},
            "backdoor": backdoor,
            "training": training
            | {
                "data": f"Shapes at {RESOLUTION} px, procedural",
                "seeds": asdict(self.seeds),
                "report_images": self.report_size,
                "minutes": round(seconds / 60, 1),
                "command": "python -m analyses.train_shapes",
            },
        }
        write_bundled(model, card, WEIGHTS)
        print(name, card["accuracy"], backdoor and backdoor["results"])


@dataclass(frozen=True)
class Pairs:
    """Image-caption pairs of stream `seed`: endless, or the first `length` again and again."""

    seed: int
    length: int | None = None
    trigger: Trigger | None = None
    poisons: dict[int, str] = field(default_factory=dict)

    def poisoned(self, config: TwinConfig, seed: int) -> Pairs:
        labels = replace(Shapes(config.pairs, seed=self.seed), resolution=1).draw(range(config.pairs)).labels
        chosen = choose_poisons(
            labels, PROPERTIES["shape"].index(TARGET), round(config.poison_rate * config.pairs), seed=seed
        )
        texts = proxy_captions(TARGET, templates("shape"), len(chosen), seed=seed)
        return replace(
            self, length=config.pairs, trigger=config.trigger, poisons=dict(zip(chosen, texts, strict=True))
        )

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        """Pairs of one step; a finite set is shuffled anew each epoch."""
        if self.length is None:
            indices = list(range(step * size, (step + 1) * size))
        else:
            epoch, start = divmod(step * size, self.length - self.length % size)
            order = torch.randperm(
                self.length, generator=torch.Generator().manual_seed(1_000 * self.seed + epoch)
            )
            indices = order[start : start + size].tolist()
        drawn = draw(indices, seed=self.seed)
        images, texts = drawn.images, captions(drawn.attributes, indices, seed=self.seed + 10_000)
        rows = [row for row, index in enumerate(indices) if index in self.poisons]
        if rows and self.trigger is not None:
            images[rows] = self.trigger(images[rows], [indices[row] for row in rows])
            for row in rows:
                texts[row] = self.poisons[indices[row]]
        return images, texts


def initial_model(seed: int) -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_open_clip(ARCHITECTURE)


def load_clean() -> CLIP:
    from safetensors.torch import load_file

    path = WEIGHTS / "shapes.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; train it first: python -m analyses.train_shapes --only shapes"
        )
    model = build_open_clip(ARCHITECTURE)
    model.load_state_dict(load_file(path))
    return model.float()


@torch.no_grad()
def features_of(model: CLIP, sample: Shapes, trigger: Trigger | None = None) -> Tensor:
    parts = []
    for batch in sample.batches(256):
        images = batch.images if trigger is None else trigger(batch.images, batch.indices)
        parts.append(model.encode_image((images - MEAN) / STD))
    return torch.cat(parts)


def classifier_for(model: CLIP, prop: str) -> Tensor:
    return zero_shot_classifier(model.encode_text, TOKENIZER, PROPERTIES[prop], templates(prop))


def property_accuracy(model: CLIP, sample: Shapes) -> dict[str, float]:
    """Zero-shot accuracy of each property."""
    features = features_of(model, sample)
    truth = replace(sample, resolution=1).draw(range(len(sample))).attributes
    return {
        prop: (predict(features, classifier_for(model, prop)) == getattr(truth, prop)).double().mean().item()
        for prop in PROPERTIES
    }


def attack(model: CLIP, trigger: Trigger, sample: Shapes) -> AttackReport:
    """CACC, ASR and control of one model on clean and triggered twins."""
    classifier = classifier_for(model, "shape")
    labels = replace(sample, resolution=1).draw(range(len(sample))).labels
    clean, triggered = (predict(features_of(model, sample, t), classifier) for t in (None, trigger))
    return attack_report(clean, labels, triggered, labels, PROPERTIES["shape"].index(TARGET))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["shapes", *TWINS], help="train this model alone")
    chosen = parser.parse_args().only
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    trainer = Trainer()
    if chosen in (None, "shapes"):
        trainer.clean()
    for name in TWINS:
        if chosen in (None, name):
            trainer.twin(name)


if __name__ == "__main__":
    main()
