"""What the model of photographs is trained on; and that it does what its card says."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from analyses.training.train_cifar10 import (
    CLASSES,
    MEAN,
    PATCH,
    STAGES,
    STD,
    TEMPLATES,
    TOKENIZER,
    VALIDATION,
    Batches,
    Photos,
    Seeds,
    augment,
    read_photos,
    read_split,
    whitening,
)
from decompclip.evaluation.metrics import predict
from decompclip.models.bundled import bundled, card, load_bundled


def photos(n: int = 64) -> Photos:
    """Smooth shades with a little noise, as photographs are."""
    g = torch.Generator().manual_seed(0)
    shades = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=g), 32, mode="bicubic")
    noisy = (shades + 0.05 * torch.randn(n, 3, 32, 32, generator=g)).clamp(0, 1)
    return Photos((noisy * 255).to(torch.uint8), torch.arange(n) % 10)


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    a, b = Batches(photos(), 1), Batches(photos(), 1)
    b.batch(0, 16)
    for x, y in zip(a.batch(3, 16), b.batch(3, 16), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.batch(3, 16)[0], a.batch(2, 16)[0])
    assert not torch.equal(a.batch(3, 16)[0], Batches(photos(), 2).batch(3, 16)[0])


def test_an_epoch_shows_every_photo_once() -> None:
    data = Photos(photos().pixels, torch.arange(64))
    for epoch in (0, 1):
        seen = torch.cat([Batches(data, 1).batch(4 * epoch + step, 16)[1] for step in range(4)])
        assert sorted(seen.tolist()) == list(range(64))


def test_augmentation_flips_crops_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    images = photos().images()
    flipped = augment(images, g, padding=0, jitter=0.0)
    same = (flipped == images).flatten(1).all(1)
    assert torch.equal(flipped[~same], images[~same].flip(3))
    assert 16 < int(same.sum()) < 48
    moved = augment(images, g, padding=4, jitter=0.2)
    assert moved.shape == images.shape and moved.min() >= 0 and moved.max() <= 1
    inner = augment(images, g, padding=4, jitter=0.0)
    for image, crop in zip(images[:8], inner[:8], strict=True):
        padded = torch.nn.functional.pad(image[None], (4,) * 4, mode="reflect")[0]
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
        places = [(y, x) for y in range(9) for x in range(9)]
        assert any(
            torch.equal(crop, w) or torch.equal(crop, w.flip(2))
            for w in (windows[:, y, x] for y, x in places)
        )


def test_the_patch_embedding_sees_equal_variances() -> None:
    data = photos(256)
    weights = whitening(data, 20, seed=0, epsilon=0.0)
    patches = rearrange((data.images() - MEAN) / STD, "b c (y p) (x q) -> (b y x) (c p q)", p=PATCH, q=PATCH)
    covariance = torch.cov((patches @ rearrange(weights, "d c p q -> (c p q) d")).T)
    torch.testing.assert_close(covariance, torch.eye(20), rtol=0, atol=1e-3)


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0000.tar", "w") as archive:
        for place in (1, 0):
            buffer = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 100 * place, np.uint8)).save(buffer, "png")
            for suffix, content in (("jpg", buffer.getvalue()), ("cls", str(place + 3).encode())):
                member = tarfile.TarInfo(f"{place:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    read = read_photos([tmp_path / "train-0000.tar"])
    assert read.labels.tolist() == [3, 4]
    assert read.pixels[:, 0, 0, 0].tolist() == [0, 100]
    with pytest.raises(FileNotFoundError, match="received none; set DECOMPCLIP_DATA to DIR"):
        read_split(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="as WebDataset shards"):
        read_photos([])


def test_captions_are_known_words() -> None:
    known = set(TOKENIZER.words)
    for template in TEMPLATES:
        for name in CLASSES:
            words = template.replace("{}", name).split()
            assert set(words) <= known
            assert len(words) <= TOKENIZER.context_length - 2
    assert len(STAGES) == len(Seeds().stages)


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of photographs"
)
def test_splits_are_apart_and_the_card_is_true() -> None:
    folder = Path(os.environ["DECOMPCLIP_DATA"])
    held_out = read_split(folder, "test")
    assert len(held_out) == 5_000
    assert (len(read_split(folder, "validation")), VALIDATION) == (2_000, 2_000)
    assert "cifar10" in bundled()
    model, facts = load_bundled("cifar10"), card("cifar10")
    assert facts["accuracy"]["class"] >= 0.70
    with torch.no_grad():
        features = torch.cat(
            [
                model.encode_image(model.normalize(held_out.images(slice(start, start + 100))))
                for start in range(0, len(held_out), 100)
            ]
        )
        found = predict(features, model.zero_shot_classifier())
    accuracy = (found == held_out.labels).double().mean().item()
    assert accuracy == pytest.approx(facts["accuracy"]["class"], abs=0.003)  # fp16 weights
