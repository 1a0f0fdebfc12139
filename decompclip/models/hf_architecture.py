"""transformers' CLIP and SigLIP in open_clip's terms: their config.json as an architecture, their weights under its names.

An image tower alone is brought to the form of a whole model first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from decompclip.display import some
from decompclip.models.architecture import mlp_ratio
from decompclip.models.errors import CheckpointError
from decompclip.models.json_files import (
    EPSILON,
    FLAG,
    SIDES,
    SIZE,
    TEXT,
    Kind,
    check_fields,
    may_be_null,
    part,
)
from decompclip.models.spec import Choice
from decompclip.tower.config import Activation

ALONE: Mapping[str, str] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""By `model_type`: the whole model's."""

WHY = "what it was loaded from is transformers' image tower alone; load a whole CLIPModel or SiglipModel"


def in_whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as that of a whole model, marked `alone` where it was of an image tower."""
    kind = str(config.get("model_type"))
    if kind not in ALONE:
        return dict(config)
    text = {"projection_size": config.get("hidden_size", 768)}  # of a text tower that would fit
    if "hidden_act" in config:
        text["hidden_act"] = config["hidden_act"]
    return {
        "model_type": ALONE[kind],
        "projection_dim": config.get("projection_dim"),
        "vision_config": dict(config),
        "text_config": text,
        "alone": True,
    }


def with_prefix(state: Mapping[str, Tensor], kind: str, *, source: str) -> dict[str, Tensor]:
    """The weights under a whole model's names; newer versions of transformers leave `vision_model.` out.

    Raises:
        CheckpointError: a CLIP's tower without the projection, whose features lie in no joint space.
    """
    if kind == "clip" and "visual_projection.weight" not in state:
        raise CheckpointError(
            f"expected an image tower with its projection; received {source}, a CLIPVisionModel, whose features do not lie "
            "in the space that images and texts share; take CLIPVisionModelWithProjection or CLIPModel"
        )
    stays = ("vision_model.", "visual_projection.")
    return {key if key.startswith(stays) else f"vision_model.{key}": value for key, value in state.items()}


# transformers' defaults, which newer versions leave out of config.json.
_CLIP_DEFAULTS = {
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
}
_SIGLIP_CHANGES = {
    "vision_config": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_PARTS = ("vision_config", "text_config")
_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "clip": _CLIP_DEFAULTS,
    "siglip": {part: {**_CLIP_DEFAULTS[part], **_SIGLIP_CHANGES[part]} for part in _PARTS},
}
_TANH = {"approximate": "tanh"}
_ACTIVATIONS: Mapping[str, Mapping[str, Any]] = {
    "gelu": {},
    "quick_gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": _TANH},
    "gelu_new": {"act_kwargs": _TANH},
}
_WHY_NOT = {
    "siglip2": "its images keep their shape (NaFlex), so that its towers have no fixed grid of patches; SigLIP 2 of fixed "
    "resolution has the model type 'siglip'",
    "clip_text_model": "it is a text tower alone; an image tower is needed",
    "siglip_text_model": "it is a text tower alone; an image tower is needed",
}


_FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), SIZE),
    **dict.fromkeys(("num_channels", "vocab_size", "max_position_embeddings"), SIZE),
    **dict.fromkeys(("projection_dim", "projection_size"), may_be_null(SIZE)),
    "image_size": SIDES,
    "patch_size": SIDES,
    "hidden_act": TEXT,
    "layer_norm_eps": EPSILON,
    "vision_use_head": FLAG,
}


def completed(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A config.json with transformers' defaults where it is silent; an image tower's as that of a whole model.

    Raises:
        CheckpointError: it is of another type of model, or of a variant that open_clip cannot build.
    """
    check_fields(config, {"model_type": may_be_null(TEXT), **_FIELDS}, source=source)
    config = in_whole(config)
    kind = str(config.get("model_type"))
    if kind not in _DEFAULTS:
        why = f": {_WHY_NOT[kind]}" if kind in _WHY_NOT else ""
        raise CheckpointError(
            f"{source} holds a model of type {kind!r}{why}; expected one of {', '.join(map(repr, _DEFAULTS))}"
        )
    # configurations of before 2023 keep what was changed in `..._config_dict`, which then has the last word
    found = {}
    for name in _PARTS:
        own, older = (part(config, key, source=source) for key in (name, f"{name}_dict"))
        found[name] = {**_DEFAULTS[kind][name], **own, **older}
        check_fields(found[name], _FIELDS, source=f"{source}, {name}")
    vision, text = found["vision_config"], found["text_config"]
    acts = {vision["hidden_act"], text["hidden_act"]}
    odd = {
        f"the activation {', '.join(sorted(acts - set(_ACTIVATIONS)))}": acts - set(_ACTIVATIONS),
        f"two activations ({', '.join(sorted(acts))})": len(acts) > 1,
        f"images of {vision['num_channels']} channels": vision["num_channels"] != 3,
        "no attention pool (vision_use_head)": not vision.get("vision_use_head", True),
        f"text features of width {text.get('projection_size')}": kind == "siglip"
        and (text.get("projection_size") or text["hidden_size"]) != vision["hidden_size"],
    }
    if found_odd := [what for what, present in odd.items() if present]:
        raise CheckpointError(f"{source} has {found_odd[0]}, which open_clip's {kind!r} models do not have")
    return {**config, **found}


