"""Splits are disjoint, exhaustive and seeded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from decompclip.data.images import split_indices


@given(st.integers(10, 300), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_parts_are_disjoint_exhaustive_and_of_the_size_asked_for(n: int, fraction: float, seed: int) -> None:
    first, second = split_indices(n, fraction, seed)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(n))
    assert len(first) == round(fraction * n)
    assert torch.equal(first, first.sort().values)
    assert torch.equal(second, second.sort().values)


def test_the_seed_decides() -> None:
    first, second = split_indices(100, 0.2, 0)
    again, _ = split_indices(100, 0.2, 0)
    other, _ = split_indices(100, 0.2, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(second) == 80


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    split_indices(100, 0.2, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("n", "fraction"), [(0, 0.2), (1, 0.5), (2, 0.2), (100, 0.0), (100, 1.0), (100, 1.5)]
)
def test_an_empty_part_is_refused(n: int, fraction: float) -> None:
    words = f"received {n} images and the fraction {fraction}, which leaves one part empty; take a fraction"
    with pytest.raises(ValueError, match=words):
        split_indices(n, fraction, 0)
