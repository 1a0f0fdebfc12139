"""Folders with a model of open_clip's, as its `push_to_hf_hub` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decompclip.models.checkpoint import sha256
from decompclip.models.errors import CheckpointError
from decompclip.models.hf_tokenizer import CLIP_VOCABULARY, FolderTokenizer, clip_tokenizer, tokenizer_in
from decompclip.models.json_files import OBJECT, OBJECTS, TEXT, TEXTS, check_fields, part, read_json
from decompclip.models.open_clip_config import check_architecture, preprocess_of
from decompclip.models.spec import ModelSpec
from decompclip.models.tokenizer import Tokenizer, WordTokenizer

CONFIG = "open_clip_config.json"
OWN = "decompclip"
"""Section of the configuration that `save_model` adds: what open_clip has no place for."""
GUARD, GUARDED = "guard.json", "model"
"""Of a folder with a model and its repair: what says so, and the sub-folder with the model."""
WEIGHTS_NAME = "open_clip_model.safetensors"
_WEIGHTS = (
    WEIGHTS_NAME,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "open_clip_pytorch_model.pt",
)
"""In the order in which open_clip looks for them; the last it does not know."""

_CONFIGURATION = (
    CONFIG,
    "config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def is_of_open_clip(folder: Path) -> bool:
    """Whether a folder holds both open_clip's configuration and weights under one of its names.

    Snapshots of the hub often hold the same weights in transformers' layout besides, or those alone.
    """
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in _WEIGHTS)


def configuration_in(folder: Path) -> list[Path]:
    """The files in a folder that say what its weights mean: sizes, preprocessing, tokenizer."""
    return [path for name in _CONFIGURATION if (path := folder / name).is_file()]


def other_weights(folder: Path, read: Sequence[Path]) -> list[str]:
    """Files of weights that lie in a folder and were not read."""
    names = {path.name for path in read}
    suffixes = {".safetensors", ".bin", ".pt", ".pth"}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in suffixes and path.name not in names and path.is_file()
    )


def saved_class_names(folder: Path) -> tuple[str, ...]:
    """The classes that `save_model` wrote with a model; none of other folders.

    Raises:
        CheckpointError: they are no list of texts.
    """
    folder = _of_guard(folder)
    if not (folder / CONFIG).is_file():
        return ()
    return tuple(_own(read_json(folder / CONFIG), folder).get("class_names", ()))


def saved_backdoors(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The backdoors that a folder of `save_model` remembers, asked by its own path or by that of its weights."""
    folder = _of_guard(path.parent if path.name in _WEIGHTS else path)
    if not (folder / CONFIG).is_file():
        return ()
    return tuple(_own(read_json(folder / CONFIG), folder).get("backdoors", ()))


def _of_guard(folder: Path) -> Path:
    """The folder of the model, where a folder holds one with its repair."""
    return folder / GUARDED if (folder / GUARD).is_file() else folder


def weights_of_open_clip(folder: Path) -> Path:
    """The file that open_clip reads, of those that a folder holds."""
    return next(folder / name for name in _WEIGHTS if (folder / name).is_file())


def check_saved(folder: Path, weights: Path) -> None:
    """Check that the weights in a folder are those that `save_model` wrote there, where it did.

    Raises:
        CheckpointError: they are not.
    """
    told = _own(read_json(folder / CONFIG), folder).get("sha256")
    if told and weights.name == WEIGHTS_NAME and told != (found := sha256(weights)):
        raise CheckpointError(
            f"expected {weights} as it was saved, with SHA-256 {told}; received {found}: it was changed or damaged; copy "
            f"the folder again, or, if the weights were replaced on purpose, take {OWN}.sha256 out of {CONFIG}"
        )


def open_clip_folder(folder: Path) -> ModelSpec:
    """A folder's model without its weights.

    Raises:
        CheckpointError: its configuration is none of open_clip's.
    """
    config, source = read_json(folder / CONFIG), str(folder / CONFIG)
    architecture = part(config, "model_cfg", source=source) if "model_cfg" in config else config
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(architecture):
        raise CheckpointError(
            f"{source} lacks embed_dim, vision_cfg or text_cfg; expected what open_clip's push_to_hf_hub writes"
        )
    check_architecture(architecture, source=source)
    own = _own(config, folder)
    return ModelSpec(
        name=str(folder),
        architecture=architecture,
        tokenizer=_tokenizer(folder, architecture["text_cfg"], own),
        preprocess=preprocess_of(part(config, "preprocess_cfg", source=source), source=source),
        templates=own.get("templates", {}),
        class_names=own.get("class_names", ()),
        backdoors=own.get("backdoors", ()),
    )


def _own(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    source = f"{folder / CONFIG}, {OWN}"
    own = part(config, OWN, source=str(folder / CONFIG))
    kinds = {
        "class_names": TEXTS,
        "words": TEXTS,
        "templates": OBJECT,
        "backdoors": OBJECTS,
        "tokenizer": TEXT,
        "sha256": TEXT,
    }
    check_fields(own, kinds, source=source)
    templates = own.get("templates", {})
    check_fields(templates, dict.fromkeys(templates, TEXTS), source=f"{source}, templates")
    return own


def _tokenizer(folder: Path, text: Mapping[str, Any], own: Mapping[str, Any]) -> Tokenizer:
    length = text.get("context_length", 77)
    if "words" in own:
        return WordTokenizer(tuple(own["words"]), length)
    if own.get("tokenizer") == "transformers":
        return tokenizer_in(folder, context_length=length, vocabulary=text.get("vocab_size", CLIP_VOCABULARY))
    if text.get(
        "hf_tokenizer_name"
    ):  # open_clip, too, takes the files in the folder and not those of that name
        options = {"tokenizer_mode": text.get("tokenizer_mode"), **(text.get("tokenizer_kwargs") or {})}
        return FolderTokenizer(folder, length, options)
    return clip_tokenizer(
        context_length=length, vocabulary=text.get("vocab_size", CLIP_VOCABULARY), where=str(folder)
    )
