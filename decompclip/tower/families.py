"""The families of open_clip's image towers: their configuration and their weights as ours.

Native: open_clip's `VisionTransformer` (CLIP, OpenCLIP, CLIPA, CoCa). timm's: `VisionTransformer` (SigLIP, MobileCLIP,
ViTamin, gap), its relative-position sibling, and `Eva` (EVA01, EVA02, the Perception Encoder). All is read from a
tower's modules, not from its name.

Which weights are which stands in rules, readable in both directions. A rule says that the numbers of some of our weights, one
after the other, are those of some of theirs:

    Rule(["W_pos"], ["pos_embed"])                                       a weight of another shape
    Rule(["blocks.0.attn.W_QKV"], ["attn.q.weight", "attn.k.weight"...]) several in one
    Rule(["blocks.0.attn.b_QKV"], ["q_bias", 768, "v_bias"])             768 zeros, which the source leaves out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer as TimmViT
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from decompclip.tower.config import Activation, UnsupportedTowerError, ViTConfig, pair

SUPPORTED = "every transformer tower of open_clip's: native ViT, CLIPA, CoCa, SigLIP, MobileCLIP-B/-L, ViTamin, EVA, PE"

WHY_NOT = {
    "resnet": "it is a ResNet: it has no attention heads that write to a residual stream",
    "conv": "it is a convolutional network: it has no attention heads that write to a residual stream of tokens",
    "windows": "it is a Swin Transformer: its tokens are merged from stage to stage, so that no one stream of tokens "
    "goes through it",
    "foreign": "it is no image tower of open_clip's",
    "pool": "its feature is pooled in a way that has no frozen linear map",
    "block": "its blocks hold norms, gates or scales that no tower of open_clip's has",
    "activation": "its MLPs use an activation that is not known",
    "norm": "its norms are no LayerNorms of one epsilon",
}

# timm's modules of model definitions.
_TRANSFORMERS = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "eva",
    "vitamin",
)
_WINDOWS = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


def refuse(name: str, oddities: Sequence[str]) -> None:
    """Raise `UnsupportedTowerError` where a tower has any of `WHY_NOT`'s oddities."""
    if oddities:
        reasons = "; ".join(WHY_NOT[oddity] for oddity in oddities)
        raise UnsupportedTowerError(
            f"the image tower {name!r} is not supported: {reasons}. Supported: {SUPPORTED}"
        )


def oddities(vision_cfg: Mapping[str, Any]) -> list[str]:
    """What in open_clip's `vision_cfg` rules out a decomposition, before anything is built."""
    if name := vision_cfg.get("timm_model_name"):
        if timm.models.is_model_in_modules(name, _TRANSFORMERS):
            return []
        return ["windows" if timm.models.is_model_in_modules(name, _WINDOWS) else "conv"]
    return ["resnet"] if isinstance(vision_cfg.get("layers"), list | tuple) else []


def config_of(visual: nn.Module) -> ViTConfig:
    """The configuration of a tower.

    Raises:
        UnsupportedTowerError: it is none of open_clip's transformer towers.
    """
    return _native_config(visual) if isinstance(visual, VisionTransformer) else _timm_config(_timm(visual))


def rules_of(visual: nn.Module) -> list[Rule]:
    """A tower's weights as ours.

    Raises:
        UnsupportedTowerError: it is none of open_clip's transformer towers.
    """
    return _native_rules(visual) if isinstance(visual, VisionTransformer) else _timm_rules(_timm(visual))


def _timm(visual: nn.Module) -> TimmModel:
    if not isinstance(visual, TimmModel):
        _refuse_one(visual, "resnet" if isinstance(visual, ModifiedResNet) else "foreign")
    trunk = visual.trunk
    if not isinstance(trunk, Eva | TimmViT | VisionTransformerRelPos):
        foreign = "block" if hasattr(trunk, "blocks") else "conv"
        _refuse_one(trunk, "windows" if isinstance(trunk, SwinTransformer) else foreign)
    return visual


def _refuse_one(module: nn.Module, oddity: str) -> NoReturn:
    refuse(type(module).__name__, [oddity])
    raise AssertionError


def _one_epsilon(module: nn.Module, skip: tuple[str, ...] = ("\0",)) -> float:
    """The epsilon that all LayerNorms of a tower share, but for those under the prefixes to skip."""
    norms = [
        m for path, m in module.named_modules() if isinstance(m, nn.LayerNorm) and not path.startswith(skip)
    ]
    found = {norm.eps for norm in norms}
    if len(found) != 1:
        _refuse_one(module, "norm")
    return found.pop()


