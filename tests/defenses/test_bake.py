"""Repairs folded into weights: the outputs of the causal edit, without hooks."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.decomposition.components import Components, embed, everything, heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.defenses.bake import average_over_tokens, bake
from decompclip.defenses.decomp import DecompRep
from decompclip.models.clip import HookedCLIP
from decompclip.models.folders import save_model
from decompclip.models.loading import load
from decompclip.models.text import WordTokenizer
from decompclip.operators.ablation import MeanAblate, ZeroAblate

from ..training.conftest import SIDE, small_clip

TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LayerScale": {"layer_scale": True},
    "no norm before block 0": {"ln_pre": False},
    "mean of the patches": {"pool": "mean", "n_prefix": 0, "ln_final": "pooled"},
    "attention pool": {"pool": "attention", "pool_heads": 4, "pool_mlp": 24, "n_prefix": 0},
    "norm behind": {"norm": "post", "layer_scale": True},
    "norm across heads": {"attn_norm": True, "gated": True, "mlp_norm": True},
}
EDITED = heads[0, 1] | heads[1] | mlps[0] | mlps[-1] | heads[-1, [0, 2]]


def around(visual: Any) -> HookedCLIP:
    """A model of the image tower alone."""
    tokenizer: Any = WordTokenizer(("cat",), 4)
    return HookedCLIP(visual, torch.nn.Module(), tokenizer=tokenizer, preprocess={}, provenance={"name": "t"})


def drawn(n: int, dtype: torch.dtype, seed: int, *size: int) -> Tensor:
    return torch.randn(n, 3, *(size or (24, 16)), generator=torch.Generator().manual_seed(seed)).to(dtype)


def fitted(model: HookedCLIP, images: Tensor) -> Moments:
    return Moments.fit(model.visual, [images], stream=True)


def under(model: HookedCLIP, edit: Any, images: Tensor) -> Tensor:
    with model.hooks(edit), torch.no_grad():
        return model.encode_image(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_baked_model_is_the_model_under_the_edit(make_tower, kind: str, dtype: torch.dtype) -> None:
    model = around(make_tower(dtype=dtype, **TOWERS[kind]))
    images = drawn(5, dtype, 1)
    before = copy.deepcopy(model.state_dict())
    moments = fitted(model, drawn(16, dtype, 2))
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    for edit in (
        ZeroAblate(EDITED),
        average_over_tokens(MeanAblate(EDITED, moments), model),
        average_over_tokens(MeanAblate(heads[0], moments) | ZeroAblate(heads[0, 1] | mlps[1]), model),
    ):
        expected = under(model, edit, images)
        with torch.no_grad():
            found = bake(model, edit).encode_image(images)
            plain = model.encode_image(images)
        torch.testing.assert_close(found, expected, **close)
        assert (plain - expected).abs().max() > 1e-2  # the edit does something
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("size", [(24, 16), (8, 8)], ids=["seven tokens", "two"])
@pytest.mark.parametrize("components", [heads[-1], mlps[-1], heads[-1, 1] | mlps[-1]])
def test_the_last_block_of_a_class_token_needs_no_even_means(
    make_tower, components: Components, size: tuple[int, int]
) -> None:
    model = around(make_tower(layer_scale=True, image_size=size))
    moments = fitted(model, drawn(16, torch.float32, 2, *size))
    edit, images = MeanAblate(components, moments, rows="pooled"), drawn(5, torch.float32, 1, *size)
    expected = under(model, edit, images)
    for wanted in (edit, MeanAblate(components, moments), average_over_tokens(edit, model)):
        with torch.no_grad():
            torch.testing.assert_close(bake(model, wanted).encode_image(images), expected, rtol=0, atol=1e-5)


def test_even_means_are_the_means_over_tokens(make_tower) -> None:
    model = around(make_tower())
    moments = fitted(model, drawn(16, torch.float32, 2))
    edit = average_over_tokens(MeanAblate(mlps, moments), model)
    streams = edit.steps[0].moments.streams  # pyright: ignore[reportAttributeAccessIssue]
    assert moments.streams is not None
    for token in range(7):
        torch.testing.assert_close(streams.mlp_out[0, token], moments.streams.mlp_out[0].mean(0))
    torch.testing.assert_close(streams.mlp_out[-1], moments.streams.mlp_out[-1])  # one token counts there


def test_means_are_one_up_to_rounding_of_their_own_size(make_tower) -> None:
    model = around(make_tower(dtype=torch.float64))
    edit = average_over_tokens(MeanAblate(mlps[0], fitted(model, drawn(16, torch.float64, 2))), model)
    moments: Any = edit.steps[0].moments  # pyright: ignore[reportAttributeAccessIssue]
    for size, apart in ((1e4, 1e-3), (1e-4, 1e-11)):
        for factor, alike in ((1, True), (100, False)):
            out = torch.zeros_like(moments.streams.mlp_out)
            out[0] = size
            out[0, 3, 5] += factor * apart
            step = MeanAblate(mlps[0], replace(moments, streams=replace(moments.streams, mlp_out=out)))
            if alike:
                bake(model, step)
                continue
            with pytest.raises(ValueError, match="one mean for all tokens"):
                bake(model, step)
    nothing = replace(moments.streams, mlp_out=torch.zeros_like(moments.streams.mlp_out))
    bake(model, MeanAblate(mlps[0], replace(moments, streams=nothing)))  # means of a dead MLP, one and all 0


def test_a_dead_channel_of_layer_scale_can_still_hold_a_mean(make_tower) -> None:
    """What is left of the scale must not divide what is written."""
    model = around(make_tower(layer_scale=True))
    moments = fitted(model, drawn(16, torch.float32, 2))
    assert moments.streams is not None
    out = moments.streams.mlp_out + 0.0
    out[-1, :, 3] = 2.0
    with torch.no_grad():
        model.visual.blocks[-1].ls2[3] = 0  # pyright: ignore[reportIndexIssue, reportArgumentType, reportOptionalSubscript]
    moments = replace(
        fitted(model, drawn(16, torch.float32, 2)), streams=replace(moments.streams, mlp_out=out)
    )
    edit, images = MeanAblate(mlps[-1], moments), drawn(5, torch.float32, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            bake(model, edit).encode_image(images), under(model, edit, images), rtol=0, atol=1e-5
        )


def test_it_leaves_as_an_ordinary_open_clip_model_and_comes_back(tmp_path: Path) -> None:
    clip = small_clip(ls_init_value=0.7)
    clip = clip.double()
    images = drawn(4, torch.float64, 1, SIDE, SIDE)
    moments = fitted(clip, drawn(16, torch.float64, 2, SIDE, SIDE))
    edit = average_over_tokens(MeanAblate(mlps[0] | heads[1, 0], moments), clip)
    clip.provenance |= {"pretrained": "own", "sha256": "0", "files": {}, "files_not_read": []}
    expected, baked = under(clip, edit, images), bake(clip, edit)
    assert baked.provenance.keys() == clip.provenance.keys() - {"sha256", "files", "files_not_read"} | {
        "baked"
    }
    assert baked.provenance["pretrained"] == "own"
    net: Any = baked.to_open_clip()
    with torch.no_grad():
        torch.testing.assert_close(net.encode_image(images), expected, rtol=0, atol=1e-10)
        tokens = clip.tokenize(["red cat", "cup"])
        torch.testing.assert_close(net.encode_text(tokens), clip.encode_text(tokens), rtol=0, atol=1e-12)
        back = load(save_model(baked.float(), tmp_path / "baked"))
        torch.testing.assert_close(back.encode_image(images).double(), expected, rtol=0, atol=1e-5)
    assert (baked.name, baked.provenance["baked"]["base"]) == (f"{clip.name}, repaired", clip.name)


def test_what_cannot_be_folded_is_refused(make_tower) -> None:
    model = around(make_tower())
    clean = drawn(16, torch.float32, 2)
    moments = fitted(model, clean)
    terms_alone = Moments.of(model.decompose(clean))
    repair = DecompRep(similarity="cosine", threshold="quantile", quantile=0.3).fit(model.decompose(clean))
    where = torch.ones(5, 3, 4, dtype=torch.bool)
    for edit, message in (
        (repair, "same for every image.*DecompRep.*use Guard"),
        (ZeroAblate(heads[0]).on(where), "same for every image.*use Guard"),
        (ZeroAblate(mlps[0]) | repair, "same for every image.*use Guard"),
        (MeanAblate(mlps[0], moments), "one mean for all tokens.*layer 0; bake average_over_tokens"),
        (ZeroAblate(embed), "expected heads and MLPs; received .*embed"),
        (ZeroAblate(everything), "expected heads and MLPs; received .*everything"),
        (ZeroAblate(heads[0], rows="pooled"), "an edit of all tokens.*rows='pooled'"),
        (ZeroAblate(heads[-1], rows="patches"), "an edit of all tokens"),
        (MeanAblate(mlps[-1], terms_alone), "with stream means"),
    ):
        with pytest.raises(ValueError, match=message):
            bake(model, edit)
    other = fitted(around(make_tower(seed=5)), clean)
    with pytest.raises(ValueError, match="other weights"):
        bake(model, MeanAblate(mlps[-1], other))
    with pytest.raises(IndexError, match="layer 7"):
        bake(model, ZeroAblate(mlps[7]))
    with pytest.raises(ValueError, match="with stream means; received moments of terms alone"):
        average_over_tokens(MeanAblate(mlps, terms_alone), model)
    with pytest.raises(ValueError, match="use Guard"):
        average_over_tokens(repair, model)
    with (
        model.hooks(ZeroAblate(mlps[0])),
        pytest.raises(ValueError, match="without hooks; received one under some"),
    ):
        bake(model, ZeroAblate(mlps[0]))


def test_its_older_name_is_found() -> None:
    module: Any = import_module("decompclip.defenses.bake")
    with pytest.warns(Warning, match=r"bake\.even is now .*average_over_tokens"):
        assert module.even is average_over_tokens
