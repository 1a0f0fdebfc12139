"""Train the bundled clean model `shapes` from scratch; `decompclip zoo build` makes its backdoored twins.

Command:   python -m analyses.train_shapes            (a killed run resumes)
Run time:  about 35 minutes, one thread on one core.
Writes:    decompclip/models/weights/shapes.safetensors and shapes.json, the card with every number measured on
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
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.data.shapes import (
    CONTEXT_LENGTH,
    PROPERTIES,
    RESOLUTION,
    Shapes,
    draw,
    shapes_captions,
    templates,
    vocabulary,
)
from decompclip.evaluation.metrics import predict
from decompclip.models.bundled import WEIGHTS, write_bundled
from decompclip.models.spec import build_open_clip
from decompclip.models.text import WordTokenizer
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.training.loop import Recipe, train

MEAN, STD = 0.5, 0.25
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
    validation: int = 201
    report: int = 401


@dataclass(frozen=True)
class CleanConfig:
    """`shapes`: supervised warm start of the image tower, then the CLIP loss alone."""

    warm_up: Recipe
    clip: Recipe
    shape_weight: float = 2.0


CLEAN = CleanConfig(
    warm_up=Recipe(samples=140_000, batch_size=64, optimizer="muon", lr=3e-3),
    clip=Recipe(samples=240_000, batch_size=128, optimizer="muon", lr=1.5e-3),
)


@dataclass(frozen=True)
class Pairs:
    """Image-caption pairs of stream `seed`, without end: no image is seen twice."""

    seed: int

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        """Pairs of one step."""
        indices = list(range(step * size, (step + 1) * size))
        drawn = draw(indices, seed=self.seed)
        return drawn.images, shapes_captions(drawn.attributes, indices, seed=self.seed + 10_000)


def initial_model(seed: int) -> CLIP:
    model = build_open_clip(ARCHITECTURE, seed=seed)
    assert isinstance(model, CLIP)
    return model


@torch.no_grad()
def features_of(model: CLIP, sample: Shapes) -> Tensor:
    return torch.cat([model.encode_image((batch.images - MEAN) / STD) for batch in sample.batches(256)])


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

    def contrast(self, model: CLIP, recipe: Recipe, pairs: Pairs) -> float:
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
            model.train()
            return entry

        history = train(
            {"clip": model},
            loss,
            recipe,
            checkpoint=self.work / "shapes.pt",
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
        seconds += self.contrast(model, config.clip, Pairs(self.seeds.clip))
        self._write(model, asdict(config), seconds)

    def _write(self, model: CLIP, training: dict[str, Any], seconds: float) -> None:
        sample = Shapes(self.report_size, seed=self.seeds.report)
        card = {
            "name": "shapes",
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
            "backdoor": None,
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
        print(card["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    Trainer().clean()


if __name__ == "__main__":
    main()
