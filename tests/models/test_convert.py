"""A converted tower computes what its source computes, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from open_clip.timm_model import TimmModel
from torch import nn

from decompclip.decomposition.capture import decompose
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import UnsupportedTowerError
from decompclip.models.spec import build_open_clip
from decompclip.tower.convert import Source, convert_open_clip
from decompclip.tower.families import oddities, refuse
from tests.models.reduced_towers import DEPTH, HEADS, WIDTH, features, fill, reduced_tower, relative_error
from tests.models.tower_families import FAMILY_OF, SUPPORTED

VARIANTS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "gelu by tanh": {"act_kwargs": {"approximate": "tanh"}},
    "layer_scale": {"ls_init_value": 0.5},
    "layer_scale quick_gelu": {"ls_init_value": 0.5, "quick_gelu": True},
    "no norm before block 0": {"no_ln_pre": True},
    "mean of rows": {"pool_type": "avg"},
    "norm after the mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "norm before pooling or after": {"final_ln_after_pool": True},
    "attention pool": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3},
    "frozen positions": {"pos_embed_type": "sin_cos_2d", "image_size": [24, 24]},
    "one wide head": {"head_width": 32},
    "one block": {"layers": 1},
    "ragged patches": {"image_size": [27, 19]},
    "another epsilon": {"norm_kwargs": {"eps": 1e-3}},
}


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
    assert model.decompose(images).sum_error <= bound


@torch.no_grad()
def test_features_of_the_slow_paths_are_the_source_s(source: CLIP, images: torch.Tensor) -> None:
    """LayerNorm and attention step by step, as they run while somebody listens."""
    tower = convert_open_clip(source.visual)
    listened = tower.run_with_hooks(images, fwd_hooks=[(lambda name: True, lambda value, hook: None)])
    assert relative_error(listened, source.encode_image(images)) <= 1e-5


@torch.no_grad()
def test_activations_differ_where_they_should(make_source: Callable[..., CLIP], images: torch.Tensor) -> None:
    kinds: list[dict[str, Any]] = [{}, {"quick_gelu": True}, {"act_kwargs": {"approximate": "tanh"}}]
    gelu, quick, tanh = (convert_open_clip(make_source(**kind).visual)(images) for kind in kinds)
    assert relative_error(quick, gelu) > 1e-4
    assert 1e-6 < relative_error(tanh, gelu) < relative_error(quick, gelu)


@torch.no_grad()
def test_a_pruned_projection_leaves_the_stream_s_width(source: CLIP, images: torch.Tensor) -> None:
    source.visual.register_parameter("proj", None)
    tower = convert_open_clip(source.visual)
    assert tower.proj is None
    assert tower.cfg.d_embed == tower.cfg.d_model
    assert relative_error(tower(images), source.visual(images)) <= 1e-5


# timm's towers that no configuration of open_clip's has, but that are built of the same parts
KIN = {
    "registers": ("vit_base_patch14_reg4_dinov2", {"pool": "token"}, 5),
    "registers, mean of patches": ("vit_medium_patch16_reg1_gap_256", {"pool": "avg"}, 1),
    "registers, rotary positions": ("vit_medium_patch16_rope_reg1_gap_256", {"pool": "avg"}, 1),
    "norm of the mean": ("vit_base_patch16_224", {"pool": "avg"}, 1),
    "norm of the mean of all tokens": (
        "vit_base_patch16_224",
        {"pool": "avg", "pool_include_prefix": True, "class_token": False},
        0,
    ),
    "one block": ("vit_base_patch16_224", {"pool": "token", "depth": 1}, 1),
    "norm before block 0": ("vit_base_patch16_clip_224", {"pool": "token"}, 1),
    "projection with a bias": (
        "vit_base_patch16_224",
        {"pool": "token", "proj": "linear", "proj_bias": True},
        1,
    ),
    "an MLP's pool beside a class token": (
        "vit_base_patch16_siglip_224",
        {"pool": "map", "class_token": True},
        1,
    ),
}


def of_timm(monkeypatch: pytest.MonkeyPatch, name: str, pool: str, **options: Any) -> nn.Module:
    """A small tower of open_clip's around a trunk of timm's, in fp64; `proj` options are open_clip's."""
    shape = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "img_size": (48, 32), "patch_size": 16}
    proj: dict[str, Any] = {"proj": None} | {
        key: options.pop(key) for key in ("proj", "proj_bias") if key in options
    }
    create = timm.create_model
    with monkeypatch.context() as patched:
        patched.setattr(
            timm, "create_model", lambda name, **given: create(name, **given, **(shape | options))
        )
        visual = TimmModel(name, embed_dim=20, pool=pool, **proj)
    fill(visual, torch.Generator().manual_seed(0))
    return visual.double().eval()


