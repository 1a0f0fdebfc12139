"""TransformerLens' helpers on an image tower: identities, documented shapes, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import decompclip
from decompclip.tower.cache import ViTCache
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
        for layer, block in enumerate(visual.blocks):
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
    _, cache = visual.run_with_cache(images)
    whole = cache.decompose_resid(apply_ln=True)
    close(cache.decompose_resid(apply_ln=True, pos_slice=(2, 5)), whole[:, :, 2:5])
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
    close(one, cache.decompose_resid(1, apply_ln=True)[:, 2])


def test_accumulated_streams(visual: HookedViT, run: tuple[Tensor, ViTCache]) -> None:
    feature, cache = run
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
    assert pooled["z", -1].shape[1] == 1
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
    with pytest.raises(NotImplementedError, match="recompute_ln"):
        cache.apply_ln_to_stack(cache.decompose_resid(1), 1, recompute_ln=True)
    assert ViTCache.stack_neuron_results is ViTCache.get_neuron_results
    for name in ("logit_lens", "logit_attrs", "get_neuron_results"):
        with pytest.raises(NotImplementedError, match=f"{name} is written for language models; use "):
            getattr(cache, name)()
    with pytest.raises(NotImplementedError, match="use decompose_resid and stack_head_results"):
        cache.get_full_resid_decomposition()
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
def test_a_cache_of_some_positions_is_refused(positions: Any) -> None:
    visual = decompclip.load("shapes").visual
    with pytest.raises(
        ValueError, match="expected a cache of all positions; received pos_slice; leave it out"
    ):
        visual.run_with_cache(torch.randn(1, 3, 48, 48), pos_slice=positions)
    visual.run_with_cache(torch.randn(1, 3, 48, 48), pos_slice=None)
