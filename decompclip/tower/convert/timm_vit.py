"""timm's `VisionTransformer`: SigLIP, MobileCLIP, ViTamin, gap, and its relative-position sibling."""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import nn

from decompclip.tower.config import ViTConfig
from decompclip.tower.convert.native import gelu_kind, pair
from decompclip.tower.convert.rules import Names, Rule, one_epsilon, refuse


def config_of(tower: TimmModel) -> ViTConfig:
    """The configuration of a tower around a timm `VisionTransformer`, read from its modules.

    Raises:
        UnsupportedTowerError: it is a variant that no configuration of open_clip's has.
    """
    trunk: Any = tower.trunk
    refuse(type(trunk).__name__, _oddities(trunk))
    block = trunk.blocks[0]
    activation = gelu_kind(block.mlp.act)
    if activation is None:
        refuse(type(trunk).__name__, ["activation"])
    return ViTConfig(
        **shape_of(tower),
        d_mlp=(block.mlp.w0 if isinstance(block.mlp, GeGluMlp) else block.mlp.fc1).out_features,
        activation=activation or "gelu",
        gated=isinstance(block.mlp, GeGluMlp),
        mlp_norm_in=isinstance(block.mlp, GeGluMlp),
        layer_scale=is_there(block, "ls1"),
        relative_position=getattr(block.attn, "rel_pos", None) is not None,
    )


def rules_of(tower: TimmModel) -> list[Rule]:
    """Its weights as ours."""
    trunk: Any = tower.trunk
    rules = around(tower)
    for layer, block in enumerate(trunk.blocks):
        names = Names(f"blocks.{layer}.", f"trunk.blocks.{layer}.")
        rules += [*names.norm("ln1", "norm1"), *names.norm("ln2", "norm2")]
        rules += attention_rules(names.under("attn.", "attn."), block.attn)
        rules += mlp_rules(names.under("mlp.", "mlp."), block.mlp)
        if is_there(block, "ls1"):
            rules += [names.rule(f"ls{i}", f"ls{i}.gamma") for i in (1, 2)]
        if getattr(block.attn, "rel_pos", None) is not None:
            rules += names.module("attn.rel_pos", "attn.rel_pos", block.attn.rel_pos)
    return rules


# What timm's towers have in common


