"""Noise in place of components: one draw in both modes, its length, and the paper's in all dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import embed, everything, heads, layers, mlps, pool
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.ablation import ZeroAblate
from decompclip.operators.intervention import Intervention
from decompclip.operators.noise import RandomAblate
from decompclip.tower.vit import HookedViT

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def moments(tower: HookedViT) -> Moments:
    return Moments.fit(tower, [drawn(16, 5)])


@pytest.fixture(scope="module")
def d(tower: HookedViT, images: Tensor) -> Decomposition:
    return decompose(tower, images)


def causal(tower: HookedViT, images: Tensor, edit: Intervention, **options: Any) -> Tensor:
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower, **options)):
        return tower(images)


LAST = [heads[-1], heads[-1, 2], mlps[-1], layers[-1]]
TOWERS: list[dict[str, Any]] = [
    {"layer_scale": True},
    {"pool": "mean", "n_prefix": 0},
    {"pool": "mean", "ln_final": "pooled", "n_prefix": 1},
    {"pool": "attention", "pool_heads": 4, "pool_mlp": 24, "n_prefix": 0},
    {"attn_norm": True},
]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("changes", TOWERS, ids=["cls", "mean", "mean_then_norm", "attention", "attn_norm"])
def test_noise_is_one_draw_in_both_modes(
    make_tower: Callable[..., HookedViT], images: Tensor, changes: Any, normalize: bool
) -> None:
    """Where nothing but the frozen readout reads a component, its noise does the same in both modes."""
    tower = make_tower(**changes)
    moments = Moments.fit(tower, [drawn(16, 5)], normalize=normalize)
    d = decompose(tower, images, normalize=normalize)
    length = tower(images).norm(dim=-1, keepdim=True) if normalize else 1.0
    reading = ["ln_final.hook_scale", *(["pool.hook_pattern"] if tower.cfg.pool == "attention" else [])]
    reading += ["blocks.2.attn.ln.hook_scale"] if tower.cfg.attn_norm else []
    seen: dict[str, Tensor] = {}
    with tower.hooks(fwd_hooks=[(name, lambda x, hook: seen.update({hook.name: x})) for name in reading]):
        tower(images)
    held: list[Any] = [(name, lambda x, hook: seen[hook.name]) for name in reading]
    for components in LAST:
        edit = RandomAblate(components, moments, model=tower, seed=2)
        if components is not layers[-1]:
            edit = edit | ZeroAblate(mlps[-1]) if components is not mlps[-1] else edit
        with tower.hooks(fwd_hooks=[*edit.fwd_hooks(tower), *held]):
            # The pool's MLP reads what is pooled: it is no part of the comparison.
            run = decompose(tower, images)
        expected = run.features - run.pool.sum(1)
        direct = edit(d)
        torch.testing.assert_close((direct.features - direct.pool.sum(1)) * length, expected, **CLOSE)
        assert float((direct.features - d.features).abs().max()) > 1e-2


def test_noise_of_the_embedding_and_the_pool_is_what_is_written(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    tower = make_tower(pool="attention", pool_heads=4, pool_mlp=24, n_prefix=0)
    for normalize in (False, True):
        d = decompose(tower, images, normalize=normalize)
        edit = RandomAblate(pool, Moments.fit(tower, [drawn(16, 5)], normalize=normalize), model=tower)
        length = tower(images).norm(dim=-1, keepdim=True) if normalize else 1.0
        torch.testing.assert_close(causal(tower, images, edit), edit(d).features * length, **CLOSE)
    unit = RandomAblate(pool | mlps[0], scale="unit")(d)
    assert torch.equal(unit.heads, d.heads) and float((unit.pool - d.pool).norm(dim=-1).min()) > 2
    assert torch.equal(unit.pool, RandomAblate(pool, scale="unit")(d).pool)
    assert torch.equal(RandomAblate(heads, scale="unit")(d).pool, d.pool)
    cls = make_tower(layer_scale=True)
    edit = RandomAblate(embed, Moments.fit(cls, [drawn(16, 5)]), model=cls)
    with cls.hooks(fwd_hooks=edit.fwd_hooks(cls)):
        run, scale = decompose(cls, images), cls.run_with_cache(images)[1]["ln_final.hook_scale"][:, 0]
    before = cls.run_with_cache(images)[1]["ln_final.hook_scale"][:, 0]
    torch.testing.assert_close(run.embed * scale, edit(decompose(cls, images)).embed * before, **CLOSE)


def test_matched_noise_is_as_long_as_the_mean_and_of_its_seed(
    tower: HookedViT, images: Tensor, d: Decomposition, moments: Moments
) -> None:
    """At the average scale of the moments' images; each image reads it at its own."""
    noise = RandomAblate(everything, moments, model=tower)(d)
    share = d.bias_coords[:, 0] / moments.bias_coords[0]
    for ours, mean in (
        (noise.heads, moments.heads),
        (noise.mlps, moments.mlps),
        (noise.embed, moments.embed),
    ):
        lengths = mean.norm(dim=-1).expand(5, *mean.shape[:-1])
        expected = lengths * share.view(-1, *[1] * (lengths.ndim - 1))
        torch.testing.assert_close(ours.norm(dim=-1), expected.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(RandomAblate(heads[1], moments)(d).coords[:, 1], noise.coords[:, 1], **CLOSE)
    where = torch.zeros(5, 16, dtype=torch.bool)
    where[2, 6] = True
    changed = (RandomAblate(everything, moments, model=tower)(d, where=where).heads != d.heads).any(-1)
    assert changed.nonzero().tolist() == [[2, 1, 2]]
    other = RandomAblate(everything, moments, model=tower, seed=1)(d)
    assert torch.cosine_similarity(other.mlps[0], noise.mlps[0], dim=-1).abs().max() < 0.99
    with tower.hooks(fwd_hooks=RandomAblate(heads[1, 2] | mlps[0], moments).fwd_hooks(tower)):
        _, cache = tower.run_with_cache(images)
    assert (
        cache["mlp_out", 0].std(dim=(0, 1)).max() < 1e-5
        and cache["z", 1][:, :, 2].std(dim=(0, 1)).max() < 1e-5
    )


def test_a_head_that_writes_nothing_has_no_noise(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    tower = make_tower()
    with torch.no_grad():
        tower.get_parameter("blocks.1.attn.W_out")[:, 16:24] = 0  # of head 2
    noise = RandomAblate(heads[1], Moments.fit(tower, [drawn(16, 5)]))(decompose(tower, images))
    assert noise.coords.isfinite().all() and not noise.coords[:, 1, 2].any()
    assert (noise.coords[:, 1, [0, 1, 3]] != 0).all()


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_unit_noise_is_standard_normal_in_all_dimensions_of_the_term(
    make_tower: Callable[..., HookedViT], images: Tensor, convention: Any
) -> None:
    tower = make_tower(d_embed=300)
    d = decompose(tower, images, convention=convention)
    unit = RandomAblate(everything, scale="unit")(d)
    assert unit.maps.direct and not unit.maps.extras and torch.equal(unit.coords, unit.heads)
    products = torch.einsum("blhr,lhrs,blhs->blh", unit.coords, unit.maps.grams, unit.coords)
    torch.testing.assert_close(products, unit.heads.square().sum(-1))
    for terms in (unit.heads, unit.mlps, unit.embed[:, None]):
        assert torch.corrcoef(terms[:, 0].flatten(1))[~torch.eye(5, dtype=torch.bool)].abs().max() < 0.2
        torch.testing.assert_close(terms.std(dim=-1), torch.ones(terms.shape[:-1]), rtol=0.15, atol=0)
    # More dimensions than a head can write in.
    assert torch.linalg.matrix_rank(unit.heads[0].flatten(0, 1)) == 12
    assert torch.linalg.matrix_rank(unit.heads[:, 0, 0]) == 5  # each image has its own
    head = torch.cat([RandomAblate(heads[0, 0], scale="unit", seed=i)(d).heads[:1, 0, 0] for i in range(20)])
    assert torch.linalg.matrix_rank(head) == 20
    some = RandomAblate(heads[1, 2] | mlps[1], scale="unit")(d)
    torch.testing.assert_close(some.heads[:, 1, 2], unit.heads[:, 1, 2])
    torch.testing.assert_close(some.mlps[:, 1], unit.mlps[:, 1])
    torch.testing.assert_close(some.heads[:, 0], d.heads[:, 0])
    changed = (some.heads - d.heads).sum((1, 2)) + (some.mlps - d.mlps).sum(1)
    torch.testing.assert_close(some.features, d.features + changed, **CLOSE)
    assert RandomAblate(heads, scale="unit")(d, where=torch.zeros(5, 3, 4, dtype=torch.bool)) is d


def test_unit_noise_is_the_image_s_own_whatever_the_batch(tower: HookedViT, images: Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    noise = RandomAblate(heads[1] | mlps[0] | embed, scale="unit", seed=4)
    d = decompose(tower, images)
    whole, permuted = noise(d), noise(d[order])
    alone = Decomposition.cat([noise(decompose(tower, image[None])) for image in images])
    for name in ("heads", "mlps", "embed"):
        assert torch.equal(getattr(permuted, name), getattr(whole, name)[order])
        torch.testing.assert_close(getattr(alone, name), getattr(whole, name), **CLOSE)
    assert not torch.equal(RandomAblate(heads[1], scale="unit", seed=5)(d).heads[:, 1], whole.heads[:, 1])
    # The image is known by its feature and its last MLP's term alone; tokens' terms go with the edit.
    turned = decompose(tower, images, tokens=True).with_fields(mlps=d.mlps[:, [1, 0, 2]])
    assert torch.equal(noise(turned).heads[:, 1], whole.heads[:, 1])
    where = torch.zeros(5, 16, dtype=torch.bool)
    where[:, 12] = True  # the first MLP
    assert noise(turned, where=where).token_terms is None
    assert repr(noise) == f"RandomAblate({noise.components!r}, scale='unit', seed=4)"


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(
    tower: HookedViT,
    images: Tensor,
    d: Decomposition,
    moments: Moments,
    make_tower: Callable[..., HookedViT],
) -> None:
    with pytest.raises(ValueError, match=r"expected scale of \('matched', 'unit'\); received 'big'"):
        RandomAblate(heads, moments, scale="big")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected moments, whose means the noise is to be as long as"):
        RandomAblate(heads)
    with pytest.raises(ValueError, match="centred convention, .* received convention='paper'; fit them"):
        RandomAblate(heads, Moments.fit(tower, [images], convention="paper"))
    with pytest.raises(
        ValueError, match=r"expected the model, .* noise of mlps\[0\] becomes terms; received none"
    ):
        RandomAblate(mlps[0], moments)(d)
    with pytest.raises(ValueError, match='scale="matched" for a causal edit; received "unit"'):
        RandomAblate(mlps[0], scale="unit").fwd_hooks(tower)
    with pytest.raises(ValueError, match="other weights; fit the moments on the model they are used with"):
        RandomAblate(mlps[0], moments, model=make_tower(seed=3, layer_scale=True))(d)
