"""TransformerLens' helpers on an image tower: identities, documented shapes, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.utilities.slice import Slice

import decompclip
from decompclip.tower.cache import ViTCache, nearest_names
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT

TOWERS = {
    "plain": {},
    "layer_scale": {"layer_scale": True},
    "no_ln_pre": {"ln_pre": False},
    "post_norm": {"norm": "post"},
}
close = torch.testing.assert_close


@pytest.fixture(scope="module", params=TOWERS)
def visual(request: pytest.FixtureRequest, make_tower: Callable[..., HookedViT]) -> HookedViT:
    return make_tower(**TOWERS[request.param])


@pytest.fixture(scope="module")
def run(visual: HookedViT, images: Tensor) -> tuple[Tensor, ViTCache]:
    with torch.no_grad():
        return visual.run_with_cache(images)


def test_documented_shapes(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    _, cache = run
    b, t, h, d, e, m = 5, 7, 4, 32, 8, 48
    shapes = {
        (b, t, d): [
            "embed",
            "pos_embed",
            "hook_ln_pre",
            *((n, 2) for n in ("resid_pre", "resid_mid", "resid_post")),
        ],
        (b, t, h, e): [(n, 1) for n in "qkvz"],
        (b, h, t, t): [("attn_scores", 0), ("pattern", -1), ("attn", 1)],
        (b, t, h, d): [("result", 2)],
        (b, t, m): [("pre", 0), ("post", -1)],
        (b, t, 1): [("scale", 1, "ln1"), ("scale", 1, "ln2")],
        (b, 1, 1): ["scale", "ln_final.hook_scale"],
        (b, 1, d): ["normalized"],
    }
    for shape, keys in shapes.items():
        for key in keys:
            assert tuple(cache[key].shape) == shape, key
    assert cache["resid_post", -1] is cache["blocks.2.hook_resid_post"]
    assert cache["z1"] is cache["z", 1]
    assert repr(cache) == f"ViTCache({len(cache)} activations, batch axis: yes)"


@pytest.mark.parametrize("pos_slice", [None, 0, -1, (1, 4), [0, 3]])
def test_what_was_written_sums_to_the_stream(run: tuple[Tensor, ViTCache], pos_slice: Any) -> None:
    _, cache = run
    rows = {"None": slice(None), "0": 0, "-1": -1, "(1, 4)": slice(1, 4), "[0, 3]": [0, 3]}[str(pos_slice)]
    for layer in range(3):
        for mlp_input, name in ((False, "resid_pre"), (True, "resid_mid")):
            stack = cache.decompose_resid(layer, mlp_input=mlp_input, pos_slice=pos_slice)
            close(stack.sum(0), cache[name, layer][:, rows], rtol=1e-4, atol=1e-5)
    stack, labels = cache.decompose_resid(pos_slice=pos_slice, return_labels=True)
    close(stack.sum(0), cache["resid_post", 2][:, rows], rtol=1e-4, atol=1e-5)
    assert len(stack) == len(labels)
    assert labels[-2:] == ["2_attn_out", "2_mlp_out"]


def test_the_stream_begins_behind_ln_pre(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    _, cache = run
    stack, labels = cache.decompose_resid(0, return_labels=True)
    assert labels == (["embed", "pos_embed"] if visual.ln_pre is None else ["ln_pre"])
    close(stack.sum(0), cache["resid_pre", 0])
    both = cache.decompose_resid(mode="mlp"), cache.decompose_resid(mode="attn", incl_embeds=False)
    close(sum(part.sum(0) for part in both), cache["resid_post", 2], rtol=1e-4, atol=1e-5)
    assert cache.decompose_resid(0, incl_embeds=False).shape == (0, 5, 7, 32)
    assert cache.decompose_resid(0, incl_embeds=False, pos_slice=3).shape == (0, 5, 32)


def test_heads_and_output_biases_sum_to_the_attention(
    visual: HookedViT, run: tuple[Tensor, ViTCache]
) -> None:
    _, cache = run
    for keep_result in (True, False):
        if not keep_result:
            kept = {name: x for name, x in cache.items() if "hook_result" not in name}
            cache = ViTCache(kept, visual)
        stack, labels = cache.stack_head_results(return_labels=True)
        assert labels[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
        for layer, block in enumerate(blocks(visual)):
            bias: Any = block.attn.b_O
            if block.post_norm:
                bias = (bias - bias.mean()) / cache["scale", layer, "ln1"] * block.ln1.w + block.ln1.b
            bias = bias * (1 if block.ls1 is None else block.ls1)
            summed = stack[4 * layer : 4 * layer + 4].sum(0) + bias
            close(summed, cache["attn_out", layer], rtol=1e-4, atol=1e-5)
        for layer in range(4):
            rest, labels = cache.stack_head_results(
                layer, incl_remainder=True, return_labels=True, pos_slice=0
            )
            assert labels[-1] == "remainder"
            stream = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
            close(rest.sum(0), stream[:, 0], rtol=1e-4, atol=1e-5)
    assert cache.stack_head_results(0).shape == (0, 5, 7, 32)


@pytest.mark.parametrize("pos_slice", [0, [0], (0, 1)])
def test_a_normed_stack_projects_to_the_feature(
    visual: HookedViT, run: tuple[Tensor, ViTCache], pos_slice: Any
) -> None:
    feature, cache = run
    for stack in (
        cache.decompose_resid(apply_ln=True, pos_slice=pos_slice),
        cache.stack_head_results(incl_remainder=True, apply_ln=True, pos_slice=pos_slice),
    ):
        summed = (stack.sum(0) + visual.ln_final.b) @ visual.proj
        close(summed.reshape_as(feature), feature, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ln_final", ["rows", "pooled"])
def test_positions_of_a_stack_that_every_row_counts_in(
    make_tower: Callable[..., HookedViT], images: Tensor, ln_final: str
) -> None:
    """Each row at its own scale, or all of them at that of their mean."""
    visual = make_tower(pool="mean", ln_final=ln_final, n_prefix=0)
    features, cache = visual.run_with_cache(images)
    whole = cache.decompose_resid(apply_ln=True)
    close(cache.decompose_resid(apply_ln=True, pos_slice=(2, 5)), whole[:, :, 2:5])
    if ln_final == "rows":
        end = cache.accumulated_resid(apply_ln=True)[-1]
        close(end.mean(1) @ visual.proj, features)
        close(cache.apply_ln_to_stack(cache.accumulated_resid(), recompute_ln=True)[-1], end)
    scale = cache["ln_final.hook_scale"]
    assert scale.shape[1] == (6 if ln_final == "rows" else 1)
    stack = cache.decompose_resid()
    plain = (stack - stack.mean(-1, keepdim=True)) / scale * visual.ln_final.w
    close(whole, plain)


def test_a_normed_stack_is_a_blocks_input(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    _, cache = run
    for layer, block in enumerate(visual.blocks):
        for mlp_input, norm, name in ((False, block.ln1, "ln1"), (True, block.ln2, "ln2")):
            if visual.cfg.norm == "post":
                with pytest.raises(NotImplementedError, match="read the stack as it is"):
                    cache.decompose_resid(layer, mlp_input, apply_ln=True)
                continue
            stack = cache.decompose_resid(layer, mlp_input, apply_ln=True)
            expected = cache["normalized", layer, name] * norm.w  # pyright: ignore
            close(stack.sum(0), expected, rtol=1e-4, atol=1e-5)
    if visual.cfg.norm == "post":
        return
    one = cache.apply_ln_to_stack(cache.decompose_resid(1)[:, 2], 1, batch_slice=2, has_batch_dim=False)
    normed = cache.decompose_resid(1, apply_ln=True)
    close(one, normed[:, 2])
    close(cache.decompose_resid(1, apply_ln=True, pos_slice=3), normed[:, :, 3])
    for batch_slice in (2, (1, 3), [3, 0]):  # cuts the stack of all images
        rows = slice(*batch_slice) if isinstance(batch_slice, tuple) else batch_slice
        close(cache.apply_ln_to_stack(cache.decompose_resid(1), 1, batch_slice=batch_slice), normed[:, rows])
    for cut in (cache.decompose_resid(1)[:, 1:2], cache.decompose_resid(1)[:, :2]):  # which was cut before
        for recompute_ln in (False, True):
            with pytest.raises(ValueError, match="of all images of the cache"):
                cache.apply_ln_to_stack(cut, 1, batch_slice=(0, 1), recompute_ln=recompute_ln)


def test_accumulated_streams(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    feature, cache = run
    assert cache.accumulated_resid(1, incl_mid=True, return_labels=True)[1] == ["0_pre", "0_mid", "1_pre"]
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True, pos_slice=0)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    close(stack[3], cache["resid_mid", 1][:, 0])
    assert cache.accumulated_resid(1, mlp_input=True, return_labels=True)[1] == ["0_pre", "1_pre", "1_mid"]
    lens = cache.accumulated_resid(apply_ln=True, pos_slice=0) @ visual.proj
    close(lens[-1], feature, rtol=1e-4, atol=1e-5)
    close(lens[1], visual.ln_final(cache["resid_pre", 1][:, 0]) @ visual.proj, rtol=1e-4, atol=1e-5)


def test_a_cache_of_the_pooled_row(visual: HookedViT, images: Tensor, run: tuple[Tensor, ViTCache]) -> None:
    _, cache = run
    with torch.no_grad():
        feature, pooled = visual.run_with_cache(images, pooled_rows=True)
    for name in ("z", "attn_out", "resid_mid", "mlp_out", "resid_post"):
        assert pooled[name, -1].shape[1] == 1
    close(pooled.decompose_resid(pos_slice=0), cache.decompose_resid(pos_slice=0), rtol=1e-4, atol=1e-5)
    close(
        (pooled.decompose_resid(apply_ln=True, pos_slice=0).sum(0) + visual.ln_final.b) @ visual.proj, feature
    )
    for pos_slice in (None, -1, (0, 2)):
        with pytest.raises(
            ValueError, match="the class token alone, .* received a slice of .*; pass pos_slice=0"
        ):
            pooled.decompose_resid(pos_slice=pos_slice)


def test_without_a_batch_axis(visual: HookedViT, images: Tensor) -> None:
    with torch.no_grad():
        feature, cache = visual.run_with_cache(images[:1], remove_batch_dim=True)
    stack = cache.decompose_resid(apply_ln=True, pos_slice=0)
    assert stack.ndim == 2
    close((stack.sum(0) + visual.ln_final.b) @ visual.proj, feature[0], rtol=1e-4, atol=1e-5)
    assert "batch axis: no" in repr(cache)
    with pytest.raises(ValueError, match="of one image, without a batch axis"):
        cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=0), pos_slice=0, batch_slice=0)


def test_slices_of_the_batch(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    feature, cache = run
    two = cache.apply_slice_to_batch_dim((1, 3))
    assert isinstance(two, ViTCache)
    stack = two.decompose_resid(apply_ln=True, pos_slice=0)
    close((stack.sum(0) + visual.ln_final.b) @ visual.proj, feature[1:3], rtol=1e-4, atol=1e-5)
    assert not cache.apply_slice_to_batch_dim(2).has_batch_dim


@pytest.mark.usefixtures("ours_alone")
def test_what_would_be_wrong_is_refused(run: tuple[Tensor, ViTCache]) -> None:
    _, cache = run
    for pos_slice in (None, 1, -1, [3], (0, 2)):
        with pytest.raises(ValueError, match="the class token alone, for only it goes on to the feature"):
            cache.decompose_resid(apply_ln=True, pos_slice=pos_slice)
    with pytest.raises(NotImplementedError, match=r"layer=None with apply_ln.* received layer=1"):
        cache.accumulated_resid(1, apply_ln=True)
    with pytest.raises(NotImplementedError, match=r"take decompclip.logit_lens\(model, images, texts\)"):
        cache.logit_lens()
    projected: Any = {"project_output_onto": torch.ones(32)}
    for call in (cache.get_full_resid_decomposition, cache.stack_neuron_results):
        with pytest.raises(NotImplementedError, match="neurons=neuron_terms"):
            call(**projected)
    with pytest.raises(NotImplementedError, match="neurons=neuron_terms"):
        cache.get_neuron_results(1, **projected)
    whole = cache.decompose_resid(pos_slice=0)
    for wrong in (torch.ones(19), "a star", torch.ones(2, 2, 20)):
        with pytest.raises(ValueError, match=r"expected directions \[text, 20\] or \[20\]"):
            cache.logit_attrs(whole, wrong, pos_slice=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="say how it was sliced: pos_slice= and batch_slice="):
        cache.logit_attrs(cache.decompose_resid(), torch.ones(20), pos_slice=0)
    with pytest.raises(
        IndexError, match=r"a layer in 0\.\.3, or None for the end; received 4; the tower has 3"
    ):
        cache.decompose_resid(4)
    with pytest.raises(IndexError, match=r"a layer in 0\.\.2 with mlp_input; received 3"):
        cache.decompose_resid(3, mlp_input=True)
    with pytest.raises(ValueError, match="mode 'all', 'mlp' or 'attn'; received 'heads'"):
        cache.decompose_resid(mode="heads")  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match=r"a layer in 0\.\.2 \(or -3\.\.-1 from the end\); received 3 in"):
        cache["resid_post", 3]
    with pytest.raises(KeyError, match=r"received 'logits' \(hook_logits\); cached are"):
        cache["logits"]


@pytest.mark.parametrize("positions", [0, 3, -1, [0, 1], (0, 2)], ids=str)
def test_a_cache_of_some_positions_is_refused(
    make_tower: Callable[..., HookedViT], images: Tensor, positions: Any
) -> None:
    visual = make_tower()
    for asked in (positions, np.array(positions), torch.tensor(positions), Slice(positions)):
        refused = pytest.raises(
            ValueError, match="a cache of all positions; received pos_slice; leave it out"
        )
        with refused:
            visual.run_with_cache(images, pos_slice=asked)
        with refused:
            visual.get_caching_hooks(pos_slice=asked)
    visual.run_with_cache(images, pos_slice=None)


POOLS = {
    "class token": {},
    "registers": {"n_prefix": 3, "layer_scale": True},
    "mean of rows": {"pool": "mean"},
    "mean, then LayerNorm": {"pool": "mean", "ln_final": "pooled"},
    "mean, no prefix": {"pool": "mean", "n_prefix": 0, "pos": False},
    "attention": {"pool": "attention", "pool_heads": 2, "pool_mlp": 8},
    "attention over patches": {"pool": "attention", "pool_heads": 2, "pool_prefix": False},
    "post-norm": {"norm": "post", "pool": "mean"},
    "gated": {"gated": True, "mlp_norm": True, "attn_norm": True},
}
POSITIONS: list[Any] = [
    None, 0, 3, -1, [0], [1, 4], (1, 3), (2,), (1, 6, 2), slice(1, None), slice(-2, None),
    np.int64(2), np.array([5, 1]), torch.tensor(4), torch.tensor([2, 3]), Slice(2), Slice([4, 1]),
]  # fmt: skip


def rows_of(position: Any, n: int) -> Any:
    """What a position means: an index of plain Python, by the documentation of TransformerLens' Slice."""
    position = position.slice if isinstance(position, Slice) else position
    if position is None:
        return list(range(n))
    if isinstance(position, tuple):
        return list(range(n))[slice(*position)]
    if isinstance(position, slice):
        return list(range(n))[position]
    found = np.arange(n)[np.asarray(position)]
    return int(found) if found.ndim == 0 else found.tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", POOLS)
