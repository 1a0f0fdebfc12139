"""Pixels that were not normalised are noticed, and normalised ones never are taken for such."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

import decompclip
from decompclip.data.shapes import Shapes
from decompclip.models.preprocessing import RawPixels

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def tells(images: torch.Tensor, mean: Any = CLIP[0], std: Any = CLIP[1]) -> bool:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        RawPixels().look(images, mean, std)
    return bool(told)


def normalised(pixels: torch.Tensor, how: Any = CLIP) -> torch.Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in how)
    return (pixels - mean) / std


def bits(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 255).round() / 255


NOISE = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_raw_pixels_are_told(how: Any) -> None:
    assert tells(NOISE, *how)
    assert tells(bits(0.3 + 0.2 * NOISE), *how)  # low in contrast, as read from a file
    assert tells(255 * NOISE, *how)


@pytest.mark.parametrize("how", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize(
    ("low", "width"), [(0, 1), (0, 0.1), (0.9, 0.1), (0.5, 0.5), (0.5, 0.2), (0, 0), (0.6, 0), (1, 0)]
)
def test_normalised_images_are_not(how: Any, low: float, width: float) -> None:
    """Ordinary, dark, bright, pale and of one colour, of 8 bits or not."""
    assert not tells(normalised(bits(low + width * NOISE), how), *how)
    assert not tells(normalised(low + width * 0.97 * NOISE, how), *how)


@pytest.mark.parametrize("how", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("most", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_raw_pixels_that_are_dark_and_resized_are_told(how: Any, most: float, mode: str) -> None:
    images = Shapes(64, seed=1).draw(range(64)).images
    dark = most * interpolate(interpolate(images, scale_factor=0.7, mode=mode), size=48, mode=mode)
    assert tells(dark, *how)
    assert not tells(normalised(dark, how), *how)
    assert not tells(normalised(1 - dark / 2, how), *how)  # none darker than the mean


@pytest.mark.parametrize("how", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_normalised_images_of_one_colour_each_are_not(how: Any) -> None:
    colours = torch.tensor(how[0]) + torch.tensor([[0.0], [0.001], [0.2]])
    flat = colours[:, :, None, None].expand(3, 3, 8, 8)
    assert not tells(normalised(flat + 1e-4, how), *how)
    assert not tells(normalised(flat[1:2] + 1e-4, how), *how)


def test_a_model_warns_once_at_its_caller() -> None:
    model, images = decompclip.load("shapes"), Shapes(8, seed=1).draw(range(8)).images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_image(model.normalize(images))
        model.encode_image(model.normalize(images / 20))
    with pytest.warns(
        UserWarning, match="as pixels in .0, 1. do.*pass pixels in .0, 1. through `model.normalize`"
    ) as told:
        model.decompose(images)
        model.encode_image(images)
    assert len(told) == 1
    assert told[0].filename == __file__
