"""HookedViT's hook points: each is live, costs nothing unheard, and comes off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from decompclip.tower.config import Stem, ViTConfig
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT

CONFIG = ViTConfig(
    n_layers=2,
    d_model=32,
    n_heads=4,
    d_head=8,
    d_mlp=48,
    d_embed=20,
    image_size=(24, 16),
    patch_size=(8, 8),
    layer_scale=True,
)
with torch.device("meta"):
    HOOK_POINTS = list(HookedViT(CONFIG).hook_dict)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the calls of the fused and of the plain way through attention and LayerNorm."""
    counts: dict[str, int] = {}
    for owner, name in (
        (F, "scaled_dot_product_attention"),
        (F, "layer_norm"),
        (torch.Tensor, "softmax"),
        (torch, "einsum"),
    ):
        counts[name] = 0
        original = getattr(owner, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    return counts


def test_every_step_has_its_hook_point() -> None:
    attention = ("q", "k", "v", "attn_scores", "pattern", "z", "result")
    norms = ("hook_scale", "hook_normalized")
    block = {
        *(f"hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")),
        *(f"attn.hook_{name}" for name in attention),
        *(f"{norm}.{name}" for norm in ("ln1", "ln2") for name in norms),
        *("mlp.hook_pre", "mlp.hook_post"),
    }
    outside = {
        "hook_embed",
        "hook_pos_embed",
        "hook_ln_pre",
        *(f"{n}.{h}" for n in ("ln_pre", "ln_final") for h in norms),
    }
    assert set(HOOK_POINTS) == outside | {f"blocks.{layer}.{name}" for layer in (0, 1) for name in block}


VARIANTS: list[tuple[dict[str, Any], set[str], set[str]]] = [
    ({"ln_pre": False}, set(), {"ln_pre.hook_scale", "ln_pre.hook_normalized"}),
    ({"pos": False}, set(), {"hook_pos_embed"}),
    ({"gated": True}, {"blocks.1.mlp.hook_pre_linear"}, set()),
    ({"mlp_norm": True}, {"blocks.1.mlp.ln.hook_scale"}, set()),
    ({"mlp_norm_in": True}, {"blocks.1.mlp.ln_in.hook_scale"}, set()),
    ({"attn_norm": True}, {"blocks.1.attn.ln.hook_scale", "blocks.1.attn.ln.hook_normalized"}, set()),
    ({"rope": "half"}, {"blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"}, set()),
    ({"pool": "attention", "pool_heads": 4}, {"pool.hook_z", "pool.hook_pattern"}, {"pool.hook_mlp_out"}),
    (
        {"pool": "attention", "pool_heads": 4, "pool_mlp": 8},
        {"pool.hook_mlp_out", "pool.mlp.hook_pre"},
        set(),
    ),
    ({"pool": "attention", "pool_heads": 4, "pool_norm": True}, {"pool.ln_post.hook_scale"}, set()),
]


def in_order(value: Any) -> str:
    """One name whatever the order of a set, which differs from process to process."""
    return str(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize(("changes", "more", "less"), VARIANTS, ids=in_order)
def test_a_variant_has_the_hook_points_of_its_steps_alone(
    changes: dict[str, Any], more: set[str], less: set[str]
) -> None:
    with torch.device("meta"):
        found = set(HookedViT(replace(CONFIG, **changes)).hook_dict)
    assert more <= found - set(HOOK_POINTS)
    assert less.isdisjoint(found)
    assert set(HOOK_POINTS) - found == less & set(HOOK_POINTS)


@pytest.mark.parametrize("name", HOOK_POINTS)
@torch.no_grad()
def test_every_hook_point_is_live(tower: HookedViT, images: torch.Tensor, name: str) -> None:
    plain = tower(images)
    shapes = []

    def look(value: torch.Tensor, hook: Any) -> None:
        shapes.append(tuple(value.shape))

    def nudge(value: torch.Tensor, hook: Any) -> torch.Tensor:
        # noise, since LayerNorm and softmax are blind to a constant
        return value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))

    looked = tower.run_with_hooks(images, fwd_hooks=[(name, look)])
    nudged = tower.run_with_hooks(images, fwd_hooks=[(name, nudge)])
    assert len(shapes) == 1
    assert shapes[0][0] == len(images)
    torch.testing.assert_close(looked, plain, rtol=1e-5, atol=1e-5)
    assert (nudged - plain).abs().max() > 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", HOOK_POINTS)
