"""PSNR and SSIM against plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from decompclip.attacks.patch import BadNet
from decompclip.attacks.preview import compare, psnr, ssim


def pictures(height: int = 24, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 3, height, width, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean, (clean + noise).clamp(0, 1)


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One window after the other, as Wang et al. write it."""
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weight = np.outer(g, g) / g.sum() ** 2
    values = []
    for channel in range(3):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a = x[channel, top : top + 11, left : left + 11]
                b = y[channel, top : top + 11, left : left + 11]
                ma, mb = (weight * a).sum(), (weight * b).sum()
                va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
                c = (weight * (a - ma) * (b - mb)).sum()
                values.append(
                    (2 * ma * mb + 1e-4) * (2 * c + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
                )
    return float(np.mean(values))


def test_ssim_is_the_slow_references() -> None:
    clean, triggered = pictures()
    expected = [slow_ssim(a.numpy(), b.numpy()) for a, b in zip(clean, triggered, strict=True)]
    torch.testing.assert_close(ssim(clean, triggered), torch.tensor(expected, dtype=torch.float64))


def test_psnr_by_hand() -> None:
    clean = torch.zeros(2, 3, 11, 11)
    shifted = torch.stack([clean[0] + 0.1, clean[1] + 0.01])
    torch.testing.assert_close(psnr(clean, shifted), torch.tensor([20.0, 40.0]))


def test_equal_images_are_perfect() -> None:
    clean, _ = pictures()
    quality = compare(clean, clean)
    assert quality.psnr.isinf().all()
    torch.testing.assert_close(quality.ssim, torch.ones_like(quality.ssim))
    assert quality.summary() == {"psnr": math.inf, "ssim": 1.0, "changed": 0.0}


def test_both_are_symmetric_and_do_not_mix_images() -> None:
    clean, triggered = pictures()
    for measured in (psnr, ssim):
        torch.testing.assert_close(measured(clean, triggered), measured(triggered, clean))
        torch.testing.assert_close(measured(clean, triggered)[1:2], measured(clean[1:2], triggered[1:2]))


def test_the_changed_share_of_a_patch_is_its_area() -> None:
    images = torch.full((5, 3, 32, 32), 0.5)
    torch.testing.assert_close(compare(images, BadNet(size=0.25)(images)).changed, torch.full((5,), 1 / 16))


def test_bad_input_is_told() -> None:
    clean, triggered = pictures()
    with pytest.raises(
        ValueError,
        match=r"expected clean and triggered images .* of one shape; received \[3, 3, 24, 20\] and \[2, 3",
    ):
        ssim(clean, triggered[:2])
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, SSIM's window; received 10 x 20"):
        ssim(clean[..., :10, :], triggered[..., :10, :])
