"""timm's `Eva`: EVA01, EVA02 and the Perception Encoder."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers.attention import AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from decompclip.tower.config import ViTConfig
from decompclip.tower.convert.native import gelu_kind
from decompclip.tower.convert.rules import Names, Rule, refuse
from decompclip.tower.convert.timm_vit import (
    around,
    attention_rules,
    is_there,
    mlp_rules,
    pool_is_odd,
    shape_of,
)


def config_of(tower: TimmModel) -> ViTConfig:
    """The configuration of a tower around a timm `Eva`, read from its modules.

    Raises:
        UnsupportedTowerError: it is a variant that no configuration of open_clip's has.
    """
    trunk: Any = tower.trunk
    refuse("Eva", _oddities(trunk))
    block = trunk.blocks[0]
    activation = gelu_kind(block.mlp.act)
    if activation is None:
        refuse("Eva", ["activation"])
    rope = None
    if trunk.rope is not None:
        rope = "half" if getattr(block.attn, "rotate_half", False) else "interleaved"
    return ViTConfig(
        **shape_of(tower),
        d_mlp=block.mlp.fc2.in_features,
        activation=activation or "gelu",
        gated=not isinstance(block.mlp, Mlp),
        mlp_norm=is_there(block.mlp, "norm"),
        attn_norm=is_there(block.attn, "norm"),
        norm="post" if isinstance(block, EvaBlockPostNorm) else "pre",
        layer_scale=getattr(block, "gamma_1", None) is not None,
        rope=rope,
    )


def rules_of(tower: TimmModel) -> list[Rule]:
    """Its weights as ours."""
    trunk: Any = tower.trunk
    rules = around(tower)
    for layer, block in enumerate(trunk.blocks):
        names = Names(f"blocks.{layer}.", f"trunk.blocks.{layer}.")
        rules += [*names.norm("ln1", "norm1"), *names.norm("ln2", "norm2")]
        rules += _attention_rules(names.under("attn.", "attn."), block.attn)
        rules += mlp_rules(names.under("mlp.", "mlp."), block.mlp)
        if getattr(block, "gamma_1", None) is not None:
            rules += [names.rule("ls1", "gamma_1"), names.rule("ls2", "gamma_2")]
    return rules


def rope_of(tower: TimmModel) -> Tensor | None:
    """Sines and cosines `[2, patch, d_head]`, or None."""
    trunk: Any = tower.trunk
    if trunk.rope is None:
        return None
    return torch.stack(trunk.rope.get_embed(trunk.patch_embed.grid_size).chunk(2, dim=-1))


def _attention_rules(names: Names, attn: Any) -> list[Rule]:
    if isinstance(attn, AttentionRope) and attn.qkv is not None:
        return attention_rules(names, attn)
    d = attn.proj.in_features
    split = attn.qkv is None
    parts = [f"{x}_proj" for x in "qkv"]
    if split:
        biases = [f"{part}.bias" if getattr(attn, part).bias is not None else d for part in parts]
    else:
        biases = (
            ["q_bias", d, "v_bias"] if attn.q_bias is not None else [3 * d]
        )  # the key's is a buffer of zeros
    return [
        names.rule("W_QKV", [f"{part}.weight" for part in parts] if split else "qkv.weight"),
        names.rule("b_QKV", biases),
        names.rule("W_out", "proj.weight"),
        names.rule("b_O", ["proj.bias"] if attn.proj.bias is not None else [d]),
        *(names.norm("ln", "norm") if is_there(attn, "norm") else []),
    ]


def _oddities(trunk: Any) -> list[str]:
    plain = all(
        type(block) in (EvaBlock, EvaBlockPostNorm)
        and type(block.attn) in (EvaAttention, AttentionRope)
        and type(block.mlp) in (Mlp, GluMlp, SwiGLU)
        and not getattr(block.mlp, "gate_last", False)
        and not is_there(block.attn, "q_norm")
        and getattr(block.attn, "gate", None) is None
        and getattr(block.attn, "num_kv_groups", 1) == 1
        and (getattr(block, "gamma_1", None) is None) == (getattr(block, "gamma_2", None) is None)
        for block in trunk.blocks
    )
    turns = trunk.rope is None or type(trunk.rope) is RotaryEmbeddingCat
    return ["pool"] * pool_is_odd(trunk) + ["block"] * (not plain or not turns)
