"""What fitted defenses share: samples of streams, and blocks of images."""

from __future__ import annotations

import pytest
import torch

from decompclip.decomposition.capture import decompose
from decompclip.defenses.fitted import Sample, blocks, held_out
from decompclip.tower.vit import HookedViT


@pytest.mark.parametrize("batch", [1, 7, 40, 100])
def test_a_sample_is_the_rows_of_the_lowest_draws(batch: int) -> None:
    """In the order that they came, whatever the batches; a row's entries stay together."""
    sample = Sample(13, seed=5)
    x = torch.arange(100)
    for part in x.split(batch):
        sample.add(part, 2.0 * part[:, None])
    lowest = torch.rand(100, generator=torch.Generator().manual_seed(5)).argsort()[:13].sort().values
    whole, doubled = sample.columns()
    assert sample.seen == 100 and torch.equal(whole, lowest)
    assert torch.equal(doubled, 2.0 * lowest[:, None])


def test_a_sample_of_few_is_all_of_them() -> None:
    sample = Sample(50, seed=0)
    assert sample.columns() == []
    sample.add(torch.arange(30))
    assert torch.equal(sample.columns()[0], torch.arange(30))


def test_blocks_hold_all_images_in_order(tower: HookedViT, monkeypatch: pytest.MonkeyPatch) -> None:
    d = decompose(tower, torch.randn(53, 3, 24, 16, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr("decompclip.defenses.fitted.BLOCK", 10)
    assert [len(part) for part in blocks(d)] == [10, 10, 10, 10, 10, 3]
    found = [*blocks(d[i : i + 4] for i in range(0, 53, 4))]
    assert [len(part) for part in found] == [12, 12, 12, 12, 5]
    assert torch.equal(torch.cat([part.coords for part in found]), d.coords)
    assert not [*blocks([])]


@pytest.mark.parametrize("folds", [2, 3])
def test_each_image_is_left_out_of_one_fold(folds: int) -> None:
    found = [*held_out(11, folds, 4, torch.device("cpu"))]
    assert torch.equal(torch.stack(found).sum(0), torch.ones(11, dtype=torch.long))
    assert [int(fold.sum()) for fold in found] == {2: [6, 5], 3: [4, 4, 3]}[folds]
    again, other = ([*held_out(11, folds, seed, torch.device("cpu"))] for seed in (4, 5))
    assert torch.equal(torch.stack(found), torch.stack(again))
    assert not torch.equal(torch.stack(found), torch.stack(other))
    with pytest.raises(ValueError, match="expected at least 2 folds; received 1"):
        held_out(11, 1, 4, torch.device("cpu"))
