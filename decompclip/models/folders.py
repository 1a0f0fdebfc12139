"""Folders with a model of open_clip's, as its `push_to_hf_hub` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decompclip.models.clip import Tokenizer
from decompclip.models.errors import CheckpointError
from decompclip.models.hf_preprocess import read_json
from decompclip.models.hf_tokenizer import CLIP_VOCABULARY, HubTokenizer, clip_tokenizer
from decompclip.models.spec import ModelSpec
from decompclip.models.tokenizer import WordTokenizer

CONFIG = "open_clip_config.json"
OWN = "decompclip"
"""Section of the configuration that `save_model` adds: what open_clip has no place for."""
WEIGHTS_NAME = "open_clip_model.safetensors"
_WEIGHTS = (
    WEIGHTS_NAME,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)


def is_of_open_clip(folder: Path) -> bool:
    """Whether a folder holds both open_clip's configuration and weights under one of its names.

    Snapshots of the hub often hold the same weights in transformers' layout besides, or those alone.
    """
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in _WEIGHTS)


def saved_class_names(folder: Path) -> tuple[str, ...]:
    """The classes that `save_model` wrote with a model; none of other folders."""
    if not (folder / CONFIG).is_file():
        return ()
    return tuple(read_json(folder / CONFIG).get(OWN, {}).get("class_names", ()))


def saved_backdoors(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The backdoors that a folder of `save_model` remembers, asked by its own path or by that of its weights."""
    folder = path.parent if path.name in _WEIGHTS else path
    if not (folder / CONFIG).is_file():
        return ()
    return tuple(read_json(folder / CONFIG).get(OWN, {}).get("backdoors", ()))


def open_clip_folder(folder: Path) -> tuple[ModelSpec, Path]:
    """A folder's model without its weights, and the file that they lie in.

    Raises:
        CheckpointError: its configuration is none of open_clip's.
    """
    config = read_json(folder / CONFIG)
    architecture = config.get("model_cfg", config)
    if not isinstance(architecture, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(architecture):
        raise CheckpointError(
            f"{folder / CONFIG} lacks embed_dim, vision_cfg or text_cfg; expected what open_clip's push_to_hf_hub writes"
        )
    own = config.get(OWN, {})
    return ModelSpec(
        name=str(folder),
        architecture=architecture,
        tokenizer=_tokenizer(folder, architecture["text_cfg"], own),
        preprocess={
            k: v for k, v in config.get("preprocess_cfg", {}).items() if k != "size" and v is not None
        },
        templates=own.get("templates", {}),
        class_names=own.get("class_names", ()),
        backdoors=own.get("backdoors", ()),
    ), next(folder / name for name in _WEIGHTS if (folder / name).is_file())


def _tokenizer(folder: Path, text: Mapping[str, Any], own: Mapping[str, Any]) -> Tokenizer:
    length = text.get("context_length", 77)
    if "words" in own:
        return WordTokenizer(tuple(own["words"]), length)
    if text.get("hf_tokenizer_name"):
        return HubTokenizer(f"local-dir:{folder}", None, length)
    return clip_tokenizer(
        context_length=length, vocabulary=text.get("vocab_size", CLIP_VOCABULARY), where=str(folder)
    )
