"""Two ways beside each other on the same images: counts, published intervals, and how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from decompclip.intervals import Paired, half_width, mean_interval, noticeable


def test_counts_by_hand() -> None:
    before = torch.tensor([True, True, True, False, False, True])
    after = torch.tensor([True, False, False, True, False, False])
    found = Paired.of(before, after)
    assert found == Paired(gained=1, lost=3, total=6)
    assert found.value == pytest.approx(-2 / 6)
    mirrored = Paired.of(after, before)
    assert mirrored.value == -found.value
    low, high = found.interval()
    assert mirrored.interval() == pytest.approx((-high, -low))


@pytest.mark.parametrize(("gained", "lost", "total"), [(12, 2, 60), (0, 5, 40), (30, 30, 100)])
@pytest.mark.parametrize("comparisons", [1, 7])
def test_the_interval_is_bonett_and_price_s(gained: int, lost: int, total: int, comparisons: int) -> None:
    p, q, n = (gained + 1) / (total + 2), (lost + 1) / (total + 2), total + 2
    half = norm.isf(0.025 / comparisons) * math.sqrt((p + q - (p - q) ** 2) / n)
    assert Paired(gained, lost, total).interval(comparisons) == pytest.approx((p - q - half, p - q + half))


def test_the_interval_holds_the_value_and_stays_among_differences() -> None:
    for total in (1, 2, 5):
        for gained in range(total + 1):
            for lost in range(total + 1 - gained):
                found = Paired(gained, lost, total)
                low, high = found.interval()
                assert -1 <= low <= found.value <= high <= 1


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw, tries = np.random.default_rng(0), 2000
    counts = draw.multinomial(80, [0.2, 0.1, 0.7], size=tries)
    covered = 0
    for gained, lost, _ in counts.tolist():
        low, high = Paired(gained, lost, 80).interval()
        covered += low <= 0.1 <= high
    assert 0.94 <= covered / tries <= 0.97


def test_the_least_noticeable_difference_is_the_first_whose_interval_clears_the_margin() -> None:
    found = noticeable(50, comparisons=3, margin=0.02)
    assert found is not None
    gained = round(found * 50)
    assert Paired(gained, 0, 50).interval(3)[0] > 0.02 >= Paired(gained - 1, 0, 50).interval(3)[0]
    assert noticeable(2, comparisons=3, margin=0.02) is None
    edge = Paired(9, 0, 50).interval(1)[0]
    assert noticeable(50, comparisons=1, margin=edge) == 10 / 50  # at the margin is not above it


def test_the_mean_s_interval_is_student_s() -> None:
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 2
    mean, low, high = mean_interval(x)
    half = t.isf(0.025, 29) * float(np.std(x.double().numpy(), ddof=1)) / math.sqrt(30)
    assert (mean, low, high) == pytest.approx(
        (x.mean().item(), x.mean().item() - half, x.mean().item() + half)
    )
    assert half == pytest.approx(float(half_width(x.double())))
    assert mean_interval(x[:1]) == (pytest.approx(x[0].item()), -math.inf, math.inf)
    assert mean_interval(x[:2])[1] > -math.inf
