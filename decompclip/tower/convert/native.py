"""open_clip's own `VisionTransformer`: CLIP, OpenCLIP, CLIPA, CoCa."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import nn

from decompclip.tower.config import Activation, ViTConfig
from decompclip.tower.convert.rules import Names, Rule, one_epsilon, refuse


def config_of(tower: VisionTransformer) -> ViTConfig:
    """The configuration of a native tower, read from its modules and not from its name.

    Raises:
        UnsupportedTowerError: it is a variant that no configuration of open_clip's has.
    """
    source: Any = tower
    blocks = list(source.transformer.resblocks)
    refuse("VisionTransformer", _oddities(source, blocks))
    block, pool = blocks[0], source.attn_pool
    d_model = source.conv1.out_channels
    config: dict[str, Any] = {}
    if pool is not None:
        config = {
            "pool": "attention",
            "pool_heads": pool.attn.num_heads,
            "pool_queries": len(pool.query),
            "pool_norm": True,
            "d_pool": pool.attn.embed_dim,
        }
    elif source.pool_type == "avg":
        config = {"pool": "mean", "ln_final": "pooled" if source.final_ln_after_pool else "rows"}
    d_pool = config.get("d_pool", d_model)
    return ViTConfig(
        n_layers=len(blocks),
        d_model=d_model,
        n_heads=block.attn.num_heads,
        d_head=d_model // block.attn.num_heads,
        d_mlp=block.mlp.c_fc.out_features,
        d_embed=d_pool if source.proj is None else source.proj.shape[1],
        image_size=pair(source.image_size),
        patch_size=pair(source.patch_size),
        activation=_activation(block) or "gelu",
        ln_eps=one_epsilon("VisionTransformer", tower),
        ln_pre=not isinstance(source.ln_pre, nn.Identity),
        layer_scale=not isinstance(block.ls_1, nn.Identity),
        projection=source.proj is not None,
        **config,
    )


def rules_of(tower: VisionTransformer) -> list[Rule]:
    """Its weights as ours."""
    source: Any = tower
    names = Names()
    rules = [
        names.rule("W_E", "conv1.weight"),
        names.rule("prefix", "class_embedding"),
        names.rule("W_pos", "positional_embedding"),
    ]
    if not isinstance(source.ln_pre, nn.Identity):
        rules += names.norm("ln_pre", "ln_pre")
    for layer, block in enumerate(source.transformer.resblocks):
        rules += _block_rules(names.under(f"blocks.{layer}.", f"transformer.resblocks.{layer}."), block)
    if source.attn_pool is None:
        rules += names.norm("ln_final", "ln_post")
    else:
        rules += [*names.norm("ln_final", "attn_pool.ln_k"), *names.norm("pool.ln_post", "ln_post")]
        rules += _pool_rules(names.under("pool.", "attn_pool."), source.attn_pool)
    return rules if source.proj is None else [*rules, names.rule("proj", "proj")]


def _block_rules(names: Names, block: Any) -> list[Rule]:
    scaled = (
        [] if isinstance(block.ls_1, nn.Identity) else [names.rule(f"ls{i}", f"ls_{i}.gamma") for i in (1, 2)]
    )
    return [
        *scaled,
        *names.norm("ln1", "ln_1"),
        names.rule("attn.W_QKV", "attn.in_proj_weight"),
        names.rule("attn.b_QKV", "attn.in_proj_bias"),
        names.rule("attn.W_out", "attn.out_proj.weight"),
        names.rule("attn.b_O", "attn.out_proj.bias"),
        *names.norm("ln2", "ln_2"),
        names.rule("mlp.W_in", "mlp.c_fc.weight"),
        names.rule("mlp.b_in", "mlp.c_fc.bias"),
        names.rule("mlp.W_out", "mlp.c_proj.weight"),
        names.rule("mlp.b_out", "mlp.c_proj.bias"),
    ]


def _pool_rules(names: Names, pool: Any) -> list[Rule]:
    together = pool.attn.in_proj_weight is not None  # where both widths are one
    separate = [f"attn.{x}_proj_weight" for x in "qkv"]
    return [
        names.rule("query", "query"),
        *names.norm("ln_q", "ln_q"),
        names.rule(["W_Q", "W_KV"], "attn.in_proj_weight" if together else separate),
        names.rule(["b_Q", "b_KV"], "attn.in_proj_bias"),
        names.rule("W_out", "attn.out_proj.weight"),
        names.rule("b_O", "attn.out_proj.bias"),
    ]


def _oddities(source: Any, blocks: list[Any]) -> list[str]:
    plain = all(type(block) is ResidualAttentionBlock for block in blocks)
    found = {
        # "parallel" and "cascade" pools are marked as untested in open_clip, and no configuration has them.
        "pool": source.pool_type not in ("tok", "avg")
        or getattr(source, "attn_pool_contrastive", None) is not None,
        "block": not plain,
        "activation": plain and any(_activation(block) is None for block in blocks),
    }
    return [oddity for oddity, present in found.items() if present]


def _activation(block: nn.Module) -> Activation | None:
    layer = block.get_submodule("mlp.gelu")
    return "quick_gelu" if isinstance(layer, QuickGELU) else gelu_kind(layer)


def gelu_kind(layer: object) -> Activation | None:
    """Which GELU a module of torch's or timm's is; None if it is none."""
    if isinstance(layer, nn.GELU):
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}.get(
        type(layer).__name__
    )  # type: ignore[return-value]


def pair(size: Any) -> tuple[int, int]:
    """Height and width, of a number or of a list out of JSON."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
