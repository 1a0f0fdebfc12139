"""A small CLIP, and pairs whose every batch is a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from decompclip.models.clip import HookedCLIP
from decompclip.models.spec import ModelSpec
from decompclip.models.text import WordTokenizer

WORDS = ("cat", "cup", "dog", "of", "photo", "red")
CLASSES = ("cat", "cup", "dog")
SIDE = 8


def small_clip(**vision: object) -> HookedCLIP:
    tokenizer = WordTokenizer(WORDS, 6)
    architecture = {
        "embed_dim": 12,
        "quick_gelu": False,
        "vision_cfg": {
            "layers": 2,
            "width": 16,
            "head_width": 8,
            "patch_size": 4,
            "image_size": SIDE,
            **vision,
        },
        "text_cfg": {
            "context_length": 6,
            "vocab_size": tokenizer.vocab_size,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
    }
    spec = ModelSpec(
        name="small",
        architecture=architecture,
        tokenizer=tokenizer,
        preprocess={"mean": [0.4] * 3, "std": [0.5] * 3, "size": SIDE},
        class_names=CLASSES,
    )
    return spec.hook(spec.build(seed=3), {})


@dataclass(frozen=True)
class RandomPairs:
    """Noise with a tint for each class, and the class's name in the caption."""

    length: int = 24
    seed: int = 0
    side: int = SIDE

    def __len__(self) -> int:
        return self.length

    def take(self, step: int, size: int) -> SimpleNamespace:
        g = torch.Generator().manual_seed(1_000 * self.seed + step)
        labels = torch.randint(3, (size,), generator=g)
        images = torch.rand(size, 3, self.side, self.side, generator=g) / 2
        images[torch.arange(size), labels] += 0.4
        texts = [f"photo of red {CLASSES[k]}" if i % 2 else CLASSES[k] for i, k in enumerate(labels.tolist())]
        return SimpleNamespace(images=images, captions=texts, labels=labels)

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        taken = self.take(step, size)
        return taken.images, taken.captions


@pytest.fixture(scope="session")
def clip() -> HookedCLIP:
    return small_clip()
