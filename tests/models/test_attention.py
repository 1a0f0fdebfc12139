"""Attention against plain loops: what its weights by head mean, and how rotary positions turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decompclip.tower.config import Rope
from decompclip.tower.layers import Attention, rotate
from decompclip.tower.vit import HookedViT


@pytest.fixture
def attention(tower: HookedViT) -> Attention:
    block = tower.blocks[1].attn
    assert isinstance(block, Attention)
    return block


@torch.no_grad()
def test_weights_by_head_are_those_that_attention_computes_with(attention: Attention) -> None:
    """Queries, keys, values, scores and output, head by head from `W_Q`, `W_K`, `W_V` and `W_O`."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}
    for name in ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z"):
        getattr(attention, name).add_hook(lambda value, hook, name=name: seen.update({name: value}))
    try:
        found = attention(x)
    finally:
        for name in seen:
            getattr(attention, name).remove_hooks()
    biases = attention.b_QKV.reshape(3, 4, 8)
    expected = attention.b_O.expand_as(x).clone()
    for head in range(4):
        q = x @ attention.W_Q[head] + biases[0, head]
        k = x @ attention.W_K[head] + biases[1, head]
        v = x @ attention.W_V[head] + attention.b_V[head]
        for name, value in (("hook_q", q), ("hook_k", k), ("hook_v", v)):
            torch.testing.assert_close(
                seen[name][:, :, head], value, msg=lambda text, name=name: f"{name}: {text}"
            )
        scores = torch.stack([a @ b.T for a, b in zip(q, k, strict=True)]) / math.sqrt(8)
        torch.testing.assert_close(seen["hook_attn_scores"][:, head], scores)
        pattern = scores.exp() / scores.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(seen["hook_pattern"][:, head], pattern)
        torch.testing.assert_close(seen["hook_z"][:, :, head], pattern @ v)
        expected += pattern @ v @ attention.W_O[head]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attention(x), expected)  # fused
    torch.testing.assert_close(attention(x, pooled_row_only=True), expected[:, :1])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_positions_turn_each_pair_by_its_angle(layout: Rope) -> None:
    """A pair is a number and its partner: half the width further on, or the next."""
    generator = torch.Generator().manual_seed(1)
    x, angle = torch.randn(2, 3, 2 + 5, 6, generator=generator), torch.rand(5, 3, generator=generator)
    angles = torch.cat([angle, angle], 1) if layout == "half" else angle.repeat_interleave(2, 1)
    found = rotate(x, torch.stack([angles.sin(), angles.cos()]), 2, layout)
    expected = x.clone()
    for row in range(5):
        for pair in range(3):
            i, j = (pair, pair + 3) if layout == "half" else (2 * pair, 2 * pair + 1)
            sin, cos = math.sin(angle[row, pair]), math.cos(angle[row, pair])
            a, b = x[:, :, 2 + row, i], x[:, :, 2 + row, j]
            expected[:, :, 2 + row, i] = a * cos - b * sin
            expected[:, :, 2 + row, j] = b * cos + a * sin
    torch.testing.assert_close(found, expected)
    alone = rotate(x[:, :, :2], torch.stack([angles.sin(), angles.cos()]), 2, layout)
    torch.testing.assert_close(alone, x[:, :, :2])  # a prefix without patches


@torch.no_grad()
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_turned_tower_sees_offsets_alone(make_tower: Callable[..., HookedViT], layout: Rope) -> None:
    """Scores of two patches stay the same where both positions move by the same: queries turn as keys do."""
    attention = make_tower(rope=layout, n_prefix=1).blocks[0].attn
    assert isinstance(attention, Attention)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))

    def scores(first: float, second: float) -> Tensor:
        frequencies = torch.tensor([1.0, 0.5, 0.25, 0.125])
        angle = torch.tensor([first, second])[:, None] * frequencies
        angles = torch.cat([angle, angle], 1) if layout == "half" else angle.repeat_interleave(2, 1)
        seen: list[Tensor] = []
        attention.hook_attn_scores.add_hook(lambda value, hook: seen.append(value[0, :, 1:, 1:]))  # pyright: ignore[reportArgumentType]
        try:
            attention(x, torch.stack([angles.sin(), angles.cos()]))
        finally:
            attention.hook_attn_scores.remove_hooks()
        return seen[0]

    torch.testing.assert_close(scores(0, 1), scores(3, 4))
    still = torch.stack([torch.zeros(2, 8), torch.ones(2, 8)])
    torch.testing.assert_close(attention(x), attention(x, still))  # whoever gives no angles turns nothing
    assert not torch.allclose(scores(0, 1), scores(0, 2), atol=1e-3)
