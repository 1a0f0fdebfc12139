"""Every image tower of open_clip's: hooked it computes what it did, and its terms sum to its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import open_clip
import pytest
import torch
from torch import Tensor, nn

from decompclip.decomposition.capture import TOLERANCE, decompose
from decompclip.decomposition.maps import Convention
from decompclip.models.errors import UnsupportedTowerError
from decompclip.models.loading import load
from decompclip.models.spec import build_image_only
from decompclip.tower.convert import Source, convert_open_clip
from decompclip.tower.families import WHY_NOT, config_of
from decompclip.tower.layers import blocks
from decompclip.tower.vit import Hook, HookedViT
from tests.models.reduced_towers import DEPTH, features, fill, reduced, reduced_tower, relative_error
from tests.models.tower_families import FAMILY_OF, REFUSED, SUPPORTED

LISTED = sorted(open_clip.list_models())
TOWERS = [name for name in LISTED if name in FAMILY_OF and FAMILY_OF[name].why_not is None]
OTHERS = [name for name in LISTED if name in FAMILY_OF and FAMILY_OF[name].why_not is not None]
FAMILIES = {family.name: family.configurations[0] for family in SUPPORTED}
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4}

# What a reduced tower has less of; all else in a configuration is structure.
SIZES = {
    *("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_embed", "image_size"),
    *("pool_heads", "d_pool", "pool_mlp"),
}


@dataclass(frozen=True)
class Pair:
    """A source tower, and what it was converted into."""

    name: str
    visual: nn.Module
    source: Source
    tower: HookedViT

    def images(self, batch: int = 3) -> Tensor:
        shape = (batch, 3, *self.tower.cfg.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.tower.dtype)


def pair_of(name: str, dtype: torch.dtype) -> Pair:
    visual = reduced_tower(name, dtype=dtype)
    source = Source(visual)
    return Pair(name, visual, source, source.adopt())


EACH = [pytest.param((name, dtype), id=f"{name} {dtype}") for name in TOWERS for dtype in BOUND]


@pytest.fixture(scope="module", params=EACH)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each is built once, for all its tests."""
    return pair_of(*request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def one_of_a_family(request: pytest.FixtureRequest) -> Pair:
    return pair_of(FAMILIES[request.param], torch.float64)


def vision_cfg(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(name)
    assert config is not None
    return config["vision_cfg"]


def on_meta(name: str) -> nn.Module:
    """The tower at its full size, without weights."""
    config = open_clip.get_model_config(name)
    assert config is not None
    with torch.device("meta"):
        return build_image_only(config, why="weights are not wanted").visual


# Which


def test_every_configuration_of_open_clip_is_classified() -> None:
    unknown = [name for name in LISTED if name not in FAMILY_OF]
    assert not unknown, (
        f"this open_clip lists more: look at their towers and add them to tower_families: {unknown}"
    )


def test_116_towers_are_supported_and_28_are_not() -> None:
    counts = [sum(len(family.configurations) for family in part) for part in (SUPPORTED, REFUSED)]
    assert counts == [116, 28]
    assert len(FAMILY_OF) == sum(counts)  # no name twice


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_are_refused_with_the_reason(name: str) -> None:
    why = WHY_NOT[FAMILY_OF[name].why_not or ""]
    with pytest.raises(UnsupportedTowerError) as told:
        load(name, pretrained="random")
    assert f"the image tower {name!r} is not supported: {why}. Supported: " in str(told.value)


def _one_of_each(names: list[str]) -> list[str]:
    """The first of those that differ in name alone."""
    return list({str(sorted(vision_cfg(name).items(), key=str)): name for name in reversed(names)}.values())[
        ::-1
    ]


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_other_towers_in_memory_are_refused_too(family: Any) -> None:
    with pytest.raises(UnsupportedTowerError) as told:
        convert_open_clip(on_meta(family.configurations[0]))
    assert WHY_NOT[family.why_not] in str(told.value)


@pytest.mark.parametrize("name", _one_of_each(TOWERS))
def test_the_matrix_s_towers_have_the_structure_of_the_full_ones(name: str) -> None:
    full, small = (config_of(visual).to_dict() for visual in (on_meta(name), reduced_tower(name)))
    assert {key: full[key] for key in full.keys() - SIZES} == {
        key: small[key] for key in small.keys() - SIZES
    }
    for width in ("d_mlp", "pool_mlp"):
        ratios = [config[width] / config["d_model"] for config in (full, small)]
        assert ratios[0] == pytest.approx(ratios[1], abs=0.01)
    assert small["n_layers"] == DEPTH


# The matrix


@torch.no_grad()
def test_features_are_the_source_s(pair: Pair) -> None:
    images = pair.images()
    assert relative_error(pair.tower(images), features(pair.visual, images)) <= BOUND[pair.tower.dtype]


@pytest.mark.parametrize("convention", get_args(Convention))
def test_terms_sum_to_the_feature(pair: Pair, convention: Convention) -> None:
    d = decompose(pair.tower, pair.images(), convention=convention)
    terms = d.heads.sum((1, 2)) + d.mlps.sum(1) + d.embed + d.bias + d.pool.sum(1)
    expected = features(pair.visual, pair.images())
    assert relative_error(terms, expected) <= BOUND[pair.tower.dtype]
    assert d.sum_error <= BOUND[pair.tower.dtype]
    assert d.pool.shape[1] == (pair.tower.cfg.pool_mlp > 0)


def test_source_tokens_sum_to_the_heads(pair: Pair) -> None:
    d = decompose(pair.tower, pair.images(), tokens=True)
    for layer, head in ((0, 0), (DEPTH - 1, pair.tower.cfg.n_heads - 1)):
        found = d.tokens(layer, head)
        assert found.shape[1] == pair.tower.cfg.n_tokens
        assert relative_error(found.sum(1), d.heads[:, layer, head]) <= BOUND[pair.tower.dtype]


def test_the_way_back_keeps_every_bit(pair: Pair) -> None:
    expected, found = pair.visual.state_dict(), pair.source.filled(pair.tower).state_dict()
    assert list(found) == list(expected)
    differ = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differ


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_load_accepts_every_tower(name: str) -> None:
    with reduced(name):
        model = load(name, pretrained="random", text=False)
    images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    found = model.encode_image(images)
    assert found.shape == (2, model.cfg.d_embed)
    assert found.isfinite().all()


# In half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES.values())
def test_half_towers_have_terms_in_fp32(name: str, dtype: torch.dtype) -> None:
    pair = pair_of(name, torch.float32)
    half = pair.tower.to(dtype)
    for convention in get_args(Convention):
        d = decompose(half, pair.images().to(dtype), convention=convention, tokens=True)
        assert {x.dtype for x in (d.coords, d.mlps, d.embed, d.bias, d.pool, d.heads)} == {torch.float32}
        assert d.sum_error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES.values())
def test_autocast_leaves_terms_and_maps_in_fp32(name: str, dtype: torch.dtype) -> None:
    pair = pair_of(name, torch.float32)
    for convention in get_args(Convention):
        with torch.autocast("cpu", dtype=dtype):
            d = decompose(pair.tower, pair.images(), convention=convention, tokens=True)
        assert {x.dtype for x in (d.coords, d.mlps, d.embed, d.bias, d.pool, d.heads)} == {torch.float32}
        assert 1e-5 < d.sum_error < TOLERANCE[dtype]
        again = decompose(pair.tower, pair.images(), convention=convention)
        assert again.sum_error <= 1e-5  # what autocast left behind is as good as new


# Hooks


@torch.no_grad()
def test_every_hook_point_is_live(one_of_a_family: Pair) -> None:
    """Looking changes nothing; an edit changes the output, and by as much while others look."""
    tower, images = one_of_a_family.tower, one_of_a_family.images()
    visits: dict[str, int] = dict.fromkeys(tower.hook_dict, 0)

    def count(value: Tensor, hook: Any) -> None:
        visits[hook.name] += 1
        assert len(value) == len(images)

    def look(value: Tensor, hook: Any) -> None:
        pass

    def nudge(value: Tensor, hook: Any) -> Tensor:
        # noise, since LayerNorm and softmax are blind to a constant
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        return 1.1 * value + 0.1 * noise.to(value.dtype)

    everywhere = lambda name: True  # noqa: E731
    plain = tower(images)
    counted = tower.run_with_hooks(images, fwd_hooks=[(everywhere, count)])
    assert {name: times for name, times in visits.items() if times != 1} == {}
    assert relative_error(counted, plain) <= 1e-10
    dead, drowned = [], []
    for name in tower.hook_dict:
        alone = tower.run_with_hooks(images, fwd_hooks=[(name, nudge)])
        watched = tower.run_with_hooks(images, fwd_hooks=[(name, nudge), (everywhere, look)])
        dead += [name] if relative_error(alone, plain) < 1e-5 else []
        drowned += [name] if relative_error(watched, alone) > 1e-10 else []
    assert dead == []
    assert drowned == []


@torch.no_grad()
def test_the_heads_results_sum_to_attention_s_output(one_of_a_family: Pair) -> None:
    tower, images = one_of_a_family.tower, one_of_a_family.images()
    results, outputs = [], []
    handles = [
        block.attn.register_forward_hook(lambda module, args, out: outputs.append(out))
        for block in blocks(tower)
    ]
    try:
        tower(images, pooled_rows=False)
    finally:
        for handle in handles:
            handle.remove()
    keep: list[Hook] = [
        (f"blocks.{layer}.attn.hook_result", lambda x, hook: results.append(x)) for layer in range(DEPTH)
    ]
    tower.run_with_hooks(images, fwd_hooks=keep)
    for block, result, output in zip(blocks(tower), results, outputs, strict=True):
        assert relative_error(result.sum(2) + block.attn.b_written, output) <= 1e-10


# At full size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "EVA02-B-16"])
def test_full_size_towers(name: str) -> None:
    config = open_clip.get_model_config(name)
    assert config is not None
    visual = build_image_only(config, why="an image tower alone").visual
    fill(visual, torch.Generator().manual_seed(0))
    visual.eval()
    tower = convert_open_clip(visual)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(tower(images), features(visual, images)) <= 1e-5
    for convention in get_args(Convention):
        assert decompose(tower, images, convention=convention).sum_error <= 1e-5
    assert tower.cfg.n_layers == 12
    assert tower.cfg.activation == {"ViT-B-32-quickgelu": "quick_gelu", "EVA02-B-16": "silu"}.get(
        name, "gelu"
    )
