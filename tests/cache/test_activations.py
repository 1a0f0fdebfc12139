"""ViTCache: TransformerLens' helpers tell the truth about a ViT, or raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decompclip.models.vit import HookedViT

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["scaled", "without ln_pre", "plain"])
def any_tower(request: pytest.FixtureRequest, make_tower: Callable[..., HookedViT]) -> HookedViT:
    return make_tower(layer_scale=request.param == "scaled", ln_pre=request.param != "without ln_pre")


def test_names_are_transformerlens(tower: HookedViT, images: Tensor) -> None:
    features, cache = tower.run_with_cache(images)
    torch.testing.assert_close(features, tower(images))
    assert cache["resid_post", 2] is cache["blocks.2.hook_resid_post"]
    assert cache["resid_post", -1] is cache["resid_post", 2]
    assert cache["pattern", 0].shape == (5, 4, 7, 7)
    assert cache["scale", 1, "ln2"].shape == (5, 7, 1)
    assert cache["z", 1].shape == (5, 7, 4, 8)
    torch.testing.assert_close(cache["pattern", 1].sum(-1), torch.ones(5, 4, 7))
    with pytest.raises(IndexError, match=r"a layer in 0\.\.2 .* received 3"):
        cache["resid_post", 3]
    with pytest.raises(KeyError, match="name of a cached activation.*list them with cache.keys"):
        cache["nothing"]


@pytest.mark.parametrize("layer", [0, 1, 2, 3, None])
def test_writes_sum_to_the_stream(any_tower: HookedViT, images: Tensor, layer: int | None) -> None:
    _, cache = any_tower.run_with_cache(images)
    stack, labels = cache.decompose_resid(layer, return_labels=True)
    last = 3 if layer is None else layer
    stream = cache["resid_post", 2] if last == 3 else cache["resid_pre", last]
    torch.testing.assert_close(stack.sum(0), stream, **CLOSE)
    assert labels[0] == ("embed" if any_tower.ln_pre is None else "ln_pre")
    assert len(labels) == len(stack)
    whole = sum(cache.decompose_resid(layer, mode=m, incl_embeds=m == "mlp").sum(0) for m in ("mlp", "attn"))
    torch.testing.assert_close(whole, stream, **CLOSE)


def test_the_stream_before_an_mlp(any_tower: HookedViT, images: Tensor) -> None:
    _, cache = any_tower.run_with_cache(images)
    torch.testing.assert_close(
        cache.decompose_resid(1, mlp_input=True).sum(0), cache["resid_mid", 1], **CLOSE
    )


def test_writes_past_the_last_norm_sum_to_the_feature(any_tower: HookedViT, images: Tensor) -> None:
    features, cache = any_tower.run_with_cache(images)
    stack = cache.decompose_resid(apply_ln=True, pos_slice=0)
    torch.testing.assert_close((stack.sum(0) + any_tower.ln_final.b) @ any_tower.proj, features, **CLOSE)
    heads = cache.stack_head_results(incl_remainder=True, apply_ln=True, pos_slice=0)
    torch.testing.assert_close((heads.sum(0) + any_tower.ln_final.b) @ any_tower.proj, features, **CLOSE)


@pytest.mark.parametrize("with_result", [True, False])
def test_heads_sum_to_attention_less_its_bias(
    any_tower: HookedViT, images: Tensor, with_result: bool
) -> None:
    def wanted(name: str) -> bool:
        return with_result or not name.endswith("hook_result")

    _, cache = any_tower.run_with_cache(images, names_filter=wanted)
    stack, labels = cache.stack_head_results(2, return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    for layer in range(2):
        block = any_tower.get_submodule(f"blocks.{layer}")
        bias = block.attn.b_O if block.ls1 is None else block.attn.b_O * block.ls1  # type: ignore[union-attr,operator]
        written = cache["attn_out", layer] - bias
        torch.testing.assert_close(stack[4 * layer : 4 * layer + 4].sum(0), written, **CLOSE)


def test_accumulated_streams(any_tower: HookedViT, images: Tensor) -> None:
    features, cache = any_tower.run_with_cache(images)
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    torch.testing.assert_close(stack[2], cache["resid_pre", 1])
    read = cache.accumulated_resid(apply_ln=True, pos_slice=0) @ any_tower.proj
    torch.testing.assert_close(read[-1], features, **CLOSE)


def test_what_would_be_wrong_is_refused(tower: HookedViT, images: Tensor) -> None:
    _, cache = tower.run_with_cache(images)
    with pytest.raises(ValueError, match="expected the class token alone.*pos_slice=0"):
        cache.decompose_resid(apply_ln=True)
    with pytest.raises(NotImplementedError, match="expected layer=None with apply_ln"):
        cache.accumulated_resid(1, apply_ln=True)
    with pytest.raises(IndexError, match=r"expected a layer in 0\.\.3, or None for the end; received 4"):
        cache.decompose_resid(4)
    with pytest.raises(ValueError, match="expected mode 'all', 'mlp' or 'attn'; received 'head'"):
        cache.decompose_resid(mode="head")  # type: ignore[arg-type]
    for name in ("logit_lens", "logit_attrs", "stack_neuron_results", "get_full_resid_decomposition"):
        with pytest.raises(NotImplementedError, match=f"{name} is written for language models; use "):
            getattr(cache, name)()


def test_a_cache_of_the_pooled_row(tower: HookedViT, images: Tensor) -> None:
    features, cache = tower.run_with_cache(images, pooled_rows=True)
    assert cache["resid_post", 2].shape == (5, 1, 32)
    stack = cache.decompose_resid(apply_ln=True, pos_slice=0)
    torch.testing.assert_close((stack.sum(0) + tower.ln_final.b) @ tower.proj, features, **CLOSE)
    with pytest.raises(ValueError, match="expected the class token alone"):
        cache.decompose_resid()


def test_one_image_of_a_cache(tower: HookedViT, images: Tensor) -> None:
    _, cache = tower.run_with_cache(images)
    one = cache.apply_slice_to_batch_dim(3)
    torch.testing.assert_close(one["resid_post", 1], cache["resid_post", 1][3])
    assert not one.has_batch_dim
    assert "batch axis: no" in repr(one)