def test_every_helper_takes_every_kind_of_position(
    make_tower: Callable[..., HookedViT], images: Tensor, name: str
) -> None:
    visual = make_tower(dtype=torch.float64, **POOLS[name])
    cfg = visual.cfg
    _, cache = visual.run_with_cache(images.double())
    pooled = list(range(cfg.n_tokens)[cfg.pooled_rows])
    whole: dict[str, Any] = {
        "accumulated_resid": cache.accumulated_resid(),
        "decompose_resid": cache.decompose_resid(),
        "stack_head_results": cache.stack_head_results(incl_remainder=True),
        "stack_neuron_results": cache.stack_neuron_results(neuron_slice=[3, 40], incl_remainder=True),
        "get_full_resid_decomposition": cache.get_full_resid_decomposition(),
    }
    options: dict[str, dict[str, Any]] = {
        "stack_head_results": {"incl_remainder": True},
        "stack_neuron_results": {"neuron_slice": [3, 40], "incl_remainder": True},
    }
    for position in POSITIONS:
        rows = rows_of(position, cfg.n_tokens)
        chosen = [rows] if isinstance(rows, int) else rows
        for helper, stack in whole.items():
            given = options.get(helper, {})
            found = getattr(cache, helper)(pos_slice=position, **given)
            close(found, stack[:, :, rows])
            if helper == "accumulated_resid":
                continue
            if not set(chosen) <= set(pooled):
                with pytest.raises(
                    ValueError, match=r"the class token alone|rows that the tower pools, \d\.\.6"
                ):
                    getattr(cache, helper)(pos_slice=position, apply_ln=True, **given)
                continue
            scale = cache["ln_final.hook_scale"]
            normed = []
            for row in chosen:  # each at the scale that its row, or the mean of all, was divided by
                x = stack[:, :, row]
                own = scale[:, 0 if scale.shape[1] == 1 else pooled.index(row)]
                normed.append((x - x.mean(-1, keepdim=True)) / own * visual.ln_final.w)
            expected = torch.stack(normed, 2)
            expected = expected[:, :, 0] if isinstance(rows, int) else expected
            close(getattr(cache, helper)(pos_slice=position, apply_ln=True, **given), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", POOLS)
def test_a_full_decomposition_is_of_heads_neurons_embedding_and_biases(
    make_tower: Callable[..., HookedViT], images: Tensor, name: str
) -> None:
    visual = make_tower(dtype=torch.float64, **POOLS[name])
    _, cache = visual.run_with_cache(images.double())
    without = ViTCache({name: x for name, x in cache.items() if "hook_result" not in name}, visual)
    close(without.stack_head_results(), cache.stack_head_results())
    at: Any = (1, 4)
    for layer, mlp_input in ((2, False), (1, True), (None, False), (0, False)):
        stack, labels = cache.get_full_resid_decomposition(layer, mlp_input, pos_slice=at, return_labels=True)
        n = 3 if layer is None else layer
        stream = (
            cache["resid_mid", n] if mlp_input else cache["resid_post", n - 1] if n else cache["resid_pre", 0]
        )
        close(stack.sum(0), stream[:, 1:4])
        assert len(labels) == len(stack) and labels[-1] == "bias"
        some, chosen = cache.stack_neuron_results(
            layer, at, [3, 40], True, incl_remainder=True, mlp_input=mlp_input
        )
        close(some.sum(0), stream[:, 1:4])
        assert chosen == [f"L{number}N{neuron}" for number in range(n) for neuron in (3, 40)] + ["remainder"]
        heads = cache.stack_head_results(n + mlp_input or 0, pos_slice=at)
        close(stack[: len(heads)], heads)
        for number in range(n):
            block, post = visual.blocks[number], cache["post", number]
            for neuron in (0, 17):
                write = post[:, 1:4, neuron, None] * block.mlp.W_out[:, neuron]  # pyright: ignore
                if visual.cfg.norm == "post":
                    scale = cache["scale", number, "ln2"][:, 1:4]
                    write = (write - write.mean(-1, keepdim=True)) / scale * block.ln2.w  # pyright: ignore
                write = write if block.ls2 is None else write * block.ls2  # pyright: ignore
                close(stack[labels.index(f"L{number}N{neuron}")], write)
                close(cache.get_neuron_results(number, neuron, at)[..., 0, :], write)
        fewer, names = cache.get_full_resid_decomposition(
            layer, mlp_input, expand_neurons=False, pos_slice=at, return_labels=True
        )
        close(fewer.sum(0), stream[:, 1:4])
        if n:
            close(fewer[names.index("0_mlp_out")], cache["mlp_out", 0][:, 1:4])
    if visual.cfg.norm == "pre" and not visual.cfg.attn_norm:
        every: Any = blocks(visual)
        ones = [(b.ls1, b.ls2) if b.ls1 is not None else (1.0, 1.0) for b in every]
        of_biases: Any = sum(
            b.attn.b_written * one + b.mlp.b_out * two for b, (one, two) in zip(every, ones, strict=True)
        )
        whole = cache.get_full_resid_decomposition()
        close(whole[-1], of_biases.expand_as(whole[-1]))


@torch.no_grad()
@pytest.mark.parametrize("name", POOLS)
def test_logit_attributions_sum_to_the_logit(
    make_tower: Callable[..., Any], images: Tensor, name: str
) -> None:
    visual = make_tower(dtype=torch.float64, proj_bias=True, **POOLS[name])
    features, cache = visual.run_with_cache(images.double())
    texts = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    rows = (visual.cfg.pooled_rows.start, visual.cfg.n_tokens) if visual.cfg.pool != "cls" else 0
    stack = cache.decompose_resid(pos_slice=rows)
    if visual.cfg.pool == "attention":
        with pytest.raises(NotImplementedError, match=r"take attribute\(model.decompose"):
            cache.logit_attrs(stack, texts, pos_slice=rows)
        return
    found = cache.logit_attrs(stack, texts, pos_slice=rows)
    found = found if rows == 0 else found.mean(2)
    constants = (visual.ln_final.b @ visual.proj + visual.b_proj) @ texts.T
    close(found.sum(0) + constants, features @ texts.T)
    one = cache.logit_attrs(stack, texts[0], texts[2], pos_slice=rows)
    one = one if rows == 0 else one.mean(2)
    close(one, found[..., 0] - found[..., 2])
    some = cache.logit_attrs(cache.decompose_resid(pos_slice=rows), texts[1], None, rows, [3, 1])
    some = some if rows == 0 else some.mean(2)
    close(some, found[:, [3, 1], 1])
    alone = cache.logit_attrs(stack[:, 2], texts, None, rows, 2, has_batch_dim=False)
    close(alone if rows == 0 else alone.mean(1), found[:, 2])


@torch.no_grad()
def test_a_scale_of_its_own(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    _, cache = run
    streams = cache.accumulated_resid(pos_slice=0)
    close(
        cache.apply_ln_to_stack(streams, pos_slice=0, recompute_ln=True),
        torch.stack([visual.ln_final(x) for x in streams]),
    )
    if visual.cfg.norm == "pre":
        whole = cache.accumulated_resid(2)
        close(cache.apply_ln_to_stack(whole, 1, recompute_ln=True)[1], visual.blocks[1].ln1(whole[1]))  # pyright: ignore


@torch.no_grad()
def test_a_class_token_alone_has_its_own_scale(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    _, cache = make_tower().run_with_cache(images)
    stack = cache.decompose_resid()
    alone = cache.apply_ln_to_stack(stack[:, :, :1])
    close(alone[:, :, 0], cache.apply_ln_to_stack(stack[:, :, 0], pos_slice=0))
    for rows in (slice(0, 2), slice(None)):
        with pytest.raises(ValueError, match="the class token alone"):
            cache.apply_ln_to_stack(stack[:, :, rows])


@torch.no_grad()
def test_a_norm_of_the_mean_is_no_rows(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    _, cache = make_tower(pool="mean", ln_final="pooled").run_with_cache(images)
    with pytest.raises(NotImplementedError, match="reads their mean; take logit_lens"):
        cache.accumulated_resid(apply_ln=True)
    with pytest.raises(NotImplementedError, match=r"reads their mean; take visual.read\(stream\)"):
        cache.apply_ln_to_stack(cache.accumulated_resid(), recompute_ln=True)


@torch.no_grad()
@pytest.mark.parametrize("name", POOLS)
def test_a_run_may_stop_and_go_on(make_tower: Callable[..., HookedViT], images: Tensor, name: str) -> None:
    visual = make_tower(**POOLS[name])
    features, cache = visual.run_with_cache(images)
    for layer in range(3):
        stream, part = visual.run_with_cache(images, stop_at_layer=layer)
        close(stream, cache["resid_pre", layer])
        assert not any(key.startswith(f"blocks.{layer}") for key in part)
        close(visual(images, stop_at_layer=layer - 3), stream)
        close(visual(stream, start_at_layer=layer), features)
        close(visual(stream, start_at_layer=layer - 3, stop_at_layer=3), cache["resid_post", 2])
    end = visual(images, stop_at_layer=3)
    close(end, cache["resid_post", 2])
    close(visual.read(end), features)
    for start, stop in ((3, None), (None, 4), (2, 1), (None, -4), (-4, None)):
        with pytest.raises(IndexError, match=r"start_at_layer in 0\.\.2 and stop_at_layer from there to 3"):
            visual(images, start_at_layer=start, stop_at_layer=stop)
    with pytest.raises(ValueError, match=r"with start_at_layer the stream \[batch, \d, 32\]"):
        visual(images, start_at_layer=1)


def test_a_model_takes_a_stream_too() -> None:
    model = decompclip.load("shapes")
    images = torch.randn(2, 3, 48, 48)
    features, cache = model.run_with_cache(images)
    close(model.run_with_hooks(cache["resid_pre", 3], start_at_layer=3), features)
    close(model.run_with_cache(images, stop_at_layer=3)[0], cache["resid_pre", 3])


def test_near_names_end_so_or_hold_it_or_are_spelt_alike() -> None:
    known = ["a.hook_pre_linear", "b.hook_pre", "c.hook_pre", "d.hook_pre", "e.hook_pre", "hook_z"]
    assert nearest_names("hook_pre", known) == ["b.hook_pre", "c.hook_pre", "d.hook_pre"]
    assert nearest_names("pre_lin", known) == ["a.hook_pre_linear"]
    assert nearest_names("b.hok_pre", known)[0] == "b.hook_pre" and nearest_names("?", known) == []


@pytest.mark.parametrize(
    "wrong, near", [("resid_post", "hook_resid_post"), ("blocks.0.atn.hook_z", "blocks.0.attn.hook_z")]
)
def test_an_unknown_name_is_told_the_nearest_everywhere(
    visual: HookedViT, images: Tensor, wrong: str, near: str
) -> None:
    def nothing(tensor: Tensor, *, hook: Any) -> None:
        raise AssertionError

    model = decompclip.load("shapes")
    hooks: Any = [(wrong, nothing)]
    calls: list[Callable[[], Any]] = [
        lambda: visual.run_with_cache(images, names_filter=wrong),
        lambda: visual.run_with_cache(images, names_filter=["hook_embed", wrong]),
        lambda: visual.get_caching_hooks([wrong]),
        lambda: visual.add_caching_hooks(wrong),
        lambda: visual.cache_some({}, wrong),  # pyright: ignore[reportArgumentType]
        lambda: visual.run_with_hooks(images, fwd_hooks=hooks),
        lambda: visual.run_with_hooks(images, bwd_hooks=hooks, reset_hooks_end=False),
        lambda: visual.hooks(fwd_hooks=hooks).__enter__(),
        lambda: visual.hooks(bwd_hooks=hooks).__enter__(),
        lambda: visual.add_hook(wrong, nothing),
        lambda: visual.add_perma_hook(wrong, nothing),
        lambda: model.run_with_cache(torch.randn(1, 3, 48, 48), names_filter=wrong),
        lambda: model.run_with_hooks(torch.randn(1, 3, 48, 48), fwd_hooks=hooks),
        lambda: model.add_hook(wrong, nothing),
        lambda: model.hooks(fwd_hooks=hooks).__enter__(),
    ]
    for call in calls:
        with pytest.raises(KeyError, match=f"no hook point '{wrong}' .*nearest: .*{near}"):
            call()
    assert not any(point.has_hooks() for point in visual.hook_dict.values())
    _, cache = visual.run_with_cache(images)
    with pytest.raises(KeyError, match=f"cached are .*nearest .*{near}"):
        cache[wrong.replace("resid_post", "hook_resid_post")]
