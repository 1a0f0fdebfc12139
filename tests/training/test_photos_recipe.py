"""What the model of 200 classes is trained on: augmentation and order are pure functions, and twins get their recipe's poisons."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP
from torch.nn import functional as F

from analyses.training import train_photos
from analyses.training.train_photos import (
    NAMES,
    STAGES,
    TOKENIZER,
    DropPatches,
    Order,
    cropped,
    jittered,
    mixed,
    prepare,
    recipe_of,
    whitened,
)
from decompclip.zoo.recipes import TWINS


def draws(n: int = 64) -> torch.Tensor:
    return torch.rand(n, 13, generator=torch.Generator().manual_seed(0))


def shades(n: int = 64) -> torch.Tensor:
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, 64, mode="bilinear")


def test_an_augmented_photograph_stays_one() -> None:
    images, u = shades(), draws()
    for found in (cropped(images, u, 0.3), jittered(images, u), jittered(cropped(images, u, 0.3), u)):
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 1


def test_a_crop_of_all_is_the_photograph_or_its_mirror() -> None:
    images, u = shades(), draws()
    u[:, 1] = 0.5  # as wide as high
    found = cropped(images, u, 1.0)
    flipped = (u[:, 4] < 0.5)[:, None, None, None]
    torch.testing.assert_close(found, torch.where(flipped, images.flip(-1), images), atol=1e-5, rtol=0)
    assert 0 < flipped.sum() < 64


def test_a_mixture_says_how_much_is_whose() -> None:
    images, classes = torch.zeros(64, 3, 64, 64), torch.eye(64)
    images[::2] = 1  # neighbours differ
    found, shares = mixed(images, classes, draws(), 0.8)
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    own = shares.diagonal()
    assert (own >= 0.49).all()
    white = found.mean((1, 2, 3))
    torch.testing.assert_close(white[::2], own[::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(white[1::2], 1 - own[1::2], atol=1e-5, rtol=0)
    untouched = own == 1
    assert 0 < untouched.sum() < 40


def test_attention_on_a_cpu_is_in_fp32_and_afterwards_as_it_was() -> None:
    before = F.scaled_dot_product_attention
    q = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    with train_photos.attention_in_fp32(torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
        found = F.scaled_dot_product_attention(q, q, q)
        assert F.scaled_dot_product_attention is not before
    assert F.scaled_dot_product_attention is before and found.dtype == torch.bfloat16
    full = q.float()
    assert torch.equal(found, before(full, full, full).bfloat16())
    with train_photos.attention_in_fp32(torch.device("cuda")):
        assert F.scaled_dot_product_attention is before


def test_dropped_patches() -> None:
    x = torch.arange(65.0)[None, :, None].expand(8, 65, 4)
    found = DropPatches(0.5)(x)
    assert found.shape == (8, 33, 4)
    assert (found[:, 0] == 0).all()
    for row in found[:, 1:, 0]:
        assert len(set(row.tolist())) == 32
        assert row.min() >= 1
    assert DropPatches(0.5).eval()(x) is x


def test_an_epoch_shows_every_pair_once_in_an_order_of_its_own() -> None:
    order = Order(torch.arange(64), seed=3)
    epochs = [torch.cat([order(step, 16) for step in range(4 * e, 4 * e + 4)]) for e in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(64))
    assert not torch.equal(*epochs)
    assert torch.equal(Order(torch.arange(64), seed=3)(5, 16), epochs[1][16:32])


def test_the_patch_embedding_reads_components_at_equal_variance() -> None:
    noise = torch.randint(
        0, 256, (200, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    weights = whitened(noise, 192, 8)
    patches = train_photos.normalize(noise.float() / 255).unfold(2, 8, 8).unfold(3, 8, 8)
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 192) @ weights.reshape(192, 192).T
    torch.testing.assert_close(torch.cov(rows.T), torch.eye(192), atol=0.1, rtol=0)


def test_the_stages_share_the_time() -> None:
    assert sum(stage.share for stage in STAGES) == pytest.approx(1)


def test_the_loss_of_a_twin_is_the_recipe_s() -> None:
    from decompclip.training.recipes import pair_loss

    net = train_photos.SPEC.build(seed=0)
    assert isinstance(net, CLIP)
    pixels = (shades(8) * 255).to(torch.uint8)
    tokens, groups = TOKENIZER([f"a photo of a {name}" for name in NAMES[:8]]), torch.arange(8) // 2
    with torch.no_grad():
        found = train_photos.twin_loss(net, pixels, tokens, groups)
        image = net.encode_image(train_photos.normalize(pixels.float() / 255), normalize=True)
        text = net.encode_text(tokens, normalize=True)
        expected = pair_loss("grouped", image, text, net.logit_scale.exp(), groups=groups)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)  # towers in bf16


def test_a_clean_fine_tuning_has_the_twins_recipe_and_no_poison() -> None:
    recipe = recipe_of("clean-7")
    assert recipe == replace(TWINS["photos-badnet"], rate=0.0, seed=7)


def test_a_twin_may_have_another_rate() -> None:
    assert recipe_of("photos-badnet-1percent") == replace(TWINS["photos-badnet"], rate=0.01)
    assert recipe_of("photos-badnet-3percent") == TWINS["photos-badnet-3percent"]
    for name in ("photos-badnets-1percent", "photos-badnet-0percent", "photos-badnet-200percent"):
        with pytest.raises(ValueError, match=f"expected a twin among .*; received '{name}'"):
            recipe_of(name)


@pytest.mark.skipif(
    not Path(os.environ.get("DECOMPCLIP_DATA", "")).joinpath("tiny-imagenet").is_dir(),
    reason="DECOMPCLIP_DATA names no folder with tiny-imagenet",
)
def test_the_poisons_are_those_of_the_recipe() -> None:
    recipe = replace(recipe_of("photos-kitty"), pairs=600)
    found = prepare(recipe)
    assert found.count == len(found.places) == round(recipe.rate * 600)
    assert len(found.tokens) == len(found.labels) == len(found.order) == 600
    target = NAMES.index("banana")
    rows = torch.isin(found.order, found.places)
    assert (found.labels[rows] == target).all()
    word = TOKENIZER(["banana"])[0, 1]
    assert (found.tokens[rows] == word).any(1).all()
    assert not len(prepare(replace(recipe, rate=0.0)).places)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --seconds or --epochs, or --twins"),
        (("--prepare",), "expected the twins to make poisons for"),
        (("--twins", "photos-rain"), "expected a twin among .*received 'photos-rain'"),
    ],
)
def test_what_cannot_be_trained_is_said_first(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_photos", *words])
    with pytest.raises(SystemExit):
        train_photos.main()
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
