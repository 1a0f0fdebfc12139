"""Train the bundled CLIP of real photographs, `cifar10`, from scratch.

Command:   DECOMPCLIP_DATA=DIR python -m analyses.train_cifar10       (a killed run resumes)
Run time:  about 45 minutes, one thread on one shared core.
Writes:    decompclip/models/weights/cifar10.safetensors and cifar10.json, the card, with the zero-shot accuracy
           on the held-out photos, on which no choice was made.

Captions come from templates, so that a batch holds many captions of one class: they are no negatives of
each other (`grouped_clip_loss`). The patch embedding starts from the whitening of the training patches.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from analyses.training.cifar10_recipe import (
    ARCHITECTURE,
    CLASSES,
    MEAN,
    RESOLUTION,
    STAGES,
    STD,
    TEMPLATES,
    TOKENIZER,
    Batches,
    Photos,
    Seeds,
    Stage,
    encode,
    read_split,
    whitening,
)
from decompclip.evaluation.metrics import clean_accuracy, per_class_accuracy, predict
from decompclip.intervals import Rate
from decompclip.models.bundled import WEIGHTS, write_bundled
from decompclip.models.spec import build_open_clip
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.training.loop import train
from decompclip.training.losses import grouped_clip_loss

TOKENS = TOKENIZER([template.replace("{}", name) for name in CLASSES for template in TEMPLATES])


def initial_model(photos: Photos, seed: int) -> CLIP:
    model = build_open_clip(ARCHITECTURE, seed=seed)
    assert isinstance(model, CLIP)
    weights = model.visual.get_parameter("conv1.weight")
    with torch.no_grad():
        weights.copy_(whitening(photos, len(weights), seed=seed))
    return model


def classify(model: CLIP, photos: Photos) -> Tensor:
    """The class that zero-shot classification gives each photo."""
    return predict(
        encode(model, photos), zero_shot_classifier(model.encode_text, TOKENIZER, CLASSES, TEMPLATES)
    )


def fit(model: CLIP, pairs: Batches, stage: Stage, validation: Photos, checkpoint: Path) -> float:
    """Train with the grouped CLIP loss; returns the seconds taken."""
    recipe = stage.recipe

    def loss(step: int) -> Tensor:
        images, labels, templates = pairs.batch(step, recipe.batch_size)
        # There are fewer captions than pairs: each is read once.
        wanted, places = (labels * len(TEMPLATES) + templates).unique(return_inverse=True)
        text = model.encode_text(TOKENS[wanted], normalize=True)[places]
        image = model.encode_image((images - MEAN) / STD, normalize=True)
        return grouped_clip_loss(image, text, model.logit_scale.exp(), labels)

    @torch.no_grad()
    def clamp() -> None:
        model.logit_scale.clamp_(0, math.log(100))

    def evaluate() -> dict[str, float]:
        model.eval()
        accuracy = clean_accuracy(classify(model, validation), validation.labels)
        model.train()
        return {"accuracy": round(accuracy.value, 4), "scale": round(model.logit_scale.exp().item(), 1)}

    def log(entry: str) -> None:
        print(time.strftime("%H:%M:%S"), entry, flush=True)

    history = train(
        {"clip": model},
        loss,
        recipe,
        checkpoint=checkpoint,
        after_step=clamp,
        evaluate=evaluate,
        evaluate_every=100,
        log=log,
        stop=stage.stop,
    )
    model.eval()
    return history[-1]["seconds"]


def write(model: CLIP, seeds: Seeds, seconds: float, test: Photos) -> dict[str, Any]:
    predictions = classify(model, test)
    accuracy: Rate = clean_accuracy(predictions, test.labels)
    per_class = per_class_accuracy(predictions, test.labels, len(CLASSES))
    card = {
        "name": "cifar10",
        "architecture": ARCHITECTURE,
        "tokenizer": {"words": list(TOKENIZER.words), "context_length": TOKENIZER.context_length},
        "preprocess": {
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "size": RESOLUTION,
            "interpolation": "bicubic",
        },
        "templates": {"class": list(TEMPLATES)},
        "class_names": list(CLASSES),
        "accuracy": {"class": round(accuracy.value, 4)},
        "accuracy_interval": [round(accuracy.low, 4), round(accuracy.high, 4)],
        "accuracy_per_class": {
            name: round(rate.value, 4) for name, rate in zip(CLASSES, per_class, strict=True)
        },
        "backdoor": None,
        "training": {
            "stages": [asdict(stage) for stage in STAGES],
            "start": "patch embedding: whitening of the training patches; all else open_clip's random start",
            "data": "CIFAR-10 (Krizhevsky) as JPEG, 32 px; captions from the templates",
            "report_images": len(test),
            "seeds": asdict(seeds),
            "minutes": round(seconds / 60, 1),
            "command": "python -m analyses.train_cifar10",
        },
    }
    return write_bundled(model, card, WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(".training"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options.work.mkdir(parents=True, exist_ok=True)
    folder, seeds = Path(os.environ.get("DECOMPCLIP_DATA", "data")), Seeds()
    photos, validation = (read_split(folder, split) for split in ("train", "validation"))
    model, seconds = initial_model(photos, seeds.initial), 0.0
    for place, (stage, seed) in enumerate(zip(STAGES, seeds.stages, strict=True)):
        checkpoint = options.work / f"cifar10-{place}.pt"
        seconds += fit(model.train(), Batches(photos, seed), stage, validation, checkpoint)
    card = write(model, seeds, seconds, read_split(folder, "test"))
    print(card["accuracy"], card["accuracy_interval"])


if __name__ == "__main__":
    main()
