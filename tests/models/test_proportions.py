"""Extreme proportions: the same window as scaling first, without the gigabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from decompclip.data.pixels import to_pixels
from decompclip.models.loading import load
from decompclip.models.preprocessing import Steps, open_clip_transform

MODES = ("shortest", "squash", "longest")
SIZES = [(224, 224), (32, 32), (24, 16)]


def both(mode: str, size: tuple[int, int], interpolation: str = "bicubic") -> tuple[Callable, Callable]:
    cfg = PreprocessCfg(size, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=mode)  # pyright: ignore[reportArgumentType]
    plain: Any = image_transform_v2(cfg, is_train=False)
    return plain, open_clip_transform(cfg)


def noise(width: int, height: int) -> Image.Image:
    """Smooth, as photographs are: a shift of a tenth of a pixel shows, noise of single pixels would show nothing else."""
    pixels = np.random.default_rng(width).integers(
        0, 256, (max(1, height // 3), max(1, width // 3), 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def largest_picture(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Notes the pixels of every picture that scaling goes through: Pillow scales the width first, then the height."""
    sizes: list[int] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        sizes.extend([size[0] * self.height, size[0] * size[1]])
        return resize(self, size, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", noted)
        yield sizes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (64, 64), (500, 70), (33, 260), (10, 7)])
def test_ordinary_pictures_come_out_bit_for_bit(
    shape: tuple[int, int], mode: str, size: tuple[int, int]
) -> None:
    plain, cut = both(mode, size)
    assert torch.equal(plain(noise(*shape)), cut(noise(*shape)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize(
    "shape",
    [(40, 900), (903, 41), (907, 44), (3, 100), (1, 97), (1000, 11)],
)
def test_extreme_ones_show_the_same_window_to_within_rounding(
    shape: tuple[int, int], mode: str, size: tuple[int, int], interpolation: str
) -> None:
    plain, cut = both(mode, size, interpolation)
    apart = (plain(noise(*shape)) - cut(noise(*shape))).abs()
    assert apart.mean() < 2 / 255
    assert apart.max() < 8 / 255


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 5_000_000), (5_000_000, 2)])
def test_no_picture_grows_beyond_a_few_windows(
    shape: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cut = both(mode, (224, 224))
    picture = Image.new("RGB", shape, (255, 0, 0))
    with largest_picture(monkeypatch) as sizes:
        pixels = cut(picture)
    assert pixels.shape == (3, 224, 224)
    assert max(sizes, default=0) <= max(16 * 224 * 224, picture.width * picture.height)
    assert pixels[0].max() == 1
    assert pixels[1:].max() == 0


@pytest.mark.parametrize("steps", [Steps(256, (224, 224), 3), Steps((224, 224), None, 2)])
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_processors_of_transformers_cut_too(
    steps: Steps, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with largest_picture(monkeypatch) as sizes:
        assert steps(Image.new("RGB", shape)).size == (224, 224)
    assert max(sizes) <= 16 * 256 * 256


def test_the_models_and_the_pairs_preprocessing_are_such(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (1, 100_000), (255, 0, 0))
    for transform in (load("shapes").preprocess, to_pixels(224), to_pixels((24, 16), resize_mode="squash")):
        with largest_picture(monkeypatch) as sizes:
            transform(picture)
        assert 0 < max(sizes) <= 16 * 224 * 224
