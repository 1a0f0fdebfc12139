"""SIG: one sinusoid along the columns."""

from __future__ import annotations

import math

import pytest
import torch

from decompclip.attacks.whole_image import SIG


def test_the_wave_by_hand() -> None:
    grey = torch.full((2, 3, 4, 32), 0.5)
    added = SIG(amplitude=0.1, frequency=3)(grey) - grey
    for column in range(32):
        value = 0.1 * math.sin(2 * math.pi * 3 * column / 32)
        torch.testing.assert_close(added[..., column], torch.full((2, 3, 4), value), atol=1e-6, rtol=0)


def test_the_periods_are_the_images_at_every_resolution() -> None:
    for width in (48, 224):
        row = SIG()(torch.full((1, 3, 8, width), 0.5))[0, 0, 0] - 0.5
        assert int(torch.fft.rfft(row).abs().argmax()) == 6
        assert row.abs().max() == pytest.approx(40 / 255, rel=0.02)


def test_nothing_is_drawn() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SIG(seed=1)(images, [5, 6, 7]), SIG(seed=2)(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SIG(amplitude=40), r"expected an amplitude in \(0, 1\]; received 40"),
        (lambda: SIG(frequency=0), r"expected a frequency above 0; received 0"),
        (lambda: SIG(frequency=math.nan), r"received nan"),
        (lambda: SIG()(torch.zeros(1, 3, 12, 12)), r"more than 12 columns.*received 12; lower the frequency"),
    ],
)
def test_bad_input_is_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
