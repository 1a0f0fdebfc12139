"""Controls for Decomp-Rep (He et al., table 3)."""

from __future__ import annotations

import pytest
import torch

from decompclip.defenses.decomp import fixed_heads, random_heads


def test_fixed_heads_are_those_flagged_most_often() -> None:
    flags = torch.zeros(5, 2, 3, dtype=torch.bool)
    flags[:4, 1, 2] = flags[:3, 0, 1] = flags[:1, 1, 0] = True
    assert fixed_heads(flags, 2).tolist() == [[False, True, False], [False, False, True]]
    with pytest.raises(ValueError, match=r"a count in 1\.\.3, of heads that are ever flagged; received 4"):
        fixed_heads(flags, 4)


def test_random_heads_are_as_many_and_judged() -> None:
    judged = torch.zeros(2, 8, dtype=torch.bool)
    judged[1] = True
    flags = judged & (torch.rand(50, 2, 8, generator=torch.Generator().manual_seed(0)) < 0.5)
    random = random_heads(flags, judged, seed=1)
    assert torch.equal(random.sum((1, 2)), flags.sum((1, 2)))
    assert not random[:, 0].any() and random.any(0)[1].all()
    assert torch.equal(random, random_heads(flags, judged, seed=1))
    assert not torch.equal(random, random_heads(flags, judged, seed=2))
    assert not torch.equal(random, flags)
    with pytest.raises(ValueError, match="at most 8 flags an image.*received 9"):
        random_heads(torch.ones(1, 3, 3, dtype=torch.bool), torch.arange(9).view(3, 3) < 8, seed=0)
