"""open_clip's image towers into `HookedViT`: the same weights, the same features."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import TimmModel
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from decompclip.models.config import Activation, ViTConfig
from decompclip.models.errors import UnsupportedTowerError
from decompclip.models.vit import HookedViT

SUPPORTED = (
    "open_clip's native ViT with ln_pre, class-token pooling and GELU or QuickGELU (ViT-B-32, ViT-L-14, ...)"
)

WHY_NOT = {
    "resnet": "it is a ResNet: it has no attention heads that write to a residual stream",
    "timm": "it is a timm tower, which is not converted yet",
    "attentional_pool": "its feature is pooled by attention over all tokens, not read from the class token",
    "pool": "its feature is pooled over several tokens, not read from the class token alone",
    "no_ln_pre": "it has no LayerNorm before block 0",
    "block": "its blocks hold further norms or scales inside attention or MLP",
    "activation": "its MLPs use an activation other than exact GELU and QuickGELU",
    "no_proj": "its projection into the joint space was removed",
    "foreign": "it is no image tower of open_clip's",
}

# open_clip's names, as patterns, to ours.
RENAME = {
    r"conv1\.weight": "W_E",
    r"class_embedding": "cls",
    r"positional_embedding": "W_pos",
    r"ln_pre\.(w|b)(?:eight|ias)": r"ln_pre.\1",
    r"ln_post\.(w|b)(?:eight|ias)": r"ln_final.\1",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(w|b)(?:eight|ias)": r"blocks.\1.ln\2.\3",
    r"transformer\.resblocks\.(\d+)\.ls_([12])\.gamma": r"blocks.\1.ls\2",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_weight": r"blocks.\1.attn.W_QKV",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_bias": r"blocks.\1.attn.b_QKV",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.weight": r"blocks.\1.attn.W_out",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.bias": r"blocks.\1.attn.b_O",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)": r"blocks.\1.mlp.\2_in",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)": r"blocks.\1.mlp.\2_out",
    r"proj": "proj",
}


def convert_open_clip(visual: nn.Module, *, copy: bool = True) -> HookedViT:
    """A `HookedViT` that computes what `visual` computes in evaluation mode.

    Args:
        visual: open_clip's image tower (`model.visual`).
        copy: own the weights; `False` shares them with `visual`, for callers who drop it.

    Raises:
        UnsupportedTowerError: any other tower.
    """
    config = config_of(visual)
    with torch.device("meta"):  # no memory and no random draws for weights that are replaced
        tower = HookedViT(config)
    state: dict[str, Tensor] = {}
    for name, p in visual.named_parameters():
        weight = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) if copy else p
        state[_our_name(name)] = weight
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval()


def config_of(visual: nn.Module) -> ViTConfig:
    """The configuration of a native tower, read from its modules and not from its name.

    Raises:
        UnsupportedTowerError: it is not open_clip's native tower, or a variant not supported yet.
    """
    refuse(type(visual).__name__, _odd_modules(visual))
    tower: Any = visual  # a VisionTransformer of ResidualAttentionBlocks, or it would have been refused
    block = tower.transformer.resblocks[0]
    d_model, n_heads = tower.conv1.out_channels, block.attn.num_heads
    return ViTConfig(
        n_layers=len(tower.transformer.resblocks),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=block.mlp.c_fc.out_features,
        d_embed=tower.proj.shape[1],
        image_size=_pair(tower.image_size),
        patch_size=_pair(tower.patch_size),
        activation=_activation(block) or "gelu",
        ln_eps=tower.ln_post.eps,
        layer_scale=not isinstance(block.ls_1, nn.Identity),
    )


def refuse(name: str, oddities: list[str]) -> None:
    """Raise `UnsupportedTowerError` where a tower has any of `WHY_NOT`'s oddities."""
    if oddities:
        reasons = "; ".join(WHY_NOT[oddity] for oddity in oddities)
        raise UnsupportedTowerError(
            f"the image tower {name!r} is not supported: {reasons}. Supported: {SUPPORTED}"
        )


def oddities(vision_cfg: Mapping[str, Any]) -> list[str]:
    """What open_clip's `vision_cfg` asks for that is not supported, before anything is built."""
    if vision_cfg.get("timm_model_name"):
        return ["timm"]
    if isinstance(vision_cfg.get("layers"), list | tuple):
        return ["resnet"]
    inner = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    found = {
        "attentional_pool": vision_cfg.get("attentional_pool"),
        "pool": vision_cfg.get("pool_type", "tok") != "tok",
        "no_ln_pre": vision_cfg.get("no_ln_pre"),
        "block": vision_cfg.get("block_type") == "custom" or any(vision_cfg.get(key) for key in inner),
        "activation": vision_cfg.get("act_kwargs"),
    }
    return [oddity for oddity, present in found.items() if present]


def _odd_modules(visual: nn.Module) -> list[str]:
    if isinstance(visual, ModifiedResNet):
        return ["resnet"]
    if isinstance(visual, TimmModel):
        return ["timm"]
    if not isinstance(visual, VisionTransformer):
        return ["foreign"]
    blocks = visual.transformer.resblocks
    plain = all(type(block) is ResidualAttentionBlock for block in blocks)
    found = {
        "attentional_pool": visual.attn_pool is not None,
        "pool": visual.pool_type != "tok",
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "block": not plain,
        "activation": plain and any(_activation(block) is None for block in blocks),
        "no_proj": visual.proj is None,
    }
    return [oddity for oddity, present in found.items() if present]


def _activation(block: nn.Module) -> Activation | None:
    layer = block.get_submodule("mlp.gelu")
    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    return "gelu" if isinstance(layer, nn.GELU) and layer.approximate == "none" else None


def _pair(size: Any) -> tuple[int, int]:
    height, width = size  # a list where the configuration came from JSON
    return int(height), int(width)


def _our_name(name: str) -> str:
    for pattern, ours in RENAME.items():
        if match := re.fullmatch(pattern, name):
            renamed = match.expand(ours)
            return renamed.replace("weight_", "W_").replace("bias_", "b_")
    raise UnsupportedTowerError(
        f"the image tower has a weight of unknown use: {name!r}. Supported: {SUPPORTED}"
    )