def test_every_hook_point_sees_gradients(tower: HookedViT, images: torch.Tensor, name: str) -> None:
    seen = []
    with tower.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append(grad.abs().max().item()))]):
        tower(images).square().sum().backward()
    tower.zero_grad()
    assert seen
    assert seen[0] > 0


@torch.no_grad()
def test_unheard_steps_are_never_computed(
    tower: HookedViT, images: torch.Tensor, spied: dict[str, int]
) -> None:
    tower(images)
    layers = tower.cfg.n_layers
    assert spied == {
        "scaled_dot_product_attention": layers,
        "layer_norm": 2 * layers + 2,
        "softmax": 0,
        "einsum": 0,
    }


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("blocks.1.attn.hook_pattern", {"scaled_dot_product_attention": -1, "softmax": 1}),
        ("blocks.1.attn.hook_attn_scores", {"scaled_dot_product_attention": -1, "softmax": 1}),
        ("blocks.1.attn.hook_result", {"einsum": 1}),
        ("blocks.1.ln1.hook_scale", {"layer_norm": -1}),
        ("blocks.1.hook_resid_post", {}),
    ],
)
@torch.no_grad()
def test_a_listener_costs_its_own_step_alone(
    tower: HookedViT, images: torch.Tensor, spied: dict[str, int], name: str, changed: dict[str, int]
) -> None:
    tower(images)
    plain = dict(spied)
    tower.run_with_hooks(images, fwd_hooks=[(name, lambda value, hook: None)])
    cost = {step: count - 2 * plain[step] for step, count in spied.items()}
    assert {step: count for step, count in cost.items() if count} == changed


@torch.no_grad()
def test_the_last_block_computes_one_row_unless_heard(
    tower: HookedViT, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    last = blocks(tower)[-1]
    forward = last.forward

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = forward(*args, **kwargs)
        rows.append(out.shape[1])
        return out

    monkeypatch.setattr(last, "forward", spy)
    short = tower(images)
    name = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
    long = [tower.run_with_hooks(images, fwd_hooks=[(name, lambda value, hook: None)])]
    handle = last.mlp.register_forward_hook(lambda module, args, out: None)  # PyTorch's own listens too
    try:
        long.append(tower(images))
    finally:
        handle.remove()
    assert rows == [1, tower.cfg.n_tokens, tower.cfg.n_tokens]
    for found in long:
        torch.testing.assert_close(short, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ln_final", ["rows", "pooled"])
@torch.no_grad()
def test_the_mean_reads_every_patch_and_no_prefix_token(
    make_tower: Callable[..., HookedViT], images: torch.Tensor, ln_final: str
) -> None:
    tower = make_tower(pool="mean", ln_final=ln_final, n_prefix=2)
    last = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
    plain = tower(images, pooled_rows=True)  # only a class token's tower can take it at its word

    def nudged(token: int) -> float:
        def nudge(value: torch.Tensor, hook: Any) -> torch.Tensor:
            assert value.shape[1] == tower.cfg.n_tokens
            value = value.clone()
            value[:, token] += torch.randn(value[:, token].shape, generator=torch.Generator().manual_seed(0))
            return value

        return (tower.run_with_hooks(images, fwd_hooks=[(last, nudge)]) - plain).abs().max().item()

    changes = [nudged(token) for token in range(tower.cfg.n_tokens)]
    assert max(changes[:2]) < 1e-5
    assert min(changes[2:]) > 1e-3


@torch.no_grad()
def test_an_attention_pool_reads_one_query(
    make_tower: Callable[..., HookedViT], images: torch.Tensor
) -> None:
    tower = make_tower(pool="attention", pool_heads=4, pool_queries=3, n_prefix=0)
    plain = tower(images)
    query = tower.get_parameter("pool.query")
    query[1:] += 1
    assert torch.equal(tower(images), plain)
    query[:1] += 1
    assert not torch.allclose(tower(images), plain)


@torch.no_grad()
def test_prefix_tokens_keep_their_place_among_rotary_positions(
    make_tower: Callable[..., HookedViT], images: torch.Tensor
) -> None:
    tower = make_tower(rope="interleaved", n_prefix=3)
    angles = torch.rand(
        1, tower.cfg.n_patches, tower.cfg.d_head // 2, generator=torch.Generator().manual_seed(0)
    )
    angles = angles.repeat_interleave(2, dim=-1)
    assert isinstance(tower.rope, torch.Tensor)
    tower.rope.copy_(torch.cat([angles.sin(), angles.cos()]))
    seen: dict[str, torch.Tensor] = {}
    names = [f"blocks.0.attn.hook_{name}" for name in ("k", "rot_k")]
    tower.run_with_hooks(images, fwd_hooks=[(n, lambda x, hook: seen.update({hook.name: x})) for n in names])
    plain, turned = (seen[name] for name in names)
    torch.testing.assert_close(turned[:, :3], plain[:, :3])
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1))  # a rotation
    pairs = torch.view_as_complex(plain[:, 3:].unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(()), angles[0, :, None, ::2])).flatten(-2)
    torch.testing.assert_close(turned[:, 3:], expected)


