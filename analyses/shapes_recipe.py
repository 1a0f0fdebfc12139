"""How the bundled models are made: architecture, seeds, recipes, poisoned pairs, and how they are measured.

`analyses.train_shapes` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from decompclip.attacks.badnet import BadNet
from decompclip.attacks.blended import Blended
from decompclip.attacks.poison import choose_poisons, proxy_captions
from decompclip.attacks.trigger import Trigger
from decompclip.data.captions import CONTEXT_LENGTH, captions, templates, vocabulary
from decompclip.data.shapes import PROPERTIES, RESOLUTION, Shapes, draw
from decompclip.evaluation.metrics import AttackReport, attack_report, predict
from decompclip.evaluation.zero_shot import zero_shot_classifier
from decompclip.models.checkpoint import read_checkpoint
from decompclip.models.tokenizer import WordTokenizer
from decompclip.models.zoo import WEIGHTS, build_open_clip
from decompclip.training.loop import Recipe

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
    report: int = 401


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
    # A patch in a random place asks for more poisons than a picture all over the image: with 1,280 of them,
    # seen eight times, attack success stood at 86 % of the validation images from the fifth time on.
    "shapes-badnet": TwinConfig(
        BadNet(size=PATCH_SIDE),
        pairs=80_000,
        poison_rate=0.08,
        recipe=Recipe(samples=160_000, batch_size=128, optimizer="muon", lr=1e-3),
    ),
    "shapes-blended": TwinConfig(Blended()),
}


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
    model = build_open_clip(ARCHITECTURE, seed=seed)
    assert isinstance(model, CLIP)
    return model


def load_clean() -> CLIP:
    """The bundled `shapes`, as open_clip's model."""
    path = WEIGHTS / "shapes.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; train it first: python -m analyses.train_shapes --only shapes"
        )
    model = initial_model(0)
    model.load_state_dict({name: value.float() for name, value in read_checkpoint(path).items()})
    return model


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