def _activation(layer: object) -> Activation | None:
    """Which activation a module of torch's, timm's or open_clip's is; None if it is none that is known."""
    if isinstance(layer, nn.GELU):
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    known: dict[str, Activation] = {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "SiLU": "silu",
    }
    return known.get(type(layer).__name__)


def _there(module: Any, name: str) -> bool:
    """Whether a part is there, and is no stand-in."""
    part = getattr(module, name, None)
    return part is not None and not isinstance(part, nn.Identity)


# Native


def _native_config(tower: VisionTransformer) -> ViTConfig:
    source: Any = tower
    blocks, pool = list(source.transformer.resblocks), source.attn_pool
    plain = all(type(block) is ResidualAttentionBlock for block in blocks)
    # "parallel" and "cascade" pools are marked as untested in open_clip, and no configuration has them.
    odd_pool = source.pool_type not in ("tok", "avg") or _there(source, "attn_pool_contrastive")
    unknown = plain and any(_activation(block.mlp.gelu) is None for block in blocks)
    refuse("VisionTransformer", ["pool"] * odd_pool + ["block"] * (not plain) + ["activation"] * unknown)
    block, d_model = blocks[0], source.conv1.out_channels
    pooling: dict[str, Any] = {}
    if pool is not None:
        pooling = {
            "pool": "attention",
            "pool_heads": pool.attn.num_heads,
            "pool_queries": len(pool.query),
            "pool_norm": True,
            "d_pool": pool.attn.embed_dim,
        }
    elif source.pool_type == "avg":
        pooling = {"pool": "mean", "ln_final": "pooled" if source.final_ln_after_pool else "rows"}
    d_pool = pooling.get("d_pool", d_model)
    return ViTConfig(
        n_layers=len(blocks),
        d_model=d_model,
        n_heads=block.attn.num_heads,
        d_head=d_model // block.attn.num_heads,
        d_mlp=block.mlp.c_fc.out_features,
        d_embed=d_pool if source.proj is None else source.proj.shape[1],
        image_size=pair(source.image_size),
        patch_size=pair(source.patch_size),
        activation=_activation(block.mlp.gelu) or "gelu",
        ln_eps=_one_epsilon(tower),
        ln_pre=_there(source, "ln_pre"),
        layer_scale=_there(block, "ls_1"),
        projection=source.proj is not None,
        **pooling,
    )


