"""open_clip's native image tower -> HookedViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.transformer import LayerNorm as OpenClipLayerNorm
from open_clip.transformer import LayerNormFp32, LayerScale, QuickGELU, VisionTransformer
from torch import Tensor, nn

from decompclip.models.config import Activation, ViTConfig
from decompclip.models.errors import UnsupportedTowerError
from decompclip.models.vit import HookedViT

_SUPPORTED = "supported is open_clip's VisionTransformer with ln_pre, class-token pooling and a projection"

_TOP = {
    "conv1.weight": "W_E",
    "class_embedding": "cls",
    "positional_embedding": "W_pos",
    "ln_pre.weight": "ln_pre.w",
    "ln_pre.bias": "ln_pre.b",
    "ln_post.weight": "ln_final.w",
    "ln_post.bias": "ln_final.b",
    "proj": "proj",
}
_BLOCK = {
    "ln_1.weight": "ln1.w",
    "ln_1.bias": "ln1.b",
    "attn.in_proj_weight": "attn.W_QKV",
    "attn.in_proj_bias": "attn.b_QKV",
    "attn.out_proj.weight": "attn.W_out",
    "attn.out_proj.bias": "attn.b_O",
    "ls_1.gamma": "ls1",
    "ln_2.weight": "ln2.w",
    "ln_2.bias": "ln2.b",
    "mlp.c_fc.weight": "mlp.W_in",
    "mlp.c_fc.bias": "mlp.b_in",
    "mlp.c_proj.weight": "mlp.W_out",
    "mlp.c_proj.bias": "mlp.b_out",
    "ls_2.gamma": "ls2",
}


def convert_open_clip(tower: nn.Module) -> HookedViT:
    """A `HookedViT` with the weights, dtype and device of an open_clip tower; the weights are copied.

    Raises:
        UnsupportedTowerError: the tower is of another family, pools otherwise, or holds what no term covers.
    """
    config = config_of(tower)
    weights = {_rename(name): value for name, value in tower.state_dict().items()}
    first = weights["W_E"]
    with torch.device("meta"):
        visual = HookedViT(config)
    visual = visual.to_empty(device=first.device).to(first.dtype)
    visual.load_state_dict({name: value.detach() for name, value in weights.items()})
    return visual.eval()


def export_open_clip(visual: HookedViT) -> dict[str, Tensor]:
    """The state dict that `convert_open_clip` reads, from a `HookedViT`."""
    back = {ours: theirs for theirs, ours in _names(visual.cfg.n_layers).items()}
    return {back[name]: value.detach().clone() for name, value in visual.state_dict().items()}


def refuse_unsupported(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an open_clip configuration by its looks, before anything is built or downloaded.

    Raises:
        UnsupportedTowerError: its image tower is not one of open_clip's own transformers.
    """
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        kind = f"timm's {vision['timm_model_name']}"
    elif not isinstance(vision.get("layers", 12), int):
        kind = "a ResNet, which has no residual stream of tokens"
    else:
        return
    raise UnsupportedTowerError(f"the image tower of {name!r} is {kind}; {_SUPPORTED}")


def config_of(tower: nn.Module) -> ViTConfig:
    """The variant that an open_clip tower is.

    Raises:
        UnsupportedTowerError: none that is supported.
    """
    if not isinstance(tower, VisionTransformer):
        kind = type(getattr(tower, "trunk", tower)).__name__
        raise UnsupportedTowerError(
            f"expected a transformer of open_clip's own; received a tower of kind {kind}; {_SUPPORTED}"
        )
    blocks = tower.transformer.resblocks
    first = blocks[0]
    faults = [
        what
        for wrong, what in (
            (tower.attn_pool is not None, "it pools by attention"),
            (tower.pool_type != "tok", f"it pools by {tower.pool_type!r}"),
            (isinstance(tower.ln_pre, nn.Identity), "it has no ln_pre"),
            (tower.proj is None, "it has no projection"),
            (not isinstance(first.attn, nn.MultiheadAttention), "its attention is not the plain one"),
            (
                not isinstance(getattr(first, "ln_attn", None), nn.Identity | None),
                "its attention has an inner norm",
            ),
            (
                not isinstance(first.mlp[1] if len(first.mlp) == 3 else None, nn.GELU | QuickGELU),
                "its MLP is another",
            ),
        )
        if wrong
    ]
    if faults:
        raise UnsupportedTowerError(
            f"this image tower cannot be taken apart yet: {', '.join(faults)}; {_SUPPORTED}"
        )
    assert isinstance(tower.ln_post, OpenClipLayerNorm | LayerNormFp32)
    width = tower.conv1.out_channels
    return ViTConfig(
        n_layers=len(blocks),
        d_model=width,
        n_heads=first.attn.num_heads,
        d_head=first.attn.head_dim,
        d_mlp=first.mlp.c_fc.out_features,
        d_embed=tower.proj.shape[1],
        image_size=_pair(tower.image_size),
        patch_size=_pair(tower.patch_size),
        activation=_activation(first.mlp[1]),
        ln_eps=tower.ln_post.eps,
        layer_scale=isinstance(first.ls_1, LayerScale),
    )


def _activation(module: nn.Module) -> Activation:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU) and module.approximate != "none":
        raise UnsupportedTowerError(
            f"this image tower's MLPs use a GELU approximated by {module.approximate!r}"
        )
    return "gelu"


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _rename(name: str) -> str:
    prefix = "transformer.resblocks."
    if name.startswith(prefix):
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if rest in _BLOCK:
            return f"blocks.{layer}.{_BLOCK[rest]}"
    elif name in _TOP:
        return _TOP[name]
    raise UnsupportedTowerError(f"this image tower holds a weight that no term covers: {name}; {_SUPPORTED}")


def _names(n_layers: int) -> Mapping[str, str]:
    blocks = {
        f"transformer.resblocks.{n}.{a}": f"blocks.{n}.{b}"
        for n in range(n_layers)
        for a, b in _BLOCK.items()
    }
    return _TOP | blocks
