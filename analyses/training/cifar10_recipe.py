"""How `cifar10`, the bundled CLIP of real photographs, is made: data, captions, architecture, recipe.

`analyses.train_cifar10` runs it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from open_clip.model import CLIP
from torch import Tensor

from decompclip.data.files import open_rgb
from decompclip.models.text import WordTokenizer
from decompclip.training.loop import Recipe


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