def shape_of(tower: TimmModel) -> dict[str, Any]:
    """Fields of `ViTConfig` about what stands before and behind the blocks."""
    trunk: Any = tower.trunk
    pool, head, embed = getattr(trunk, "attn_pool", None), head_of(tower), trunk.patch_embed
    d_model, n_heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
    conv = not isinstance(embed, PatchEmbed)
    (height, width), (rows, columns) = pair(embed.img_size), pair(embed.grid_size)
    fields: dict[str, Any] = {"pool": {"token": "cls", "avg": "mean", "map": "attention"}[trunk.global_pool]}
    if pool is not None:
        fields |= {
            "pool_heads": pool.num_heads,
            "pool_mlp": pool.mlp.fc1.out_features,
            "pool_activation": gelu_kind(pool.mlp.act),
            # Eva's trunks pool over every token; ViT's say so.
            "pool_prefix": getattr(trunk, "pool_include_prefix", True),
        }
    return fields | {
        "n_layers": len(trunk.blocks),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_embed": d_model if head is None else head[1].out_features,
        "image_size": (height, width),
        "patch_size": (height // rows, width // columns),
        "ln_eps": one_epsilon(type(trunk).__name__, trunk, skip=("patch_embed",)),
        "ln_pre": is_there(trunk, "norm_pre"),
        "stem": "conv" if conv else "patch",
        "patch_bias": not conv and embed.proj.bias is not None,
        "n_prefix": trunk.num_prefix_tokens,
        "pos": getattr(trunk, "pos_embed", None) is not None,
        "ln_final": "rows" if is_there(trunk, "norm") else "pooled",
        "projection": head is not None,
        "proj_bias": head is not None and head[1].bias is not None,
    }


def around(tower: TimmModel) -> list[Rule]:
    """Rules of what stands before and behind the blocks."""
    trunk: Any = tower.trunk
    names, d = Names("", "trunk."), trunk.embed_dim
    if isinstance(trunk.patch_embed, PatchEmbed):
        rules = [names.rule("W_E", "patch_embed.proj.weight")]
        if trunk.patch_embed.proj.bias is not None:
            rules += [names.rule("b_E", "patch_embed.proj.bias")]
    else:
        rules = names.module("stem", "patch_embed", trunk.patch_embed)
    prefix = [name for name in ("cls_token", "reg_token") if getattr(trunk, name, None) is not None]
    if prefix:
        rules += [names.rule("prefix", prefix)]
    if (pos := getattr(trunk, "pos_embed", None)) is not None:
        missing = trunk.patch_embed.num_patches + trunk.num_prefix_tokens - pos.shape[1]
        rules += [names.rule("W_pos", [missing * d, "pos_embed"] if missing else ["pos_embed"])]
    if is_there(trunk, "norm_pre"):
        rules += names.norm("ln_pre", "norm_pre")
    rules += names.norm("ln_final", "norm" if is_there(trunk, "norm") else "fc_norm")
    if (pool := getattr(trunk, "attn_pool", None)) is not None:
        rules += _pool_rules(names.under("pool.", "attn_pool."), pool)
    if (head := head_of(tower)) is not None:
        path, linear = head
        rules += [Rule("proj", f"{path}.weight", turned=True)]
        rules += [Rule("b_proj", f"{path}.bias")] if linear.bias is not None else []
    return rules


def attention_rules(names: Names, attn: Any) -> list[Rule]:
    """Rules of timm's usual attention, whose three maps are one."""
    d = attn.proj.in_features
    return [
        names.rule("W_QKV", "qkv.weight"),
        names.rule("b_QKV", ["qkv.bias"] if attn.qkv.bias is not None else [3 * d]),
        names.rule("W_out", "proj.weight"),
        names.rule("b_O", ["proj.bias"] if attn.proj.bias is not None else [d]),
    ]


def mlp_rules(names: Names, mlp: Any) -> list[Rule]:
    """Rules of timm's MLPs, plain and gated."""
    first, last = (["w0", "w1"], "w2") if isinstance(mlp, GeGluMlp) else (["fc1"], "fc2")
    first, last = (["fc1_g", "fc1_x"], "fc2") if hasattr(mlp, "fc1_g") else (first, last)
    inner = "ln_in" if isinstance(mlp, GeGluMlp) else "ln"
    return [
        names.rule("W_in", [f"{name}.weight" for name in first]),
        names.rule("b_in", [f"{name}.bias" for name in first]),
        names.rule("W_out", f"{last}.weight"),
        names.rule("b_out", f"{last}.bias"),
        *(names.norm(inner, "norm") if is_there(mlp, "norm") else []),
    ]


def head_of(tower: TimmModel) -> tuple[str, nn.Linear] | None:
    """The linear map to the joint space and its path: open_clip's, or the trunk's own classifier."""
    found = {"head.proj": getattr(tower.head, "proj", None), "trunk.head": getattr(tower.trunk, "head", None)}
    linears = [(path, m) for path, m in found.items() if isinstance(m, nn.Linear)]
    return linears[0] if linears else None


def _pool_rules(names: Names, pool: AttentionPoolLatent) -> list[Rule]:
    return [
        names.rule("query", "latent"),
        names.rule("W_Q", "q.weight"),
        names.rule("b_Q", "q.bias"),
        names.rule("W_KV", "kv.weight"),
        names.rule("b_KV", "kv.bias"),
        names.rule("W_out", "proj.weight"),
        names.rule("b_O", "proj.bias"),
        *names.norm("ln", "norm"),
        *mlp_rules(names.under("mlp.", "mlp."), pool.mlp),
    ]


def pool_is_odd(trunk: Any) -> bool:
    """Whether a trunk pools in a way that no configuration of open_clip's has."""
    pool = getattr(trunk, "attn_pool", None)
    if trunk.global_pool == "map":
        return not isinstance(pool, AttentionPoolLatent) or any(
            (
                pool.pos_embed is not None,
                pool.latent_len != 1,
                is_there(pool, "q_norm"),
                pool.mlp is None,
                pool.pool != "token",
            )
        )
    if trunk.global_pool == "avg" and getattr(trunk, "pool_include_prefix", False):
        return trunk.num_prefix_tokens > 0
    return trunk.global_pool not in ("token", "avg") or is_there(trunk, "norm") == is_there(trunk, "fc_norm")


def _oddities(trunk: Any) -> list[str]:
    kinds = {Block: Attention, RelPosBlock: RelPosAttention}
    plain = all(
        type(block) in kinds
        and kinds[type(block)] is type(block.attn)
        and type(block.mlp) in (Mlp, GeGluMlp)
        and not is_there(block.attn, "q_norm")
        and not is_there(block.attn, "norm")
        and getattr(block.attn, "gate", None) is None
        and not (type(block.mlp) is Mlp and is_there(block.mlp, "norm"))
        for block in trunk.blocks
    )
    shared = getattr(trunk, "shared_rel_pos", None) is not None
    return ["pool"] * pool_is_odd(trunk) + ["block"] * (not plain or shared)


def is_there(module: Any, name: str) -> bool:
    """Whether a part is there, and is no stand-in."""
    part = getattr(module, name, None)
    return part is not None and not isinstance(part, nn.Identity)
