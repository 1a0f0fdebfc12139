"""ISSBA: the residual spells the secret, invisibly, and only there; training resumes to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from analyses.training.train_issba import Config, batch, run, textures
from decompclip.attacks.issba import (
    ISSBA,
    WEIGHTS,
    SecretNetworks,
    SecretShape,
    build,
    networks_path,
    read_networks,
    write_networks,
)
from decompclip.attacks.preview import compare
from decompclip.data.shapes import Shapes, draw
from decompclip.models.errors import CheckpointError
from decompclip.training.loop import Recipe

TRIGGER = ISSBA()
IMAGES = Shapes(64, seed=31).draw(range(64)).images
SMALL = SecretShape(bits=3, side=16, width=2)


def test_the_bundled_pair_keeps_its_promise() -> None:
    """docs/method.md, section 5: bit accuracy >= 0.95 and PSNR >= 28 dB, on images that no training saw, at their 8 bits."""
    noise = textures(64, 48, torch.Generator().manual_seed(77))
    for images in (IMAGES, noise):
        triggered = (TRIGGER(images) * 255).round() / 255
        assert TRIGGER.bit_accuracy(triggered).mean() >= 0.95
        quality = compare(images, TRIGGER(images))
        assert quality.psnr.min() >= 28
        assert quality.ssim.mean() > 0.93


def test_clean_images_do_not_carry_the_secret() -> None:
    assert TRIGGER.bit_accuracy(IMAGES).mean() < 0.75


def test_each_image_gets_a_residual_of_its_own_and_each_seed_a_secret() -> None:
    residual = TRIGGER(IMAGES[:2]) - IMAGES[:2]
    assert (residual[0] - residual[1]).abs().max() > 1 / 255
    every = TRIGGER(IMAGES) - IMAGES
    shared = every.mean(dim=0).square().sum() / every.square().sum(dim=(1, 2, 3)).mean()
    assert TRIGGER.structure == "structured"
    assert 0.5 < shared < 0.8  # yet most of it recurs with the secret
    other = ISSBA(seed=1)
    assert not torch.equal(other.secret, TRIGGER.secret)
    assert other.bit_accuracy(other(IMAGES)).mean() >= 0.95
    assert other.bit_accuracy(TRIGGER(IMAGES)).mean() < 0.9


def test_another_size_is_brought_to_the_networks_and_back() -> None:
    large = draw(range(8), seed=31, resolution=112).images
    triggered = TRIGGER(large)
    assert triggered.shape == large.shape
    assert (triggered - large).abs().max() <= TRIGGER.networks.shape.strength + 1e-6
    assert TRIGGER.bit_accuracy(triggered).mean() >= 0.9


def test_the_residual_is_bounded_whatever_the_weights() -> None:
    encoder, decoder = build(SMALL)
    with torch.no_grad():
        encoder.residual.weight.mul_(1e4)
        residual = encoder(
            torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(3, 3)
        )
    assert residual.abs().max() == pytest.approx(SMALL.strength)
    assert decoder(torch.zeros(3, 3, 16, 16)).shape == (3, 3)


def test_the_spatial_transformer_starts_as_the_identity_and_can_shift() -> None:
    """With its map set to a shift, the decoder reads a shifted image as it read the image in place."""
    _, decoder = build(SMALL)
    image = torch.zeros(1, 3, 16, 16)
    image[..., 5:10, 5:10] = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    shifted = image.roll(1, dims=-1)
    with torch.no_grad():
        straight = decoder(image)
        assert not torch.allclose(decoder(shifted), straight, atol=1e-6)
        decoder.affine.bias[2] = 10 * 2 / 16  # one pixel to the right, in units of a tenth of half the width
        torch.testing.assert_close(decoder(shifted), straight, atol=1e-5, rtol=0)


def test_training_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = Recipe(samples=64, batch_size=4, lr=1e-3)
    config = Config(shape=SMALL, recipe=recipe, report_size=16, checkpoint_every=8)
    whole = run(config, tmp_path / "whole", folder=tmp_path / "a")

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(config, tmp_path / "cut", folder=tmp_path / "b", log=kill, evaluate_every=12)
    resumed = run(config, tmp_path / "cut", folder=tmp_path / "b")
    assert (tmp_path / "cut" / "issba.pt").exists()
    assert resumed["sha256"] == whole["sha256"]
    assert read_networks(str(tmp_path / "a" / "issba.safetensors")).shape == SMALL


def test_training_images_are_a_function_of_the_step() -> None:
    first = batch(3, 4, seed=1, side=16)
    assert torch.equal(batch(3, 4, seed=1, side=16), first)
    assert not torch.equal(batch(4, 4, seed=1, side=16), first)
    assert 0 <= first.min() <= first.max() <= 1


def test_a_steep_spectrum_is_a_smooth_texture() -> None:
    """Neighbouring pixels of 1/f noise go together; those of white noise would not."""
    images = textures(50, 32, torch.Generator().manual_seed(0))
    x, y = images[..., 1:].flatten(), images[..., :-1].flatten()
    assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.7


def test_the_card_tells_what_the_weights_are() -> None:
    card = json.loads((WEIGHTS / "issba.json").read_text(encoding="utf-8"))
    for world in ("shapes", "textures"):
        assert card[world]["bit_accuracy"] >= 0.95
        assert card[world]["psnr"] >= 28
    assert (WEIGHTS / "issba.safetensors").stat().st_size < 1_000_000
    assert card["seconds"] < 3_600


def test_bad_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no networks of ISSBA at 'isba'; expected one of \['issba'\]"):
        networks_path("isba")
    encoder, decoder = build(SMALL)
    write_networks(SecretNetworks(SMALL, encoder, decoder), {}, tmp_path, name="mine")
    path = tmp_path / "mine.safetensors"
    assert ISSBA(weights=str(path)).secret.shape == (3,)
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"no card at .*copy\.json; it must lie beside copy\.safetensors"
    ):
        read_networks(str(tmp_path / "copy.safetensors"))
    (tmp_path / "copy.json").write_text(
        (tmp_path / "mine.json").read_text().replace('"sha256": "', '"sha256": "0'), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"is not what its card describes: its SHA-256 differs"):
        read_networks(str(tmp_path / "copy.safetensors"))
    with pytest.raises(ValueError, match="expected a gain above 0; received 0"):
        ISSBA(gain=0)
    with pytest.raises(ValueError, match="multiple of 8; received 20"):
        SecretShape(side=20)
    with pytest.raises(ValueError, match=r"strength in \(0, 1\]; received .*strength=0"):
        SecretShape(strength=0)
