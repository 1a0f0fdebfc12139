"""HookedViT's hook points: each is live, costs nothing unheard, and comes off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from decompclip.models.config import ViTConfig
from decompclip.models.vit import HookedViT

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
def test_the_last_block_computes_one_row_unless_heard(tower: HookedViT, images: torch.Tensor) -> None:
    rows = []
    last = tower.cfg.n_layers - 1
    handle = tower.blocks[last].register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    try:
        short = tower(images)
        long = tower.run_with_hooks(
            images, fwd_hooks=[(f"blocks.{last}.hook_resid_post", lambda value, hook: None)]
        )
    finally:
        handle.remove()
    assert rows == [1, tower.cfg.n_tokens]
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)


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
        ({"activation": "relu"}, "activation 'relu' is not one of"),
        ({"pool": "map"}, "pool 'map' is not one of"),
        ({"n_heads": 3}, "3 heads of width 8 do not fill a stream of 32"),
        ({"image_size": (4, 16)}, "does not fit an image"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**CONFIG.to_dict() | changes)
