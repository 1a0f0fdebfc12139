"""What holds for every way of pooling, and for every precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import (
    Convention,
    WatchedWeights,
    _spread,
    fingerprint,
    one_thread,
    same_model,
    term_maps,
)
from decompclip.decomposition.moments import Moments
from decompclip.tower.vit import HookedViT

MakeTower = Callable[..., HookedViT]
FAMILIES = {
    "class token": {"layer_scale": True},
    "registers": {"n_prefix": 3, "rope": "interleaved", "attn_norm": True, "gated": True, "mlp_norm": True},
    "mean, then LayerNorm": {"pool": "mean", "ln_final": "pooled", "ln_pre": False},
    "mean of rows": {"pool": "mean", "n_prefix": 0, "gated": True, "mlp_norm_in": True, "pos": False},
    "mean behind a norm of heads": {"pool": "mean", "ln_final": "pooled", "attn_norm": True},
    "SigLIP": {"pool": "attention", "pool_heads": 4, "pool_mlp": 40, "n_prefix": 0, "projection": False, "d_embed": 32},
    "PE": {"pool": "attention", "pool_heads": 2, "pool_mlp": 24, "proj_bias": True, "rope": "interleaved"},
    "without prefix": {"pool": "attention", "pool_heads": 2, "pool_mlp": 24, "pool_prefix": False},
    "CoCa": {"pool": "attention", "pool_heads": 3, "pool_norm": True, "d_pool": 24, "pool_queries": 5},
    "post-norm": {"norm": "post"},
    "post-norm, attention pool": {"norm": "post", "pool": "attention", "pool_heads": 2, "pool_mlp": 8},
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, make_tower: MakeTower) -> HookedViT:
    visual = make_tower(dtype=torch.float64, **FAMILIES[request.param])
    if isinstance(visual.rope, Tensor):
        turns = torch.rand(visual.rope[0].shape, generator=torch.Generator().manual_seed(2))
        visual.rope.copy_(torch.stack([turns.sin(), turns.cos()]))
    return visual


@pytest.mark.parametrize("convention", ["centred", "paper"])
@pytest.mark.parametrize("normalize", [False, True])
def test_terms_and_tokens_sum(
    family: HookedViT, images: Tensor, convention: Convention, normalize: bool
) -> None:
    d = decompose(family, images.double(), convention=convention, normalize=normalize, tokens=True)
    assert d.sum_error < 1e-13
    texts = torch.randn(3, d.d_embed, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for layer, head in ((0, 1), (2, 3)):
        tokens = d.tokens(layer, head)
        assert torch.allclose(tokens.sum(1), d.heads[:, layer, head], atol=1e-12)
        assert torch.allclose(d.token_logits(texts, layer, head), tokens @ texts.T, atol=1e-12)
        assert torch.allclose(d.attention(layer, head).sum(1), torch.ones(5, dtype=torch.float64))
    toward = torch.randn(5, d.d_embed, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    every = sum(d.tokens(layer, head) for layer in range(d.n_layers) for head in range(d.n_heads))
    assert isinstance(every, Tensor)
    assert torch.allclose(d.token_sums(toward), torch.einsum("bnd,bd->bn", every, toward), atol=1e-12)
    last = decompose(family, images.double(), convention=convention, normalize=normalize, tokens=heads[-1])
    own = sum(last.tokens(d.n_layers - 1, head) for head in range(d.n_heads))
    assert torch.allclose(last.token_sums(toward), torch.einsum("bnd,bd->bn", own, toward), atol=1e-12)


class Shifts(torch.nn.Module):
    """Stands in for timm's relative positions."""

    def get_bias(self) -> Tensor:
        return torch.randn(1, 4, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("pool", ["class token", "mean, then LayerNorm", "PE"])
@pytest.mark.parametrize("chosen", [True, heads[:, 1] | heads[2, 3]])
def test_relative_positions_count_where_attention_is_made_again(
    make_tower: MakeTower, images: Tensor, chosen: Any, pool: str
) -> None:
    visual = make_tower(dtype=torch.float64, **FAMILIES[pool] | {"rope": None})
    for block in visual.blocks:
        block.attn.rel_pos = Shifts()  # pyright: ignore
    d = decompose(visual, images.double(), tokens=chosen)
    assert torch.allclose(d.tokens(1, 1).sum(1), d.heads[:, 1, 1], atol=1e-12)
    if pool == "class token":
        _, cache = visual.run_with_cache(images.double())
        assert torch.allclose(d.attention(1, 1), cache["pattern", 1][:, 1, 0], atol=1e-12)


def test_a_pattern_that_a_hook_edits_is_the_attention(family: HookedViT, images: Tensor) -> None:
    def away_from_the_last(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[..., -1] = 0
        return pattern / pattern.sum(-1, keepdim=True)

    for chosen in (True, heads[0, 1] | heads[1, :3] | heads[2, 2]):
        with family.hooks([("blocks.1.attn.hook_pattern", away_from_the_last)]):
            d = decompose(family, images.double(), tokens=chosen)  # pyright: ignore[reportArgumentType]
        for layer, head in ((0, 1), (1, 0), (1, 2), (2, 2)):
            assert torch.allclose(d.tokens(layer, head).sum(1), d.heads[:, layer, head], atol=1e-12)
            assert bool((d.attention(layer, head)[:, -1] == 0).all()) == (layer == 1)


def test_conventions_differ_in_the_bookkeeping_alone(family: HookedViT, images: Tensor) -> None:
    centred, paper = (decompose(family, images.double(), convention=c) for c in ("centred", "paper"))
    assert torch.allclose(centred.features, paper.features, atol=1e-12)
    assert len(centred.maps.bias_names) == len(centred.maps.bias) > 0 and not len(paper.maps.bias)


def test_parts_of_a_batch_are_the_batch(family: HookedViT, images: Tensor) -> None:
    whole = decompose(family, images.double(), tokens=heads[-1])
    parts = [decompose(family, images[i : i + 2].double(), tokens=heads[-1]) for i in (0, 2, 4)]
    joined = Decomposition.cat(parts)
    assert torch.allclose(joined.coords, whole.coords, atol=1e-12)
    assert torch.allclose(joined.tokens(2, 0), whole.tokens(2, 0), atol=1e-12)
    assert joined.sum_error < 1e-13
    assert Decomposition.cat([whole]) is whole
    assert torch.equal(Decomposition.cat(parts[:2]).coords, joined.coords[:4])
    assert Decomposition.cat([parts[0], parts[1].edit(coords=parts[1].coords)]).token_terms is None


def test_a_saved_decomposition_is_the_same(family: HookedViT, images: Tensor, tmp_path: Path) -> None:
    d = decompose(family, images.double(), tokens=heads[1])
    again = Decomposition.load(d.save(tmp_path / "d.safetensors"))
    assert torch.equal(again.features, d.features) and torch.equal(again.heads, d.heads)
    assert torch.equal(again.tokens(1, 2), d.tokens(1, 2)) and again.maps.matches(d.maps)
    assert (tmp_path / "d.safetensors").stat().st_size < 4e6


def test_moments_of_batches_are_those_of_all(family: HookedViT, images: Tensor, tmp_path: Path) -> None:
    d = decompose(family, images.double())
    moments = Moments.fit(family, [images[:2].double(), images[2:].double()])
    assert torch.allclose(moments.features, d.features.mean(0), atol=1e-12)
    assert torch.allclose(moments.pool, d.pool.mean(0)) and torch.allclose(moments.heads, d.heads.mean(0))
    again = Moments.load(moments.save(tmp_path / "moments.safetensors"))
    assert again.has_pool == moments.has_pool == d.has_pool == family.cfg.has_pool
    assert torch.equal(again.covariance("coords"), moments.covariance("coords"))
    ours, theirs = (
        {name: x for name, x in vars(m.streams).items() if x is not None} for m in (again, moments)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_autocast_rounds_the_tower_and_not_the_terms(family: HookedViT, images: Tensor) -> None:
    visual = family.float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = decompose(visual, images, tokens=True)
        assert rough.features.dtype == torch.float32 and rough.tokens(0, 0).dtype == torch.float32
    assert 1e-6 < rough.sum_error < 5e-2
    assert rough.maps.heads.dtype == rough.mlps.dtype == rough.coords.dtype == torch.float32
    exact = decompose(visual, images)  # by the maps that were built under autocast
    assert exact.sum_error < 1e-5
    assert torch.equal(term_maps(copy.deepcopy(visual), "centred").heads, exact.maps.heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_towers_have_terms_in_full(family: HookedViT, images: Tensor, dtype: torch.dtype) -> None:
    d = decompose(copy.deepcopy(family).to(dtype), images.to(dtype))
    assert d.features.dtype == torch.float32 and d.sum_error < (5e-2 if dtype == torch.bfloat16 else 1e-2)


def test_means_of_a_half_tower_are_of_what_it_wrote_in_full(make_tower: MakeTower, images: Tensor) -> None:
    visual = make_tower(dtype=torch.bfloat16, **FAMILIES["mean, then LayerNorm"])
    names, seen = ("ln_final.hook_scale", "blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre"), list[Tensor]()
    with visual.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x.double())) for name in names]):
        d = decompose(visual, images.bfloat16())
    embed, mlp, scale = seen
    assert visual.proj is not None
    for found, rows in ((d.embed, embed), (d.mlps[:, 1], mlp)):
        x = rows[:, visual.cfg.pooled_rows].mean(1)
        read = (x - x.mean(1, keepdim=True)) / scale[:, 0] * visual.ln_final.w.double() @ visual.proj.double()
        torch.testing.assert_close(found.double(), read, rtol=1e-4, atol=1e-5)


