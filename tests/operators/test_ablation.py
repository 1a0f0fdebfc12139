"""Ablation, direct and causal from one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, embed, everything, heads, mlps, neurons, pool
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Composition, Intervention
from decompclip.operators.noise import RandomAblate
from decompclip.operators.transplant import Patch, ResampleAblate
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
NOTHING = heads[0] - heads[0]
CHOICES = [heads[1, 2], heads[-1] | mlps[0], mlps, embed, everything, everything - heads[:, 0]]


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return torch.randn(16, 3, 24, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def moments(tower: HookedViT, clean: Tensor) -> Moments:
    return Moments.fit(tower, clean.split(6))


@pytest.fixture(scope="module")
def d(tower: HookedViT, images: Tensor) -> Decomposition:
    return decompose(tower, images)


def causal(tower: HookedViT, images: Tensor, edit: Intervention, **options: Any) -> Tensor:
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower, **options)):
        return tower(images)


def test_only_the_chosen_terms_change(d: Decomposition, moments: Moments) -> None:
    edited = MeanAblate(heads[1, 2] | mlps[-1] | embed, moments)(d)
    for layer in range(3):
        for head in range(4):
            expected = (
                moments.heads[1, 2].float().expand(5, -1)
                if (layer, head) == (1, 2)
                else d.heads[:, layer, head]
            )
            torch.testing.assert_close(edited.heads[:, layer, head], expected, **CLOSE)
    torch.testing.assert_close(edited.mlps[:, :2], d.mlps[:, :2])
    torch.testing.assert_close(edited.mlps[:, 2], moments.mlps[2].float().expand(5, -1))
    torch.testing.assert_close(edited.embed, moments.embed.float().expand(5, -1))
    with pytest.raises(ValueError, match="edited"):
        edited.sum_error


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_features_change_by_the_replaced_terms(
    tower: HookedViT, images: Tensor, clean: Tensor, convention
) -> None:
    d = decompose(tower, images, convention=convention, normalize=True)
    moments = Moments.fit(tower, [clean], convention=convention, normalize=True)
    edited = MeanAblate(heads[-1], moments)(d)
    change = moments.heads[-1].float().sum(0) - d.heads[:, -1].sum(1)
    torch.testing.assert_close(edited.features, d.features + change, **CLOSE)
    gone = ZeroAblate(everything)(d)
    torch.testing.assert_close(gone.features, d.bias, **CLOSE)


def test_an_empty_intervention_changes_nothing(
    tower: HookedViT, images: Tensor, d: Decomposition, moments: Moments
) -> None:
    for edit in (MeanAblate(NOTHING, moments), ZeroAblate(NOTHING), Composition()):
        assert edit(d) is d
        assert edit.fwd_hooks(tower) == []
        torch.testing.assert_close(causal(tower, images, edit), tower(images), rtol=0, atol=0)


def test_everything_replaced_by_the_mean_is_the_mean_feature(d: Decomposition, moments: Moments) -> None:
    edited = MeanAblate(everything, moments)(d)
    spread = (edited.features - edited.features.mean(0)).abs().max()
    assert spread <= (d.bias - d.bias.mean(0)).abs().max() + 1e-4  # only the constants' scale is left


@pytest.mark.parametrize("components", [mlps[-1], heads[-1], heads[-1, 2], heads[-1] | mlps[-1]])
def test_direct_is_causal_in_the_last_block_at_a_frozen_scale(
    tower: HookedViT, images: Tensor, d: Decomposition, components
) -> None:
    """Nothing reads the last MLP but the last LayerNorm, whose scale a direct edit holds at its clean value."""
    scales: list[Tensor] = []
    with tower.hooks(fwd_hooks=[("ln_final.hook_scale", lambda s, hook: scales.append(s.clone()))]):
        tower(images)
    hooks = ZeroAblate(components).fwd_hooks(tower)
    if components != mlps[-1]:  # what the heads no longer write, the last MLP must not see either
        _, cache = tower.run_with_cache(images)
        hooks.append(("blocks.2.ln2.hook_normalized", lambda x, hook: cache["blocks.2.ln2.hook_normalized"]))
    if components == heads[-1] | mlps[-1]:
        hooks = ZeroAblate(components).fwd_hooks(tower)
    frozen: list[Any] = [*hooks, ("ln_final.hook_scale", lambda s, hook: scales[0])]
    with tower.hooks(fwd_hooks=frozen):
        features = tower(images)
    torch.testing.assert_close(features, ZeroAblate(components)(d).features, **CLOSE)


def test_later_layers_see_a_causal_edit_and_no_direct_one(
    tower: HookedViT, images: Tensor, d: Decomposition
) -> None:
    edit = ZeroAblate(heads[0])
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):
        seen = decompose(tower, images)
    torch.testing.assert_close(seen.features, causal(tower, images, edit), **CLOSE)
    torch.testing.assert_close(seen.heads[:, 0], torch.zeros_like(seen.heads[:, 0]), atol=1e-5, rtol=0)
    assert not torch.allclose(seen.heads[:, 1:], d.heads[:, 1:], **CLOSE)
    torch.testing.assert_close(edit(d).heads[:, 1:], d.heads[:, 1:])


def test_causal_mean_ablation_writes_the_stream_means(
    tower: HookedViT, images: Tensor, moments: Moments
) -> None:
    edit = MeanAblate(heads[1, 3] | mlps[0] | embed, moments)
    assert moments.streams is not None
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):
        _, cache = tower.run_with_cache(images)
    torch.testing.assert_close(
        cache["z", 1][:, :, 3], moments.streams.z[1, :, 3].float().expand(5, -1, -1), **CLOSE
    )
    torch.testing.assert_close(
        cache["mlp_out", 0], moments.streams.mlp_out[0].float().expand(5, -1, -1), **CLOSE
    )
    torch.testing.assert_close(
        cache["resid_pre", 0], moments.streams.embed.float().expand(5, -1, -1), **CLOSE
    )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooled_rows_alone(make_tower: Callable[..., HookedViT], images: Tensor, pool: str) -> None:
    tower = make_tower(pool=pool, n_prefix=1)
    pooled, others = (slice(0, 1), slice(1, None)) if pool == "cls" else (slice(1, None), slice(0, 1))
    _, before = tower.run_with_cache(images)
    with tower.hooks(fwd_hooks=ZeroAblate(mlps[0], rows="pooled").fwd_hooks(tower)):
        _, after = tower.run_with_cache(images)
    assert not after["mlp_out", 0][:, pooled].any()
    torch.testing.assert_close(after["mlp_out", 0][:, others], before["mlp_out", 0][:, others])


@pytest.mark.parametrize("rows", ["patches", (2, -1), "mask", "masks"])
def test_rows_are_the_tokens_that_a_causal_edit_reaches(tower: HookedViT, images: Tensor, rows: Any) -> None:
    reached = torch.zeros(5, 7, dtype=torch.bool)
    if rows == "masks":
        reached = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    else:
        reached[:, {"patches": slice(1, None), "mask": [0, 3]}.get(rows, [2, 6])] = True
    rows = {"mask": reached[0], "masks": reached}.get(rows, rows)
    _, before = tower.run_with_cache(images)
    with tower.hooks(fwd_hooks=ZeroAblate(heads[0, 2] | mlps[0], rows=rows).fwd_hooks(tower)):
        _, after = tower.run_with_cache(images)
    b_V = blocks(tower)[0].attn.b_V[2]
    torch.testing.assert_close(
        after["z", 0][:, :, 2], torch.where(reached[..., None], b_V, before["z", 0][:, :, 2])
    )
    torch.testing.assert_close(after["z", 0][:, :, 1], before["z", 0][:, :, 1])
    assert not after["mlp_out", 0][reached].any()
    assert after["mlp_out", 0][~reached].all()


def test_the_pools_mlp_is_a_component_where_there_is_one(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    tower = make_tower(pool="attention", pool_heads=4, pool_mlp=24, n_prefix=0)
    seen: list[Tensor] = []
    for components in (pool, everything):
        hooks = ZeroAblate(components).fwd_hooks(tower)
        with tower.hooks(fwd_hooks=[*hooks, ("pool.hook_mlp_out", lambda x, hook: seen.append(x.clone()))]):
            tower(images)
    assert len(seen) == 2 and not torch.stack(seen).any()
    where = torch.zeros(5, 3 * 4 + 3 + 2, dtype=torch.bool)
    where[1, -1] = True
    moments = Moments.fit(tower, [images, -images])
    d = decompose(tower, images)
    noise = [RandomAblate(components, moments, model=tower) for components in (pool, everything)]
    for edit in (MeanAblate(pool, moments), *noise):
        edited = edit(d)
        length = moments.pool.norm(dim=-1).float().expand(5, -1)
        torch.testing.assert_close(edited.pool.norm(dim=-1), length, **CLOSE)
        assert causal(tower, images, edit).isfinite().all()
    torch.testing.assert_close(MeanAblate(pool, moments)(d).pool, moments.pool.float().expand(5, -1, -1))
    patched = Patch(everything, decompose(tower, -images), images=-images)
    torch.testing.assert_close(causal(tower, images, patched), tower(-images), **CLOSE)
    torch.testing.assert_close(patched(d).pool, decompose(tower, -images).pool)
    changed = (causal(tower, images, ZeroAblate(everything), where=where) - tower(images)).abs().amax(
        1
    ) > 1e-4
    assert changed.tolist() == [False, True, False, False, False]
    resampled = ResampleAblate(pool, decompose(tower, -images), images=-images)
    origin = (resampled(d).pool[:, None] == decompose(tower, -images).pool).all((2, 3)).nonzero()[:, 1]
    assert len(origin) == 5 and not (origin == torch.arange(5)).any()
    with tower.hooks(
        fwd_hooks=[*resampled.fwd_hooks(tower), ("pool.hook_mlp_out", lambda x, hook: seen.append(x.clone()))]
    ):
        tower(images)
    with tower.hooks(fwd_hooks=[("pool.hook_mlp_out", lambda x, hook: seen.append(x.clone()))]):
        tower(-images)
    torch.testing.assert_close(seen[-2], seen[-1][origin])


def test_where_restricts_heads_image_by_image(tower: HookedViT, images: Tensor, d: Decomposition) -> None:
    where = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    edited = ZeroAblate(heads[1:])(d, where=where)
    where[:, 0] = False
    torch.testing.assert_close(edited.coords, d.coords * ~where[..., None])
    hidden = causal(tower, images, ZeroAblate(heads[1:]), where=where)
    for i in range(5):
        alone = causal(tower, images[i : i + 1], ZeroAblate(heads[1:]), where=where[i : i + 1])
        torch.testing.assert_close(hidden[i : i + 1], alone, **CLOSE)


def test_composition_goes_left_to_right(d: Decomposition, moments: Moments) -> None:
    mean, zero = MeanAblate(heads[1], moments), ZeroAblate(heads[1, :2] | mlps[0])
    torch.testing.assert_close((mean | zero)(d).features, zero(mean(d)).features)
    torch.testing.assert_close((zero | mean)(d).coords, mean(zero(d)).coords)
    chain = mean | zero | mean
    assert len(chain.steps) == 3
    assert repr(mean | zero) == f"{mean!r} | {zero!r}"
    assert "ZeroAblate(heads[1, :2] | mlps[0])" in repr(zero)


@pytest.mark.parametrize("components", CHOICES, ids=repr)
@pytest.mark.parametrize("rows", ["all", "pooled"])
def test_hooks_compose_with_decompose(
    tower: HookedViT, images: Tensor, moments: Moments, components: Components, rows: str
) -> None:
    for edit in (MeanAblate(components, moments, rows=rows), ZeroAblate(components, rows=rows)):  # pyright: ignore
        feature = causal(tower, images, edit).detach()
        with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):  # the last block's token 0 alone
            torch.testing.assert_close(tower(images, pooled_rows=True), feature, **CLOSE)
        for convention in ("centred", "paper"):
            with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):
                edited = decompose(tower, images, convention=convention)
            torch.testing.assert_close(edited.features, feature, **CLOSE)
    # Under zero-ablation what was removed is gone from the edited run's terms too.
    with tower.hooks(fwd_hooks=ZeroAblate(components).fwd_hooks(tower)):
        gone = decompose(tower, images)
    mask = components.resolve(3, 4)
    assert gone.coords[:, mask.heads].abs().sum() == 0
    assert gone.mlps[:, mask.mlps].abs().sum() == 0


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(
    tower: HookedViT,
    images: Tensor,
    d: Decomposition,
    moments: Moments,
    make_tower: Callable[..., HookedViT],
) -> None:
    with pytest.raises(IndexError, match=r"a layer in 0\.\.2 .*received layer 3 in heads\[3\]"):
        ZeroAblate(heads[3])(d)
    with pytest.raises(IndexError, match=r"a head in 0\.\.3 .*received head 4 in heads\[1, 4\]"):
        MeanAblate(heads[1, 4], moments).fwd_hooks(tower)
    with pytest.raises(
        ValueError, match="expected terms with convention='centred', .* received convention='paper'"
    ):
        MeanAblate(mlps, moments)(decompose(tower, images, convention="paper"))
    other = make_tower(n_layers=2)
    for ask in (
        lambda: MeanAblate(mlps, moments)(decompose(other, images)),
        lambda: MeanAblate(mlps, moments).fwd_hooks(other),
    ):
        with pytest.raises(
            ValueError, match=r"received \[2, 4, 8, 20\]; fit the moments on the model they are used"
        ):
            ask()
    with pytest.raises(ValueError, match="received moments of terms alone; .*stream=True"):
        MeanAblate(mlps, Moments.of(d)).fwd_hooks(tower)
    where = torch.ones(4, 3, 4, dtype=torch.bool)
    with pytest.raises(
        ValueError,
        match=r"\[batch, layer, head\] = \[5, 3, 4\] or \[batch, component\] = \[5, 16\]; received torch.bool \[4, 3, 4\]",
    ):
        ZeroAblate(heads)(d, where=where)
    with pytest.raises(
        ValueError, match=r"= \[5, 16\]; received torch.bool \[4, 3, 4\]; give one row for each"
    ):
        causal(tower, images, ZeroAblate(heads), where=where)
    with pytest.raises(
        ValueError, match=r"rows of \('all', 'pooled', 'patches'\), a tuple .* received 'cls'"
    ):
        ZeroAblate(heads, rows="cls")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"names neurons; edit those with AblateNeurons, and compose"):
        ZeroAblate(heads | neurons[0, 3])(d)
    with pytest.raises(IndexError, match="attention pooling has an MLP of its own"):
        ZeroAblate(pool).fwd_hooks(tower)
    with pytest.raises(IndexError, match=r"tokens in 0\.\.6; received 7 in \(0, 7\)"):
        ZeroAblate(heads, rows=(0, 7)).fwd_hooks(tower)
    with pytest.raises(ValueError, match=r"a mask over 7 tokens; received \[6\]; a mask of patches lacks"):
        ZeroAblate(heads, rows=torch.ones(6, dtype=torch.bool)).fwd_hooks(tower)
    with pytest.raises(TypeError):
        _ = ZeroAblate(heads) | 3  # pyright: ignore[reportOperatorIssue]