@pytest.mark.parametrize("kind", KIN)
@torch.no_grad()
def test_kin_of_open_clip_s_towers_are_taken(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    name, options, n_prefix = KIN[kind]
    visual = of_timm(monkeypatch, name, **options)
    for block in visual.get_submodule("trunk.blocks").children():
        vars(block.attn).pop("rotate_half", None)  # older releases of timm have no such attribute
    source = Source(visual)
    tower = source.adopt()
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert tower.cfg.n_prefix == n_prefix
    assert relative_error(tower(images), visual(images)) <= 1e-12
    assert torch.equal(source.filled(tower)(images), visual(images))
    assert decompose(tower, images).sum_error <= 1e-12


# The weights


def places(tower: nn.Module) -> set[int]:
    return {x.data_ptr() for x in tower.state_dict().values()}


def test_a_copy_owns_its_weights_and_shares_none(source: CLIP) -> None:
    proj = source.visual.get_parameter("proj")
    before = proj.detach().clone()
    copy, shared = convert_open_clip(source.visual), convert_open_clip(source.visual, copy=False)
    nn.init.zeros_(copy.get_parameter("proj"))
    assert torch.equal(proj, before)
    assert shared.proj is proj
    visual = source.visual.to(memory_format=torch.channels_last)
    shared, proj = convert_open_clip(visual, copy=False), visual.get_parameter("conv1.weight")
    assert shared.get_parameter("W_E").data_ptr() == proj.data_ptr()


@pytest.mark.parametrize("name", [family.configurations[0] for family in SUPPORTED])
def test_a_copy_shares_no_memory(name: str) -> None:
    """Nor that of buffers, such as the averages of a stem's BatchNorm; nor does the way back."""
    visual = reduced_tower(name)
    source = Source(visual)
    tower = source.adopt()
    assert not places(tower) & places(visual)
    assert not places(source.filled(tower)) & places(tower)
    assert places(convert_open_clip(visual, copy=False)) & places(visual)


@pytest.mark.parametrize("copy", [True, False])
def test_a_frozen_weight_stays_frozen(source: CLIP, copy: bool) -> None:
    source.visual.get_parameter("conv1.weight").requires_grad_(False)
    tower = convert_open_clip(source.visual, copy=copy)
    assert not tower.get_parameter("W_E").requires_grad
    assert not source.visual.get_parameter("conv1.weight").requires_grad
    assert tower.get_parameter("W_pos").requires_grad


@pytest.mark.parametrize("name", [family.configurations[0] for family in SUPPORTED])
@torch.no_grad()
def test_an_edited_tower_goes_back_into_its_architecture(name: str) -> None:
    visual = reduced_tower(name)
    source = Source(visual)
    tower = source.adopt()
    images = torch.randn(2, 3, *tower.cfg.image_size, generator=torch.Generator().manual_seed(1)).double()
    before = tower(images)
    for parameter in tower.parameters():
        parameter.mul_(1.1)
    after = source.filled(tower)
    assert relative_error(features(after, images), tower(images)) <= 1e-12
    assert relative_error(tower(images), before) > 1e-2
    assert relative_error(features(visual, images), before) <= 1e-12  # the source is left as it was


def test_an_edit_that_the_source_cannot_hold_is_refused() -> None:
    source = Source(reduced_tower("EVA01-g-14"))  # whose keys have no bias
    tower = source.adopt()
    with torch.no_grad():
        tower.get_parameter("blocks.1.attn.b_QKV")[WIDTH] = 0.5
    with pytest.raises(
        ValueError, match=r"expected zeros in blocks\.1\.attn\.b_QKV where the source tower has no"
    ):
        source.filled(tower)


@pytest.mark.parametrize("name", [family.configurations[0] for family in SUPPORTED])
def test_conversion_draws_nothing(name: str) -> None:
    visual = reduced_tower(name)
    state = torch.random.get_rng_state()
    convert_open_clip(visual)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_building_draws_nothing_that_stays() -> None:
    state = torch.random.get_rng_state()
    build_open_clip({"embed_dim": 4, "vision_cfg": {"layers": 1, "width": 64}, "text_cfg": {"layers": 1}})
    assert torch.equal(torch.random.get_rng_state(), state)


# Refused

ODD = {
    "norms, gates or scales": [
        {"qk_norm": True},
        {"scale_heads": True},
        {"scale_attn": True},
        {"scale_fc": True},
    ],
    "pooled in a way": [{"pool_type": "none"}],
}


@pytest.mark.parametrize(
    ("reason", "vision"), [(reason, vision) for reason, found in ODD.items() for vision in found], ids=str
)
def test_odd_towers_are_refused_with_the_reason(
    make_source: Callable[..., CLIP], reason: str, vision: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedTowerError, match=reason) as told:
        convert_open_clip(make_source(**vision).visual)
    assert str(told.value).startswith("the image tower 'VisionTransformer' is not supported: ")
    assert "Supported: every transformer tower of open_clip's" in str(told.value)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_base_patch16_224", {"pool": "token", "qk_norm": True}, "norms, gates or scales"),
        ("vit_base_patch16_224", {"pool": "token", "scale_attn_norm": True}, "norms, gates or scales"),
        ("vit_base_patch16_224", {"pool": "token", "scale_mlp_norm": True}, "norms, gates or scales"),
        ("vit_base_patch16_224", {"pool": "avg", "final_norm": False}, "pooled in a way"),
        ("vit_base_patch16_224", {"pool": "max"}, "pooled in a way"),
        ("vit_base_patch16_224", {"pool": "avg", "pool_include_prefix": True}, "pooled in a way"),
        (
            "vit_base_patch16_siglip_224",
            {"pool": "map", "class_token": True, "act_layer": "relu"},
            "not known",
        ),
        ("eva02_base_patch16_clip_224", {"pool": "max"}, "pooled in a way"),
        ("vit_small_patch16_18x2_224", {"pool": "token"}, "norms, gates or scales"),
        ("beit_base_patch16_224", {"pool": "avg"}, "norms, gates or scales"),
    ],
)
def test_odd_towers_of_timm_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedTowerError, match=reason):
        convert_open_clip(of_timm(monkeypatch, name, **options))


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_block_of_which_one_part_is_another_is_refused(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    tower = of_timm(monkeypatch, "vit_base_patch16_224", pool="token")
    module: Any = tower.get_submodule(f"trunk.blocks.{DEPTH - 1}.{part}")
    module.__class__ = type("Other", (type(module),), {})
    with pytest.raises(UnsupportedTowerError, match="norms, gates or scales"):
        convert_open_clip(tower)


@pytest.mark.parametrize(
    ("part", "odd"),
    [
        ("pos_embed", nn.Parameter(torch.zeros(1))),
        ("latent_len", 2),
        ("q_norm", nn.LayerNorm(8)),
        ("mlp", None),
        ("pool", "avg"),
    ],
)
def test_an_attention_pool_of_which_one_part_is_odd_is_refused(
    monkeypatch: pytest.MonkeyPatch, part: str, odd: object
) -> None:
    tower = of_timm(monkeypatch, "vit_base_patch16_siglip_224", pool="map")
    setattr(tower.get_submodule("trunk.attn_pool"), part, odd)
    with pytest.raises(UnsupportedTowerError, match="pooled in a way"):
        convert_open_clip(tower)


def test_weights_of_unknown_use_are_refused(source: CLIP) -> None:
    source.visual.register_parameter("temperature", nn.Parameter(torch.ones(())))
    with pytest.raises(UnsupportedTowerError, match="has weights of unknown use: temperature"):
        convert_open_clip(source.visual)


def test_norms_of_several_epsilons_are_refused(source: CLIP) -> None:
    norm: Any = source.visual.get_submodule("ln_post")
    norm.eps = 1e-3
    with pytest.raises(UnsupportedTowerError, match="its norms are no LayerNorms of one epsilon"):
        convert_open_clip(source.visual)


@torch.no_grad()
def test_norms_of_a_stem_keep_their_own_epsilon() -> None:
    visual = reduced_tower("ViTamin-S")
    stem = visual.get_submodule("trunk.patch_embed")
    norms = [module for module in stem.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        norm.eps = 0.5
    tower = convert_open_clip(visual)
    images = torch.randn(2, 3, *tower.cfg.image_size, dtype=torch.float64)
    assert norms and relative_error(tower(images), visual(images)) <= 1e-12


def test_no_tower_at_all_is_refused() -> None:
    with pytest.raises(
        UnsupportedTowerError, match="'Linear' is not supported: it is no image tower of open_clip's"
    ):
        convert_open_clip(nn.Linear(2, 2))


def test_a_configuration_is_taken_or_refused_before_anything_is_built() -> None:
    for name in open_clip.list_models():
        if name not in FAMILY_OF:  # the tests' own
            continue
        config = open_clip.get_model_config(name)
        assert config is not None
        why_not = FAMILY_OF[name].why_not
        assert oddities(config["vision_cfg"]) == ([why_not] if why_not else []), name
    refuse("ViT-B-32", [])
    with pytest.raises(UnsupportedTowerError, match="'RN50' is not supported: it is a ResNet"):
        refuse("RN50", ["resnet"])


@pytest.mark.parametrize("copy", [True, False])
@torch.no_grad()
def test_a_half_model_has_one_type_and_goes_back_into_its_two(
    source: CLIP, images: torch.Tensor, copy: bool
) -> None:
    """open_clip keeps norms and embeddings in fp32."""
    convert_weights_to_lp(source, torch.bfloat16)
    visual = source.visual
    before = Source(visual, copy=copy)
    tower = before.adopt()
    assert {x.dtype for x in tower.state_dict().values()} == {torch.bfloat16}
    assert relative_error(tower(images.bfloat16()), visual(images.bfloat16())) < 0.05
    assert bool(places(tower) & places(visual)) != copy

    def types(module: nn.Module) -> dict[str, torch.dtype]:
        return {name: x.dtype for name, x in module.state_dict().items()}

    back = before.filled(tower)
    assert types(back) == types(visual) and len(set(types(back).values())) == 2
    assert relative_error(back(images.bfloat16()), visual(images.bfloat16())) < 0.05
    assert set(types(before.filled(tower.double())).values()) == {torch.float64}