def activation_of(config: Mapping[str, Any], activation: Choice = "auto") -> Activation:
    """The activation of both towers: the one asked for, or config.json's."""
    if activation != "auto":
        return activation
    act = config["vision_config"]["hidden_act"]
    return (
        "quick_gelu" if act == "quick_gelu" else "gelu_tanh" if "act_kwargs" in _ACTIVATIONS[act] else "gelu"
    )


def architecture_of(config: Mapping[str, Any], activation: Choice = "auto") -> dict[str, Any]:
    """open_clip's configuration of a completed config.json; a SigLIP's tower, of which open_clip knows fixed shapes only,
    stands under `siglip_tower`.

    Raises:
        ValueError: QuickGELU for SigLIP.
    """
    if config["model_type"] == "clip":
        return _clip(config, activation)
    if activation == "quick_gelu":
        raise ValueError(
            "expected activation 'gelu' for SigLIP, whose towers have no QuickGELU; leave it out"
        )
    return _siglip(config, activation == "auto")


def _clip(config: Mapping[str, Any], activation: Choice) -> dict[str, Any]:
    vision, words = config["vision_config"], config["text_config"]
    # before 2023 transformers took the largest id for the end of a text, and kept that for configurations with a 2
    end = words.get("eos_token_id", 2)
    pool = (
        {"pool_type": "argmax"}
        if end == 2 or not isinstance(end, int)
        else {"pool_type": "eos", "eos_id": end}
    )
    own = activation == "auto"
    return {
        "embed_dim": config.get("projection_dim") or 512,
        "quick_gelu": activation_of(config, activation) == "quick_gelu",
        "vision_cfg": {
            **_shape(vision, own),
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            **_shape(words, own),
            **pool,
            "heads": words["num_attention_heads"],
            "context_length": words["max_position_embeddings"],
            "vocab_size": words["vocab_size"],
        },
    }


def _siglip(config: Mapping[str, Any], own: bool) -> dict[str, Any]:
    vision, words = config["vision_config"], config["text_config"]
    tanh = own and "act_kwargs" in _ACTIVATIONS[vision["hidden_act"]]
    return {
        "embed_dim": vision["hidden_size"],
        "init_logit_bias": -10.0,
        "nonscalar_logit_scale": True,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "siglip_tower": {
                "patch_size": vision["patch_size"],
                "embed_dim": vision["hidden_size"],
                "depth": vision["num_hidden_layers"],
                "num_heads": vision["num_attention_heads"],
                "mlp_ratio": mlp_ratio(vision["hidden_size"], vision["intermediate_size"]),
                "act_layer": "gelu_tanh" if tanh else "gelu",
                "ln_eps": vision["layer_norm_eps"],
            },
        },
        "text_cfg": {
            **_shape(words, own),
            "heads": words["num_attention_heads"],
            "context_length": words["max_position_embeddings"],
            "vocab_size": words["vocab_size"],
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def _shape(tower: Mapping[str, Any], own_activation: bool) -> dict[str, Any]:
    """What both towers of open_clip call by the same names."""
    return {
        "layers": tower["num_hidden_layers"],
        "width": tower["hidden_size"],
        "mlp_ratio": mlp_ratio(tower["hidden_size"], tower["intermediate_size"]),
        "norm_kwargs": {"eps": tower["layer_norm_eps"]},
        **(_ACTIVATIONS[tower["hidden_act"]] if own_activation else {}),
    }


# Inside a block, by the layout of the receiving transformer. `qkv` stands for the three joined projections.
_NATIVE = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.qkv.weight": "attn.in_proj_weight",
    "self_attn.qkv.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TIMM = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.out_proj": "attn.proj",
    "mlp": "mlp",
}


