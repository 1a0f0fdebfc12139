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
import io
import math
import os
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from open_clip.model import CLIP
from torch import Tensor

from decompclip.data.files import open_rgb
from decompclip.evaluation.metrics import clean_accuracy, per_class_accuracy, predict
from decompclip.intervals import Rate
from decompclip.models.bundled import WEIGHTS, write_bundled
from decompclip.models.spec import build_open_clip
from decompclip.models.text import WordTokenizer
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.training.loop import Recipe, train
from decompclip.training.recipes import grouped_clip_loss


@dataclass(frozen=True)
class Stage:
    """A recipe, and after how many of its steps to leave it."""

    recipe: Recipe
    stop: int | None = None


RESOLUTION, PATCH = 32, 8
MEAN, STD = 0.5, 0.25
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "an image of a {}",
    "a small photo of a {}",
)
CONTEXT_LENGTH = 10
TOKENIZER = WordTokenizer(
    tuple(sorted({*CLASSES, *" ".join(TEMPLATES).replace("{}", "").split()})), CONTEXT_LENGTH
)
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {
        "layers": 6,
        "width": 128,
        "head_width": 16,
        "patch_size": PATCH,
        "image_size": RESOLUTION,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": TOKENIZER.vocab_size,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}
# The rate falls as a cosine for the first stage's schedule, which is left early; a new cosine takes it to zero.
STAGES = (
    Stage(
        Recipe(samples=700_000, batch_size=256, optimizer="muon", lr=3e-3, weight_decay=0.05),
        stop=1_200,
    ),
    Stage(Recipe(samples=204_800, batch_size=256, optimizer="muon", lr=2e-3, weight_decay=0.05, warmup=0.02)),
)
VALIDATION = 2_000
"""The last photos of the training part, never trained on: every choice was made on them."""


@dataclass(frozen=True)
class Seeds:
    initial: int = 0
    stages: tuple[int, ...] = (501, 511)


@dataclass(frozen=True)
class Photos:
    """Photos in memory with their classes."""

    pixels: UInt8[Tensor, "image 3 h w"]
    labels: Int[Tensor, " image"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Photos:
        return Photos(self.pixels[part], self.labels[part])

    def images(self, part: slice | Tensor = slice(None)) -> Float[Tensor, "batch 3 h w"]:
        return self.pixels[part].float() / 255


def read_photos(shards: Sequence[Path]) -> Photos:
    """All photos of WebDataset shards of `.jpg` and `.cls`, in order.

    Raises:
        FileNotFoundError: no shards.
    """
    if not shards:
        raise FileNotFoundError(
            "expected CIFAR-10 as WebDataset shards in DIR/cifar-10; received none; set DECOMPCLIP_DATA to DIR"
        )
    pixels, labels = [], []
    for shard in shards:
        with tarfile.open(shard) as archive:
            members = {m.name: archive.extractfile(m) for m in archive if m.isfile()}
            for name in sorted(n for n in members if n.endswith(".jpg")):
                photo, label = members[name], members[name[:-4] + ".cls"]
                assert photo is not None and label is not None
                pixels.append(np.asarray(open_rgb(io.BytesIO(photo.read()))))
                labels.append(int(label.read()))
    stacked = torch.from_numpy(np.stack(pixels))
    return Photos(rearrange(stacked, "n h w c -> n c h w").contiguous(), torch.tensor(labels))


def read_split(folder: Path, split: str) -> Photos:
    """`train`, `validation` (the last part of the training photos) or `test` under `folder`."""
    photos = read_photos(sorted(folder.glob(f"cifar-10/{'test' if split == 'test' else 'train'}-*.tar")))
    match split:
        case "train":
            return photos[:-VALIDATION]
        case "validation":
            return photos[-VALIDATION:]
        case "test":
            return photos
        case _:
            raise ValueError(f"expected a split train, validation or test; received {split!r}")


@dataclass(frozen=True)
class Batches:
    """Augmented photos with captions: step `i` is a pure function of `(seed, i)`."""

    photos: Photos
    seed: int
    padding: int = 4
    jitter: float = 0.2

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [0, 1], their classes, and the template that captions each."""
        epoch, start = divmod(step * size, len(self.photos) - len(self.photos) % size)
        order = torch.randperm(len(self.photos), generator=_generator(self.seed, epoch))
        chosen = order[start : start + size]
        g = _generator(self.seed + 1, step)
        images = augment(self.photos.images(chosen), g, padding=self.padding, jitter=self.jitter)
        return images, self.photos.labels[chosen], torch.randint(len(TEMPLATES), (size,), generator=g)


def augment(
    images: Float[Tensor, "batch 3 h w"], generator: torch.Generator, *, padding: int, jitter: float
) -> Float[Tensor, "batch 3 h w"]:
    """Flip half, crop after padding by reflection, and change brightness, contrast and colour a little."""
    n, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4, mode="reflect")
    top, left = torch.randint(2 * padding + 1, (2, n), generator=generator)
    columns = left[:, None] + torch.arange(w)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    rows = top[:, None] + torch.arange(h)
    batch = torch.arange(n)[:, None, None]
    cropped = rearrange(padded[batch, :, rows[:, :, None], columns[:, None, :]], "b h w c -> b c h w")
    gain = 1 + jitter * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)  # of each channel: colour
    shift = jitter / 2 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
    return (cropped * gain + shift).clamp(0, 1)


def whitening(photos: Photos, width: int, *, seed: int, epsilon: float = 1e-2) -> Tensor:
    """Weights of a patch embedding that reads the leading principal components of patches at equal variance.

    Patches of photos vary a thousand times more along slow shades than along fine detail; a short training
    that starts from random weights hardly gets past the former.
    """
    g = torch.Generator().manual_seed(seed)
    images = (photos.images(torch.randperm(len(photos), generator=g)[:5_000]) - MEAN) / STD
    patches = rearrange(images, "b c (y p) (x q) -> (b y x) (c p q)", p=PATCH, q=PATCH)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T).double())
    rows = (vectors / (values + epsilon).sqrt()).T.flip(0)[:width]
    return rearrange(rows.float(), "d (c p q) -> d c p q", p=PATCH, q=PATCH)


@torch.no_grad()
def encode(model: CLIP, photos: Photos, batch_size: int = 500) -> Float[Tensor, "image d_embed"]:
    return torch.cat(
        [
            model.encode_image((photos.images(slice(start, start + batch_size)) - MEAN) / STD)
            for start in range(0, len(photos), batch_size)
        ]
    )


def _generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, place]).generate_state(1)[0]))


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