def test_no_images_give_no_terms(family: HookedViT, images: Tensor) -> None:
    d = decompose(family, images[:0].double(), tokens=True)
    assert len(d) == 0 and d.tokens(0, 0).shape[0] == 0


def test_gradients_flow_through_what_inference_mode_left(family: HookedViT, images: Tensor) -> None:
    with torch.inference_mode():
        decompose(family, images.double())
    d = decompose(family, images.double())
    leaf = d.coords.clone().requires_grad_()
    d.edit(coords=leaf).features.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_images_of_hooks_are_kept_together(family: HookedViT, images: Tensor) -> None:
    """A hook of PyTorch's own that holds something for each image meets the whole batch."""
    shift = torch.randn(5, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mlp = family.get_submodule("blocks.1.mlp")
    handle = mlp.register_forward_hook(lambda *call: call[2] + shift[: len(call[2])])
    try:
        d = decompose(family, images.double())
        assert d.target is not None and torch.allclose(d.target, family(images.double()), atol=1e-12)
    finally:
        handle.remove()


# One model, or another


@contextmanager
def edited(visual: HookedViT) -> Iterator[HookedViT]:
    with torch.no_grad():
        yield copy.deepcopy(visual)


def test_a_fingerprint_is_of_the_weights_whatever_their_precision(family: HookedViT) -> None:
    mark = fingerprint(family)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert same_model(mark, fingerprint(copy.deepcopy(family).to(dtype)))
    assert same_model(mark, fingerprint(copy.deepcopy(family)))


@pytest.mark.parametrize(
    ("precision", "allowed"), [(2.0**-23, 1e-5), (2.0**-10, 2.0**-8), (2.0**-7, 2.0**-5)]
)
def test_fingerprints_may_differ_by_what_rounding_leaves(precision: float, allowed: float) -> None:
    mark = torch.tensor([0.0, 0.0, 7.0, precision], dtype=torch.float64)
    full = torch.tensor([0.0, 0.0, 7.0, 2.0**-23], dtype=torch.float64)
    moved = torch.tensor([0.0, allowed, 0.0, 0.0], dtype=torch.float64)
    for ours, theirs in ((mark, full), (full, mark)):
        assert same_model(ours + moved, theirs) and not same_model(ours - 1.01 * moved, theirs)
    assert not same_model(mark, full + torch.tensor([0.0, 0, 1, 0]))


def test_maps_match_those_of_their_model_and_convention(make_tower: MakeTower) -> None:
    tower = make_tower()
    ours, paper = term_maps(tower, "centred"), term_maps(tower, "paper")
    assert ours.matches(ours) and ours.matches(replace(ours))
    of_others = [term_maps(make_tower(**changes), "centred") for changes in ({"seed": 5}, {"n_layers": 2})]
    for other in (paper, replace(ours, convention="paper"), replace(paper, convention="centred"), *of_others):
        assert not ours.matches(other)


def test_a_fingerprint_sees_one_neuron(family: HookedViT) -> None:
    mark = fingerprint(family)
    for neuron in range(0, 48, 5):
        with edited(family) as other:
            other.blocks[1].mlp.W_out[:, neuron] = 0  # pyright: ignore
        assert not same_model(mark, fingerprint(other))


def test_a_fingerprint_sees_the_activation(make_tower: MakeTower) -> None:
    a, b = (make_tower(activation=kind) for kind in ("gelu", "quick_gelu"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not same_model(fingerprint(a), fingerprint(b))


def test_a_fingerprint_is_that_of_earlier_releases(make_tower: MakeTower) -> None:
    """Moments and repairs that were saved with it are of this model still."""
    tower = make_tower()
    with torch.no_grad():
        tower.blocks[0].mlp.b_in.zero_()  # pyright: ignore
    mark = fingerprint(tower)
    assert mark.dtype == torch.float64 and len(mark) == 398
    first = torch.tensor([2.56540465, -3.54206729, 1.71148479], dtype=torch.float64)
    torch.testing.assert_close(mark[:3], first, rtol=1e-5, atol=0)
    assert mark[-2:].tolist() == [1_616_338_777, 2.0**-23]
    torch.testing.assert_close(mark[:-2].norm(), torch.tensor(35.2596).double(), rtol=1e-5, atol=0)


def test_a_fingerprint_is_the_same_in_whatever_order_fields_stand(
    make_tower: MakeTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what was fitted on a model is known again by a later release."""
    tower = make_tower()
    mark, fields = fingerprint(tower), list(tower.cfg.to_dict().items())
    monkeypatch.setattr(type(tower.cfg), "to_dict", lambda cfg: dict(fields[::-1]))
    assert torch.equal(fingerprint(tower), mark)


def test_every_number_of_a_small_weight_is_watched_and_some_of_a_large_one() -> None:
    module = torch.nn.Linear(5, 4)
    for place in range(20):
        watched = WatchedWeights.of(module)
        assert watched.are_those_of(module)
        module.weight.data.view(-1)[place] += 1
        assert not watched.are_those_of(module)
    columns = torch.arange(24.0).view(4, 6)[:, ::2]
    assert _spread(columns).tolist() == list(range(23))  # where it lies, what is between them too
    assert _spread(torch.arange(1000.0)).tolist() == list(range(0, 1000, 62))


def test_weights_written_past_autograd_are_noticed(family: HookedViT, images: Tensor) -> None:
    before = decompose(family, images.double())
    family.blocks[0].attn.W_QKV.data.mul_(1.5)  # pyright: ignore
    after = decompose(family, images.double())
    assert not before.maps.matches(after.maps) and after.sum_error < 1e-13
    family.blocks[0].mlp.W_out.data.view(-1)[500:] *= 1.5  # pyright: ignore
    assert decompose(family, images.double()).sum_error < 1e-13


def test_one_number_that_an_optimizer_changes_is_noticed(make_tower: MakeTower, images: Tensor) -> None:
    """Whichever it is: of large weights a sample alone is compared."""
    tower = make_tower(dtype=torch.float64)
    for name, parameter in tower.named_parameters():
        if not name.startswith(("blocks.1.attn.W_out", "blocks.2.mlp.W_out", "ln_final", "proj")):
            continue
        before = decompose(tower, images.double())
        with torch.no_grad():
            parameter.view(-1)[1] += 0.5
        after, fresh = decompose(tower, images.double()), decompose(copy.deepcopy(tower), images.double())
        assert after.sum_error < 1e-12, name
        torch.testing.assert_close(after.heads, fresh.heads, rtol=0, atol=0)
        torch.testing.assert_close(after.mlps, fresh.mlps, rtol=0, atol=0)
        assert not torch.equal(after.features, before.features), name


def test_weights_that_lie_column_by_column_are_watched_too(make_tower: MakeTower, images: Tensor) -> None:
    tower = make_tower(dtype=torch.float64)
    assert isinstance(tower.proj, torch.nn.Parameter)
    plain = decompose(tower, images.double())
    tower.proj.data = tower.proj.data.T.contiguous().T
    assert not tower.proj.is_contiguous()
    torch.testing.assert_close(decompose(tower, images.double()).heads, plain.heads)
    tower.proj.data.mul_(2)
    assert decompose(tower, images.double()).sum_error < 1e-12


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_inside_one_thread_there_is_one(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_maps_are_made_once_for_weights_that_stay(make_tower: MakeTower) -> None:
    tower = make_tower()
    kept = term_maps(tower, "centred")
    assert term_maps(tower, "centred") is kept
    assert term_maps(tower, "paper") is not kept and term_maps(tower, "centred") is kept
    assert term_maps(copy.deepcopy(tower), "centred") is not kept


def test_decompositions_that_differ_in_kind_do_not_join(make_tower: MakeTower, images: Tensor) -> None:
    tower = make_tower()
    some, others = decompose(tower, images, tokens=heads[0, 0]), decompose(tower, images, tokens=heads[1, 1])
    with pytest.raises(ValueError, match="tokens of the same heads"):
        Decomposition.cat([some, others])
    wide = decompose(make_tower(dtype=torch.float64), images.double())
    other = decompose(make_tower(seed=9), images)
    for unlike in (wide, other, decompose(tower, images, normalize=True)):
        with pytest.raises(ValueError, match="of one model with the same options"):
            Decomposition.cat([some, unlike])
    with pytest.raises(ValueError, match="at least one"):
        Decomposition.cat([])


def test_numbers_of_any_kind_choose_an_image(make_tower: MakeTower, images: Tensor) -> None:
    d = decompose(make_tower(), images)
    for index in (1, torch.tensor(1), torch.tensor([1])[0]):
        assert torch.equal(d[index].coords, d.coords[1:2])
    with pytest.raises(IndexError, match=r"0\.\.4; received 7"):
        d[torch.tensor(7)]
    with pytest.raises(IndexError, match=r"of one axis; received \[1, 2\]; flatten them"):
        d[torch.tensor([[0, 1]])]


def test_maps_of_a_single_layer_move(make_tower: MakeTower, images: Tensor) -> None:
    maps = decompose(make_tower(n_layers=1, n_heads=1, d_head=32, **FAMILIES["PE"]), images).maps
    assert maps.d_head == 32
    moved = maps.to(torch.float64)
    assert maps.direct and (moved.heads.shape, moved.heads.dtype) == (maps.heads.shape, torch.float64)
    assert maps.to(torch.float32) is maps