def _blocks(source: str, target: str, names: Mapping[str, str]) -> dict[str, str]:
    pattern = rf"{source}\.encoder\.layers\.(\d+)\."
    return {pattern + re.escape(old) + r"(.*)": rf"{target}.\1.{new}\2" for old, new in names.items()}


def _text(prefix: str) -> dict[str, str]:
    return {
        r"text_model\.embeddings\.token_embedding\.weight": f"{prefix}token_embedding.weight",
        r"text_model\.embeddings\.position_embedding\.weight": f"{prefix}positional_embedding",
        r"text_model\.final_layer_norm\.(.*)": rf"{prefix}ln_final.\1",
        **_blocks("text_model", f"{prefix}transformer.resblocks", _NATIVE),
    }


_SAME = {r"logit_(scale|bias)": r"logit_\1"}

NAMES: Mapping[str, Mapping[str, str]] = {
    "clip": {
        r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
        r"vision_model\.embeddings\.patch_embedding\.weight": "visual.conv1.weight",
        r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
        r"vision_model\.pre_layrnorm\.(.*)": r"visual.ln_pre.\1",  # theirs, without the e
        r"vision_model\.post_layernorm\.(.*)": r"visual.ln_post.\1",
        r"visual_projection\.weight": "visual.proj",
        r"text_projection\.weight": "text_projection",
        **_blocks("vision_model", "visual.transformer.resblocks", _NATIVE),
        **_text(""),
        **_SAME,
    },
    "siglip": {
        r"vision_model\.embeddings\.patch_embedding\.(.*)": r"visual.trunk.patch_embed.proj.\1",
        r"vision_model\.embeddings\.position_embedding\.weight": "visual.trunk.pos_embed",
        r"vision_model\.post_layernorm\.(.*)": r"visual.trunk.norm.\1",
        r"vision_model\.head\.probe": "visual.trunk.attn_pool.latent",
        r"vision_model\.head\.attention\.in_proj_(weight|bias)": r"visual.trunk.attn_pool.qkv.\1",
        r"vision_model\.head\.attention\.out_proj\.(.*)": r"visual.trunk.attn_pool.proj.\1",
        r"vision_model\.head\.layernorm\.(.*)": r"visual.trunk.attn_pool.norm.\1",
        r"vision_model\.head\.mlp\.(.*)": r"visual.trunk.attn_pool.mlp.\1",
        r"text_model\.head\.(.*)": r"text.text_projection.\1",
        **_blocks("vision_model", "visual.trunk.blocks", _TIMM),
        **_text("text."),
        **_SAME,
    },
}
"""By `model_type`: their names, as patterns, to open_clip's."""

_TURNED = ("visual.proj", "text_projection")  # a matrix of open_clip's where theirs is a linear layer
_LEFT = re.compile(r".*\.position_ids")


def rename(state: Mapping[str, Tensor], model_type: str, *, source: str) -> dict[str, Tensor]:
    """A state dict of transformers' `CLIPModel` or `SiglipModel` under the names of open_clip's model.

    Raises:
        CheckpointError: weights of another kind of model among them.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in _joined(state).items():
        if _LEFT.fullmatch(key):
            continue
        new = _new_name(key, NAMES[model_type])
        if new is None:
            unknown.append(key)
        else:
            found |= _reshaped(new, value)
    if unknown:
        raise CheckpointError(
            f"{source} holds {len(unknown)} weights that no {model_type!r} model of transformers has "
            f"({some(unknown)}); expected a plain model, without "
            "adapters or quantisation"
        )
    return found


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with each block's query, key and value projections as one."""
    found = dict(state)
    for key in state:
        if match := re.fullmatch(r"(.*\.self_attn\.)q_proj\.(weight|bias)", key):
            parts = [f"{match[1]}{which}_proj.{match[2]}" for which in "qkv"]
            if all(part in state for part in parts):
                found[f"{match[1]}qkv.{match[2]}"] = torch.cat([found.pop(part) for part in parts])
    return found


def _new_name(key: str, names: Mapping[str, str]) -> str | None:
    for pattern, new in names.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(new)
    return None


def _reshaped(key: str, value: Tensor) -> dict[str, Tensor]:
    if key in _TURNED:
        return {key: value.T.contiguous()}
    if key == "visual.trunk.pos_embed":
        return {key: value[None]}
    if ".attn_pool.qkv." in key:  # the pool's query comes from the probe alone: timm keeps it apart
        width = value.shape[0] // 3
        return {key.replace("qkv", "q"): value[:width], key.replace("qkv", "kv"): value[width:]}
    return {key: value}
