"""Losses against loops over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from decompclip.training.recipes import grouped_clip_loss, pair_loss


def features(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = F.normalize(torch.randn(2, n, 5, generator=g, dtype=torch.double), dim=-1)
    return a, b


SCALE = torch.tensor(7.0, dtype=torch.double)
GROUPS = torch.tensor([0, 1, 0, 2, 0, 1])


def plain_grouped(image: Tensor, text: Tensor, groups: Tensor) -> float:
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(len(a)):
            exponentials = [math.exp(7 * float(a[i] @ b[j])) for j in range(len(b))]
            friends = [j for j in range(len(b)) if groups[j] == groups[i]]
            total -= sum(math.log(exponentials[j] / sum(exponentials)) for j in friends) / len(friends)
    return total / (2 * len(image))


def test_the_grouped_loss_is_the_plain_sum() -> None:
    image, text = features()
    found = grouped_clip_loss(image, text, SCALE, GROUPS).item()
    assert found == pytest.approx(plain_grouped(image, text, GROUPS))


def test_a_group_for_each_pair_gives_the_clip_loss() -> None:
    image, text = features()
    torch.testing.assert_close(
        grouped_clip_loss(image, text, SCALE, torch.arange(6)), ClipLoss()(image, text, SCALE)
    )


def test_names_and_order_of_groups_do_not_matter() -> None:
    image, text = features()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        grouped_clip_loss(image[order], text[order], SCALE, 10 - GROUPS[order]),
        grouped_clip_loss(image, text, SCALE, GROUPS),
    )


def test_pairs_of_one_group_do_not_push_each_other_away() -> None:
    """Two images of one class, each at its class's text: the least that the loss can be."""
    axes = torch.eye(4, dtype=torch.double)
    image = axes[[0, 0, 1, 2]]
    scale = torch.tensor(50.0, dtype=torch.double)
    together = grouped_clip_loss(image, image, scale, torch.tensor([0, 0, 1, 2]))
    assert together.item() == pytest.approx(math.log(2) / 2)
    image = image.clone().requires_grad_()
    loss = grouped_clip_loss(image, axes[[0, 0, 1, 2]], scale, torch.tensor([0, 0, 1, 2]))
    (slope,) = torch.autograd.grad(loss, image)
    assert slope.abs().max() < 1e-9


def test_cleanclip_adds_the_losses_between_views() -> None:
    (image, text), (image2, text2) = features(seed=1), features(seed=2)
    places = torch.arange(6)
    views = [F.cross_entropy(7 * a @ b.T, places) for a, b in ((image, image2), (text, text2))]
    expected = ClipLoss()(image, text, SCALE) + 0.3 * (views[0] + views[1]) / 2
    both = torch.cat([image, image2]), torch.cat([text, text2])
    torch.testing.assert_close(pair_loss("cleanclip", *both, SCALE, ss_weight=0.3), expected)
    torch.testing.assert_close(
        pair_loss("cleanclip", *both, SCALE, ss_weight=0.0), ClipLoss()(image, text, SCALE)
    )


def test_by_name() -> None:
    image, text = features()
    torch.testing.assert_close(pair_loss("clip", image, text, SCALE), ClipLoss()(image, text, SCALE))
    torch.testing.assert_close(
        pair_loss("grouped", image, text, SCALE, groups=GROUPS),
        grouped_clip_loss(image, text, SCALE, GROUPS),
    )
    with pytest.raises(ValueError, match="expected the groups of the pairs; received none; pass groups="):
        pair_loss("grouped", image, text, SCALE)


def test_a_group_is_wanted_for_each_pair() -> None:
    image, text = features()
    with pytest.raises(
        ValueError, match="received 6 images, 6 texts, 5 groups; pass the features of one batch"
    ):
        grouped_clip_loss(image, text, SCALE, GROUPS[:5])
