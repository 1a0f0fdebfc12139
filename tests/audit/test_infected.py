"""Who is infected: by simultaneous intervals and an equal share, computed here in another way."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from decompclip.audit.components import Shift, infected_parts


def shift(heads: torch.Tensor, mlps: torch.Tensor, error: float) -> Shift:
    return Shift(
        heads.abs(), heads.abs() / 10, heads, torch.full_like(heads, error),
        mlps.abs(), mlps.abs() / 10, mlps, torch.full_like(mlps, error),
        {}, True,
    )  # fmt: skip


def test_pulls_beyond_chance_and_more_than_an_equal_share() -> None:
    heads = torch.tensor([[0.30, 0.02], [-0.2, 0.10]])
    mlps = torch.tensor([0.01, 0.50])
    error = 0.03
    wide = error / norm.ppf(0.975) * norm.ppf(1 - 0.025 / 6)
    parts = infected_parts(shift(heads, mlps, error), affected=True)
    assert [(str(p.part), p.infected) for p in parts] == [
        ("mlps[1]", True),
        ("heads[0, 0]", True),
        ("heads[1, 1]", False),  # beyond chance, but less than a sixth of 0.93
        ("heads[0, 1]", False),
        ("mlps[0]", False),
        ("heads[1, 0]", False),
    ]
    assert parts[0].error == pytest.approx(wide)
    assert parts[0].share == pytest.approx(0.5 / 0.93)


def test_none_where_nothing_happens_or_nothing_is_known() -> None:
    heads, mlps = torch.tensor([[0.3]]), torch.tensor([0.1])
    assert not any(p.infected for p in infected_parts(shift(heads, mlps, 0.01), affected=False))
    assert not any(p.infected for p in infected_parts(shift(heads, mlps, float("nan")), affected=True))
    assert not any(p.infected for p in infected_parts(shift(-heads, -mlps, 0.01), affected=True))
