"""A converted tower computes what its source computes, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from decompclip.models.clip import HookedCLIP
from decompclip.models.convert import convert_open_clip, oddities, refuse
from decompclip.models.errors import UnsupportedTowerError
from decompclip.models.spec import build_open_clip

VARIANTS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "layer_scale": {"ls_init_value": 0.5},
    "layer_scale quick_gelu": {"ls_init_value": 0.5, "quick_gelu": True},
    "norm before pooling or after": {"final_ln_after_pool": True},
    "one wide head": {"head_width": 32},
    "ragged patches": {"image_size": [27, 19]},
    "another epsilon": {"norm_kwargs": {"eps": 1e-3}},
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@torch.no_grad()
def test_features_are_the_source_s(
    make_source: Callable[..., CLIP], variant: str, dtype: torch.dtype, bound: float
) -> None:
    source = make_source(**VARIANTS[variant]).to(dtype)
    model = HookedCLIP.from_open_clip(source, tokenizer=open_clip.get_tokenizer("ViT-tiny-8"))
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, *model.image_size, generator=generator, dtype=dtype)
    tokens = model.tokenize(["a photo of a star", "", "two lines " * 50])
    assert relative_error(model.encode_image(images), source.encode_image(images)) <= bound
    assert relative_error(model.encode_text(tokens), source.encode_text(tokens)) <= bound
    unit, source_unit = (m.encode_image(images, normalize=True) for m in (model, source))
    assert relative_error(unit, source_unit) <= bound
    assert model.logit_scale == source.logit_scale


@torch.no_grad()
def test_features_of_the_slow_paths_are_the_source_s(source: CLIP, images: torch.Tensor) -> None:
    """LayerNorm and attention step by step, as they run while somebody listens."""
    tower = convert_open_clip(source.visual)
    listened = tower.run_with_hooks(images, fwd_hooks=[(lambda name: True, lambda value, hook: None)])
    assert relative_error(listened, source.encode_image(images)) <= 1e-5


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
@torch.no_grad()
def test_full_size_features_are_the_source_s(name: str) -> None:
    architecture = open_clip.get_model_config(name)
    assert architecture is not None
    architecture["text_cfg"] |= {"layers": 1, "vocab_size": 8}  # the image tower is what is wanted
    source = build_open_clip(architecture).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in source.visual.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    tower = convert_open_clip(source.visual, copy=False)
    images = torch.randn(2, 3, 224, 224, generator=generator)
    assert relative_error(tower(images), source.encode_image(images)) <= 1e-5
    assert tower.cfg.activation == ("quick_gelu" if "quick" in name else "gelu")


@torch.no_grad()
def test_activations_differ_where_they_should(make_source: Callable[..., CLIP], images: torch.Tensor) -> None:
    features = [convert_open_clip(make_source(quick_gelu=quick).visual)(images) for quick in (False, True)]
    assert relative_error(*features) > 1e-4


def test_a_copy_owns_its_weights_and_shares_none(source: CLIP) -> None:
    proj = source.visual.get_parameter("proj")
    before = proj.detach().clone()
    copy, shared = convert_open_clip(source.visual), convert_open_clip(source.visual, copy=False)
    nn.init.zeros_(copy.proj)
    assert torch.equal(proj, before)
    assert shared.proj is proj


def test_conversion_draws_nothing(source: CLIP) -> None:
    state = torch.random.get_rng_state()
    convert_open_clip(source.visual)
    build_open_clip({"embed_dim": 4, "vision_cfg": {"layers": 1, "width": 64}, "text_cfg": {"layers": 1}})
    assert torch.equal(torch.random.get_rng_state(), state)


REFUSED = {
    "pooled over several tokens": {"pool_type": "avg"},
    "no LayerNorm before block 0": {"no_ln_pre": True},
    "pooled by attention": {"attentional_pool": True, "attn_pooler_heads": 4},
    "further norms or scales": {"qk_norm": True},
    "other than exact GELU": {"act_kwargs": {"approximate": "tanh"}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_towers_are_refused_with_the_reason(
    make_source: Callable[..., CLIP], config: dict[str, Any], reason: str
) -> None:
    vision = config["vision_cfg"] | REFUSED[reason]
    with pytest.raises(UnsupportedTowerError, match=reason) as told:  # before anything is built
        refuse("ViT-odd", oddities(vision))
    assert "'ViT-odd' is not supported" in str(told.value)
    assert "Supported: open_clip's native ViT" in str(told.value)
    with pytest.raises(UnsupportedTowerError, match=reason):  # and in memory
        convert_open_clip(make_source(**REFUSED[reason]).visual)


def test_no_tower_at_all_is_refused() -> None:
    with pytest.raises(
        UnsupportedTowerError, match="'Linear' is not supported: it is no image tower of open_clip's"
    ):
        convert_open_clip(nn.Linear(2, 2))


def test_a_pruned_projection_is_refused(source: CLIP) -> None:
    source.visual.register_parameter("proj", None)
    with pytest.raises(UnsupportedTowerError, match="its projection into the joint space was removed"):
        convert_open_clip(source.visual)


def test_every_architecture_of_open_clip_is_taken_or_refused() -> None:
    found = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert config is not None
        found[name] = tuple(oddities(config["vision_cfg"]))
    assert found["ViT-L-14-336"] == found["ViT-bigG-14-quickgelu"] == ()
    assert found["RN50"] == ("resnet",)
    assert found["ViT-B-16-SigLIP"] == found["EVA02-L-14"] == ("timm",)
    assert set(found["ViT-L-14-CLIPA"]) == {"pool", "no_ln_pre"}
    assert found["coca_ViT-B-32"] == ("attentional_pool",)
