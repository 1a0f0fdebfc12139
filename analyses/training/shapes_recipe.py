"""How `shapes`, the bundled clean model, is made: architecture, seeds, recipe, pairs, and how it is measured.

`analyses.train_shapes` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

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
from decompclip.models.spec import build_open_clip
from decompclip.models.text import WordTokenizer
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.training.loop import Recipe

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