def test_hooks_come_off_after_an_exception(tower: HookedViT, images: torch.Tensor) -> None:
    def fail(value: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("a hook that fails")

    with pytest.raises(RuntimeError, match="a hook that fails"):
        tower.run_with_hooks(images, fwd_hooks=[("blocks.0.attn.hook_z", fail)])
    assert not any(point.has_hooks() for point in tower.hook_dict.values())


@torch.no_grad()
def test_a_permuted_batch_gives_permuted_features(tower: HookedViT, images: torch.Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(tower(images[order]), tower(images)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 24, 16), (1, 3, 16, 24), (1, 1, 24, 16)])
def test_images_of_another_shape_are_refused(tower: HookedViT, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images \[batch, 3, 24, 16\], got .* `preprocess` first"):
        tower(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "expected activation of .*; received 'relu'"),
        ({"pool": "map"}, "expected pool of .*; received 'map'"),
        ({"n_heads": 3}, "3 heads of width 8 do not fill a stream of 32"),
        ({"image_size": (4, 16)}, "does not fit an image"),
        ({"norm": "sandwich"}, "expected norm of .*; received 'sandwich'"),
        ({"stem": "fourier"}, "expected stem of .*; received 'fourier'"),
        ({"n_prefix": 0}, "pool 'cls' reads the class token, but n_prefix says that there is none"),
        ({"pool": "attention"}, "0 heads do not divide an attention pool of 32"),
        ({"pool": "attention", "pool_heads": 3}, "3 heads do not divide an attention pool of 32"),
        ({"projection": False}, "without a projection, d_embed is 32, not 20"),
        ({"attn_norm": True, "norm": "post"}, "are not known together"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**CONFIG.to_dict() | changes)


@torch.no_grad()
def test_a_patch_may_be_oblong_or_the_whole_image_and_a_pool_of_one_head(
    make_tower: Callable[..., HookedViT], images: torch.Tensor
) -> None:
    for patch, grid in (((8, 16), (3, 1)), ((24, 16), (1, 1)), ((6, 4), (4, 4))):
        tower = make_tower(patch_size=patch, pool="attention", pool_heads=1)
        assert (tower.cfg.grid, tower.cfg.n_tokens) == (grid, 1 + grid[0] * grid[1])
        assert tower(images).shape == (5, 20)


def test_a_new_tower_is_drawn_at_the_scale_of_its_stream() -> None:
    config = replace(CONFIG, pool="attention", pool_heads=4, pool_queries=16, n_prefix=8)
    with torch.random.fork_rng(devices=[]):
        tower = HookedViT(config)
    for name in ("W_E", "prefix", "W_pos", "proj", "pool.query"):
        assert tower.get_parameter(name).std().item() == pytest.approx(32**-0.5, rel=0.25), name


@pytest.mark.parametrize(
    ("stem", "message"), [("conv", "expected a stem module"), ("patch", "expected no stem")]
)
def test_a_stem_that_does_not_fit_the_config_is_refused(stem: Stem, message: str) -> None:
    given = None if stem == "conv" else torch.nn.Identity()
    with pytest.raises(ValueError, match=message):
        HookedViT(replace(CONFIG, stem=stem), given)
