"""transformers' names of weights, as open_clip and timm name them: the same numbers, some joined, split or turned."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from decompclip.models.errors import CheckpointError

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
            f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}); expected a plain model, without "
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
