"""Whether a file's weights are a model's: names brought to the model's own, and what is wrong where they differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from einops import rearrange
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.display import some
from decompclip.models.errors import CheckpointError

# What older versions saved among the weights, and no model needs: it follows from the shapes.
_FOLLOWS = re.compile(r"(.*\.)?(position_ids|attn_mask)")
_TRANSFORMERS = r"(vision_model|text_model)\..*"
# Tables of positions, with the tokens before the patches.
_POSITIONS = {"visual.positional_embedding": 1, "visual.trunk.pos_embed": 0}
_PATCHES = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")
# Marks of layouts that are not open_clip's, in the order in which they are looked for.
_LAYOUTS = {
    r"visual\.layer1\.0\.conv1\.weight": "the file holds a ResNet, whose tower is not supported",
    _TRANSFORMERS: (
        "the file has Hugging Face transformers' names; give the folder that it lies in, with its config.json, in place "
        "of a name: `load(FOLDER)`"
    ),
}


def conform(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names that `model` gives them, where open_clip itself has had two layouts.

    Those are: a text tower at the top or under `text.`; a logit scale of shape `[]` or `[1]`; positions and masks that
    older versions saved; Apple's names for MobileCLIP; a model with a logit bias filled from a file without one.
    """
    wanted = model.state_dict()
    found = {key: value for key, value in state.items() if key in wanted or not _FOLLOWS.fullmatch(key)}
    found = dict(convert_state_dict(model, found))  # pyright: ignore[reportArgumentType]
    apart = any(key.startswith("text.") for key in wanted)
    if apart and "positional_embedding" in found:
        found = convert_to_custom_text_state_dict(found)
    elif not apart and "positional_embedding" in wanted:
        found = {key.removeprefix("text."): value for key, value in found.items()}
    for key in ("logit_scale", "logit_bias"):
        if key in wanted and key in found and found[key].numel() == 1:
            found[key] = found[key].reshape(wanted[key].shape)
    if "logit_bias" in wanted and "logit_bias" not in found and "logit_scale" in found:
        # as open_clip does; no feature depends on it
        found["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
    return found


def with_positions_of(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The same weights, the table of positions interpolated to the model's grid as open_clip's `force_image_size` does it.

    Raises:
        CheckpointError: the table is no square grid.
    """
    found, wanted = dict(state), model.state_dict()
    for key in _POSITIONS.keys() & wanted.keys() & found.keys():
        table, prefix = found[key], _POSITIONS[key]
        visual: Any = model.get_submodule("visual")
        rows, columns = grid = (
            visual.grid_size if hasattr(visual, "grid_size") else visual.trunk.patch_embed.grid_size
        )
        if table.ndim != wanted[key].ndim or table.shape[-2] == rows * columns + prefix:
            continue
        side = math.isqrt(table.shape[-2] - prefix)
        if side**2 != table.shape[-2] - prefix:
            raise CheckpointError(
                f"expected positions of a square grid; received {source}, whose {key} has {table.shape[-2]} rows; give "
                "the image size that it was trained with"
            )
        rest = table.reshape(-1, table.shape[-1])
        patches = rearrange(rest[prefix:], "(rows columns) d -> 1 d rows columns", rows=side).float()
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
        patches = rearrange(patches, "1 d rows columns -> (rows columns) d").to(table.dtype)
        found[key] = torch.cat([rest[:prefix], patches]).reshape(wanted[key].shape)
    return found


def image_size_words(size: tuple[int, int], state: Mapping[str, Tensor] | None) -> str:
    """An image size that was asked for, beside the one that the weights are of, for `provenance`."""
    words = f"{size[0]} x {size[1]}, as asked for"
    key = next((key for key in _POSITIONS if key in (state or {})), None)
    if state is None or key is None:
        return words
    side = math.isqrt(max(0, state[key].shape[-2] - _POSITIONS[key]))
    patch = next((state[k].shape[-1] for k in _PATCHES if k in state), 0)
    if (side * patch, side * patch) == size:
        return f"{words} and trained"
    return f"{words}; positions interpolated (bicubic) from {side * patch} x {side * patch}"


def check_fit(model: nn.Module, state: Mapping[str, Tensor], *, source: str, name: str) -> None:
    """Check that `state` holds each weight of `model`, in its shape and finite, and nothing else.

    Raises:
        CheckpointError: it does not; says how many are missing, left over or of another shape, and what
            model the file seems to hold.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    left_over = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    whole = [
        key
        for key in wanted
        if key in state and wanted[key].is_floating_point() and not state[key].is_floating_point()
    ]
    if not (missing or left_over or reshaped or whole):
        _check_finite(wanted, state, source=source, name=name)
        return
    shapes = [f"{key} expected {list(wanted[key].shape)}, got {list(state[key].shape)}" for key in reshaped]
    parts = [
        f"{len(keys)} {what} ({some(shown)})"
        for keys, what, shown in (
            (missing, "missing", missing),
            (left_over, "left over", left_over),
            (reshaped, "of another shape", shapes),
            (whole, "of whole numbers, quantised perhaps", whole),
        )
        if keys
    ]
    raise CheckpointError(
        f"{source} does not fit {name}: of {len(wanted)} weights {'; '.join(parts)}. "
        f"Likely cause: {likely_cause(wanted, state)}"
    )


def _check_finite(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str, name: str
) -> None:
    # in the model's own type: what fp64 holds may be infinite in fp32
    bad = [
        key
        for key, value in state.items()
        if not value.is_meta and not value.to(wanted[key].dtype).isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f"expected finite weights for {name}; received {source}, where {len(bad)} of {len(state)} hold infinite or "
            f"undefined numbers ({some(bad)}); the training diverged or the "
            "file is damaged: copy it again, or take an earlier checkpoint"
        )


def is_of_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of Hugging Face transformers' models."""
    return any(re.fullmatch(_TRANSFORMERS, key) for key in state)


def likely_cause(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What a state dict that does not fit seems to be, and what to do."""
    for pattern, cause in _LAYOUTS.items():
        if any(re.fullmatch(pattern, key) for key in state):
            return cause
    if "conv1.weight" in state and "visual.conv1.weight" in wanted:
        return "the file holds an image tower alone; a whole CLIP is needed"
    timm_file, timm_model = (any(k.startswith("visual.trunk.") for k in keys) for keys in (state, wanted))
    if timm_file != timm_model:
        kinds = ("a timm tower (SigLIP, EVA, ...)", "open_clip's native tower")
        holds, asks = kinds if timm_file else kinds[::-1]
        return f"the file holds {holds}, and that name has {asks}; give the name that it was trained under"
    if any(".lora_" in key or ".base_layer." in key for key in state):
        return (
            "the file holds adapters (LoRA) beside the weights that they change; merge them "
            "(`model.merge_and_unload()`), and save the result"
        )
    size = _other_size(wanted, state)
    names = models_like(state)
    if size and not names:
        return f"the file is of another resolution{_sizes(wanted, state)}; {size}"
    image = _differs(wanted, state, "visual.")
    if names and (image or not _text_kind(state)):
        return f"the file holds {' or '.join(names[:3])}{_sizes(wanted, state)}; give that name{size and f', or {size}'}"
    if not image:
        return _text_differs(wanted, state)
    return f"the file holds another model{_sizes(wanted, state)}; give the name that it was trained under"


def _other_size(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What to pass where nothing but the number of positions differs."""
    differing = {key for key in wanted if key in state and wanted[key].shape != state[key].shape}
    if len(differing) != 1 or not differing <= _POSITIONS.keys():
        return ""
    (key,) = differing
    patch = next((wanted[k].shape[-1] for k in _PATCHES if k in wanted), 0)
    theirs, ours = (
        patch * math.isqrt(max(0, some[key].shape[-2] - _POSITIONS[key])) for some in (state, wanted)
    )
    return f"pass image_size={theirs} to load it so, or image_size={ours} to interpolate its positions"


def _differs(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], prefix: str) -> bool:
    ours, theirs = ({k: v.shape for k, v in some.items() if k.startswith(prefix)} for some in (wanted, state))
    return ours != theirs


def _text_differs(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    here, there = _text_kind(wanted) or "no text tower", _text_kind(state) or "no text tower"
    kinds = f" ({there}, where {here} was expected)" if here != there else ""
    return (
        f"the image towers agree and the text towers do not{kinds}; give the name that it was trained under, or "
        "load the image tower alone with text=False"
    )


def _text_kind(state: Mapping[str, Tensor]) -> str:
    if any(key.startswith("text.transformer.") and ".resblocks." not in key for key in state):
        return "a text tower of Hugging Face transformers'"
    return "open_clip's own text tower" if any("token_embedding" in key for key in state) else ""


_SIZES = ("patches of {} pixels", "width {}", "{} tokens", "{} layers")


def _sizes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The sizes in which two image towers differ: `: patches of 16 x 16 pixels, expected 32 x 32`."""
    shown = [
        f"{words.format(theirs)}, expected {ours}"
        for words, theirs, ours in zip(_SIZES, _size(state), _size(wanted), strict=True)
        if theirs and ours and theirs != ours
    ]
    return f" ({'; '.join(shown)})" if shown else ""


def _size(state: Mapping[str, Tensor]) -> tuple[str, str, str, str]:
    """Patches, width, tokens and layers of an image tower, each empty where nothing tells it."""
    trunk = "visual.trunk." if any(key.startswith("visual.trunk.") for key in state) else ""
    conv = state.get(f"{trunk}patch_embed.proj.weight" if trunk else "visual.conv1.weight")
    positions = state.get(f"{trunk}pos_embed" if trunk else "visual.positional_embedding")
    blocks = re.compile(r"visual\.(?:trunk|transformer)\.(?:blocks|resblocks)\.(\d+)\.")
    return (
        "" if conv is None else " x ".join(map(str, conv.shape[-2:])),
        "" if conv is None else str(conv.shape[0]),
        "" if positions is None else str(positions.shape[-2]),
        str(len({match[1] for key in state if (match := blocks.match(key))}) or ""),
    )


def models_like(state: Mapping[str, Tensor], *, of_any_size: bool = False) -> list[str]:
    """open_clip's names of native models with this state dict's shapes, without the same ones with QuickGELU.

    Args:
        of_any_size: whatever the number of positions.
    """
    keys = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj")
    if not all(key in state for key in keys):
        return []
    conv, positions, proj = (state[key].shape for key in keys)
    layers = len({key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")})
    words = next((tuple(v.shape) for k, v in state.items() if k.endswith("token_embedding.weight")), None)
    found = []
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
        if "timm_model_name" in vision or not isinstance(size, int) or not isinstance(patch, int):
            continue
        shape = (
            vision.get("layers"),
            vision.get("width"),
            patch,
            positions[0] if of_any_size else (size // patch) ** 2 + 1,
            config["embed_dim"],
        )
        same_text = words in (None, (text.get("vocab_size", 49408), text.get("width")))
        same_norms = bool(vision.get("no_ln_pre")) == ("visual.ln_pre.weight" not in state)
        same_pool = bool(vision.get("attentional_pool")) == ("visual.attn_pool.query" in state)
        if (
            same_text
            and same_norms
            and same_pool
            and shape == (layers, conv[0], conv[-1], positions[0], proj[1])
        ):
            found.append(name)
    plain = [name for name in found if not name.endswith("-quickgelu")]
    return plain or found