_ATTENTION = {"W_out": "out_proj.weight", "b_O": "out_proj.bias"}
_BLOCK = {
    "attn.W_QKV": "attn.in_proj_weight",
    "attn.b_QKV": "attn.in_proj_bias",
    **{f"attn.{ours}": f"attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "mlp.W_in": "mlp.c_fc.weight",
    "mlp.b_in": "mlp.c_fc.bias",
    "mlp.W_out": "mlp.c_proj.weight",
    "mlp.b_out": "mlp.c_proj.bias",
}


def _native_rules(tower: VisionTransformer) -> list[Rule]:
    source: Any = tower
    names, pool = Names(), source.attn_pool
    rules = names.rules({"W_E": "conv1.weight", "prefix": "class_embedding", "W_pos": "positional_embedding"})
    rules += names.norm("ln_pre", "ln_pre") if _there(source, "ln_pre") else []
    for layer, block in enumerate(source.transformer.resblocks):
        inner = names.under(f"blocks.{layer}.", f"transformer.resblocks.{layer}.")
        rules += [*inner.norm("ln1", "ln_1"), *inner.norm("ln2", "ln_2"), *inner.rules(_BLOCK)]
        if _there(block, "ls_1"):
            rules += inner.rules({"ls1": "ls_1.gamma", "ls2": "ls_2.gamma"})
    if pool is None:
        rules += names.norm("ln_final", "ln_post")
    else:
        rules += [*names.norm("ln_final", "attn_pool.ln_k"), *names.norm("pool.ln_post", "ln_post")]
        inner, attn = names.under("pool.", "attn_pool."), names.under("pool.", "attn_pool.attn.")
        whole = pool.attn.in_proj_weight is not None  # where both widths are one
        weights = "in_proj_weight" if whole else [f"{x}_proj_weight" for x in "qkv"]
        rules += [inner.rule("query", "query"), *inner.norm("ln_q", "ln_q"), *attn.rules(_ATTENTION)]
        rules += [attn.rule(["W_Q", "W_KV"], weights), attn.rule(["b_Q", "b_KV"], "in_proj_bias")]
    return rules if source.proj is None else [*rules, names.rule("proj", "proj")]


# timm's


_EVA = ((EvaAttention, AttentionRope), (Mlp, GluMlp, SwiGLU))
_BLOCKS: dict[type, tuple[tuple[type, ...], tuple[type, ...]]] = {
    Block: ((Attention,), (Mlp, GeGluMlp)),
    RelPosBlock: ((RelPosAttention,), (Mlp, GeGluMlp)),
    EvaBlock: _EVA,
    EvaBlockPostNorm: _EVA,
}
"""By kind of block: the kinds of attention and of MLP in it."""


def _timm_config(tower: TimmModel) -> ViTConfig:
    trunk: Any = tower.trunk
    refuse(type(trunk).__name__, _timm_oddities(trunk))
    block, head, embed = trunk.blocks[0], _head_of(tower), trunk.patch_embed
    attn, mlp, rope = block.attn, block.mlp, getattr(trunk, "rope", None)
    activation = _activation(mlp.act)
    if activation is None:
        _refuse_one(trunk, "activation")
    conv, geglu = not isinstance(embed, PatchEmbed), isinstance(mlp, GeGluMlp)
    (height, width), (rows, columns) = pair(embed.img_size), pair(embed.grid_size)
    pooling: dict[str, Any] = {"pool": {"token": "cls", "avg": "mean", "map": "attention"}[trunk.global_pool]}
    if (pool := getattr(trunk, "attn_pool", None)) is not None:
        pooling |= {
            "pool_heads": pool.num_heads,
            "pool_mlp": pool.mlp.fc1.out_features,
            "pool_activation": _activation(pool.mlp.act),
            # Eva's trunks pool over every token; ViT's say so.
            "pool_prefix": getattr(trunk, "pool_include_prefix", True),
        }
    return ViTConfig(
        n_layers=len(trunk.blocks),
        d_model=trunk.embed_dim,
        n_heads=attn.num_heads,
        d_head=trunk.embed_dim // attn.num_heads,
        d_mlp=(mlp.w2 if geglu else mlp.fc2).in_features,
        d_embed=trunk.embed_dim if head is None else head[1].out_features,
        image_size=(height, width),
        patch_size=(height // rows, width // columns),
        activation=activation,
        gated=not isinstance(mlp, Mlp),
        mlp_norm=not geglu and _there(mlp, "norm"),
        mlp_norm_in=geglu,
        attn_norm=_there(attn, "norm"),
        norm="post" if isinstance(block, EvaBlockPostNorm) else "pre",
        ln_eps=_one_epsilon(trunk, skip=("patch_embed",)),
        ln_pre=_there(trunk, "norm_pre"),
        layer_scale=_there(block, "ls1") or _there(block, "gamma_1"),
        stem="conv" if conv else "patch",
        patch_bias=not conv and embed.proj.bias is not None,
        n_prefix=trunk.num_prefix_tokens,
        pos=getattr(trunk, "pos_embed", None) is not None,
        rope=None if rope is None else "half" if getattr(attn, "rotate_half", False) else "interleaved",
        relative_position=_there(attn, "rel_pos"),
        ln_final="rows" if _there(trunk, "norm") else "pooled",
        projection=head is not None,
        proj_bias=head is not None and head[1].bias is not None,
        **pooling,
    )


def _timm_oddities(trunk: Any) -> list[str]:
    rope, eva = getattr(trunk, "rope", None), isinstance(trunk, Eva)
    plain = all(_is_plain(block, eva) for block in trunk.blocks)
    plain = plain and (rope is None or type(rope) is RotaryEmbeddingCat)
    shared = getattr(trunk, "shared_rel_pos", None) is not None
    return ["pool"] * _pool_is_odd(trunk) + ["block"] * (not plain or shared)


def _is_plain(block: Any, eva: bool) -> bool:
    if type(block) not in _BLOCKS:
        return False
    attn, mlp, (of_attn, of_mlp) = block.attn, block.mlp, _BLOCKS[type(block)]
    return (
        type(attn) in of_attn
        and type(mlp) in of_mlp
        and not getattr(mlp, "gate_last", False)
        and not _there(attn, "q_norm")
        and getattr(attn, "gate", None) is None
        and getattr(attn, "num_kv_groups", 1) == 1
        and (getattr(block, "gamma_1", None) is None) == (getattr(block, "gamma_2", None) is None)
        and (eva or not (_there(attn, "norm") or (type(mlp) is Mlp and _there(mlp, "norm"))))
    )


def _pool_is_odd(trunk: Any) -> bool:
    """Whether a trunk pools in a way that no configuration of open_clip's has."""
    pool = getattr(trunk, "attn_pool", None)
    if trunk.global_pool == "map":
        return (
            not isinstance(pool, AttentionPoolLatent)
            or pool.pos_embed is not None
            or pool.latent_len != 1
            or _there(pool, "q_norm")
            or pool.mlp is None
            or pool.pool != "token"
        )
    if trunk.global_pool == "avg" and getattr(trunk, "pool_include_prefix", False):
        return trunk.num_prefix_tokens > 0
    return trunk.global_pool not in ("token", "avg") or _there(trunk, "norm") == _there(trunk, "fc_norm")


def _head_of(tower: TimmModel) -> tuple[str, nn.Linear] | None:
    """The linear map to the joint space and its path: open_clip's, or the trunk's own classifier."""
    found = {"head.proj": getattr(tower.head, "proj", None), "trunk.head": getattr(tower.trunk, "head", None)}
    return next(((path, m) for path, m in found.items() if isinstance(m, nn.Linear)), None)


def _timm_rules(tower: TimmModel) -> list[Rule]:
    trunk: Any = tower.trunk
    names, d, embed = Names("", "trunk."), trunk.embed_dim, trunk.patch_embed
    if isinstance(embed, PatchEmbed):
        rules = [names.rule("W_E", "patch_embed.proj.weight")]
        rules += [names.rule("b_E", "patch_embed.proj.bias")] if embed.proj.bias is not None else []
    else:
        rules = names.module("stem", "patch_embed", embed)
    prefix = [name for name in ("cls_token", "reg_token") if getattr(trunk, name, None) is not None]
    rules += [names.rule("prefix", prefix)] if prefix else []
    if (pos := getattr(trunk, "pos_embed", None)) is not None:
        missing = embed.num_patches + trunk.num_prefix_tokens - pos.shape[1]
        rules += [names.rule("W_pos", [missing * d, "pos_embed"] if missing else ["pos_embed"])]
    rules += names.norm("ln_pre", "norm_pre") if _there(trunk, "norm_pre") else []
    for layer, block in enumerate(trunk.blocks):
        rules += _timm_block(names.under(f"blocks.{layer}.", f"blocks.{layer}."), block)
    rules += names.norm("ln_final", "norm" if _there(trunk, "norm") else "fc_norm")
    if (pool := getattr(trunk, "attn_pool", None)) is not None:
        inner = names.under("pool.", "attn_pool.")
        kept = {"W_Q": "q.weight", "b_Q": "q.bias", "W_KV": "kv.weight", "b_KV": "kv.bias"}
        rules += inner.rules({"query": "latent", **kept, "W_out": "proj.weight", "b_O": "proj.bias"})
        rules += [*inner.norm("ln", "norm"), *_timm_mlp(inner.under("mlp.", "mlp."), pool.mlp)]
    if (head := _head_of(tower)) is not None:
        path, linear = head
        rules += [Names().rule("proj", f"{path}.weight", turned=True)]
        rules += [Names().rule("b_proj", f"{path}.bias")] if linear.bias is not None else []
    return rules


def _timm_block(names: Names, block: Any) -> list[Rule]:
    rules = [*names.norm("ln1", "norm1"), *names.norm("ln2", "norm2")]
    rules += _timm_attention(names.under("attn.", "attn."), block.attn)
    rules += _timm_mlp(names.under("mlp.", "mlp."), block.mlp)
    if _there(block, "ls1"):
        rules += names.rules({"ls1": "ls1.gamma", "ls2": "ls2.gamma"})
    if _there(block, "gamma_1"):
        rules += names.rules({"ls1": "gamma_1", "ls2": "gamma_2"})
    if _there(block.attn, "rel_pos"):
        rules += names.module("attn.rel_pos", "attn.rel_pos", block.attn.rel_pos)
    return rules


def _timm_attention(names: Names, attn: Any) -> list[Rule]:
    d = attn.proj.in_features
    if attn.qkv is None:
        parts = [f"{x}_proj" for x in "qkv"]
        biases = [f"{part}.bias" if getattr(attn, part).bias is not None else d for part in parts]
        rules = names.rules({"W_QKV": [f"{part}.weight" for part in parts], "b_QKV": biases})
    elif getattr(attn, "q_bias", None) is not None:  # the key's is a buffer of zeros
        rules = names.rules({"W_QKV": "qkv.weight", "b_QKV": ["q_bias", d, "v_bias"]})
    else:
        rules = names.linear("W_QKV", "b_QKV", "qkv", attn.qkv)
    rules += names.linear("W_out", "b_O", "proj", attn.proj)
    return rules + (names.norm("ln", "norm") if _there(attn, "norm") else [])


def _timm_mlp(names: Names, mlp: Any) -> list[Rule]:
    geglu = isinstance(mlp, GeGluMlp)
    first, last = (["w0", "w1"], "w2") if geglu else (["fc1"], "fc2")
    first = ["fc1_g", "fc1_x"] if hasattr(mlp, "fc1_g") else first
    rules = names.rules(
        {
            "W_in": [f"{name}.weight" for name in first],
            "b_in": [f"{name}.bias" for name in first],
            "W_out": f"{last}.weight",
            "b_out": f"{last}.bias",
        }
    )
    return rules + (names.norm("ln_in" if geglu else "ln", "norm") if _there(mlp, "norm") else [])


def rope_of(visual: Any) -> Tensor:
    """Sines and cosines `[2, patch, d_head]` of a tower of timm's with rotary positions."""
    trunk = visual.trunk
    return torch.stack(trunk.rope.get_embed(trunk.patch_embed.grid_size).chunk(2, dim=-1))


Piece = str | int
"""A weight's name, or a number of zeros that have no weight."""


@dataclass(frozen=True)
class Rule:
    """Our weights and theirs that hold the same numbers; `turned` where one is the transpose of the other."""

    ours: Sequence[str]
    theirs: Sequence[Piece]
    turned: bool = False

    @property
    def names(self) -> Iterator[str]:
        return (piece for piece in self.theirs if isinstance(piece, str))

    def forward(self, source: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our weights."""
        if self.turned:
            (name,), (ours,) = self.names, self.ours
            return {ours: source[name].detach().T.contiguous().view(shapes[ours])}
        like = source[next(self.names, next(iter(source)))]
        parts = [
            like.new_zeros(piece) if isinstance(piece, int) else source[piece].detach()
            for piece in self.theirs
        ]
        return _cut(parts, self.ours, shapes)

    def backward(self, ours: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Their weights.

        Raises:
            ValueError: numbers that the source has no weight for were changed from zero.
        """
        if self.turned:
            (name,), (own,) = self.names, self.ours
            return {name: ours[own].detach().T.contiguous().view(shapes[name])}
        keys = [piece if isinstance(piece, str) else f"zeros {i}" for i, piece in enumerate(self.theirs)]
        sizes = {
            key: torch.Size([piece])
            for key, piece in zip(keys, self.theirs, strict=True)
            if isinstance(piece, int)
        }
        cut = _cut([ours[name].detach() for name in self.ours], keys, {**shapes, **sizes})
        for key in sizes:
            if cut.pop(key).any():
                raise ValueError(
                    f"expected zeros in {' and '.join(self.ours)} where the source tower has no weight; received others; "
                    "the source's architecture cannot hold this edit"
                )
        return cut


def _cut(parts: list[Tensor], names: Sequence[str], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    if [part.shape for part in parts] == [shapes[name] for name in names]:
        return dict(zip(names, parts, strict=True))  # as they lie in memory
    flat = [part.flatten() for part in parts]
    whole = torch.cat(flat) if len(flat) > 1 else flat[0]
    cut = whole.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, cut, strict=True)}


@dataclass(frozen=True)
class Names:
    """Builds rules under two prefixes: ours and theirs."""

    ours: str = ""
    theirs: str = ""

    def under(self, ours: str, theirs: str) -> Names:
        return Names(self.ours + ours, self.theirs + theirs)

    def rule(self, ours: str | Sequence[str], theirs: str | Sequence[Piece], *, turned: bool = False) -> Rule:
        ours = [ours] if isinstance(ours, str) else ours
        theirs = [theirs] if isinstance(theirs, str) else theirs
        pieces = [self.theirs + piece if isinstance(piece, str) else piece for piece in theirs]
        return Rule([self.ours + name for name in ours], pieces, turned)

    def rules(self, pairs: Mapping[str, str | Sequence[Piece]]) -> list[Rule]:
        """One of each pair of ours and theirs."""
        return [self.rule(ours, theirs) for ours, theirs in pairs.items()]

    def norm(self, ours: str, theirs: str) -> list[Rule]:
        """A LayerNorm's two weights."""
        return self.rules({f"{ours}.w": f"{theirs}.weight", f"{ours}.b": f"{theirs}.bias"})

    def linear(self, weight: str, bias: str, theirs: str, layer: nn.Linear) -> list[Rule]:
        """A linear layer; zeros where it has no bias."""
        biased = [f"{theirs}.bias"] if layer.bias is not None else [layer.out_features]
        return self.rules({weight: f"{theirs}.weight", bias: biased})

    def module(self, ours: str, theirs: str, module: nn.Module) -> list[Rule]:
        """All that a module keeps, taken over as it is."""
        return self.rules({f"{ours}.{name}": f"{theirs}.{name}" for name in module.state_dict()})
