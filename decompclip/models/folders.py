"""Folders with a model of open_clip's, as its `push_to_hf_hub` writes them: read, and written so that open_clip reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

from decompclip.files import atomic_folder, write_json, write_text
from decompclip.models.architecture import proved
from decompclip.models.checkpoint import sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import CheckpointError, warn_caller
from decompclip.models.json_files import (
    OBJECT,
    OBJECTS,
    TEXT,
    TEXTS,
    check_architecture,
    check_fields,
    part,
    preprocess_of,
    read_json,
)
from decompclip.models.spec import ModelSpec
from decompclip.models.text import (
    CLIP_VOCABULARY,
    TOKENIZER,
    FolderTokenizer,
    HubTokenizer,
    MissingTextError,
    NoTokenizer,
    Tokenizer,
    TransformersTokenizer,
    WordTokenizer,
    clip_tokenizer,
    tokenizer_in,
    vocabulary_files,
)

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
    return _saved(folder, "class_names")


def saved_backdoors(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The backdoors that a folder of `save_model` remembers, asked by its own path or by that of its weights."""
    return _saved(path.parent if path.name in _WEIGHTS else path, "backdoors")


def _saved(folder: Path, key: str) -> tuple[Any, ...]:
    folder = _of_guard(folder)
    return tuple(_own(read_json(folder / CONFIG), folder).get(key, ())) if (folder / CONFIG).is_file() else ()


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
    saved = _own(read_json(folder / CONFIG), folder).get("sha256")
    if saved and weights.name == WEIGHTS_NAME and saved != (found := sha256(weights)):
        raise CheckpointError(
            f"expected {weights} as it was saved, with SHA-256 {saved}; received {found}: it was changed or damaged; copy "
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
    if text.get("hf_tokenizer_name"):
        # open_clip, too, takes the files in the folder and not those of that name
        options = {"tokenizer_mode": text.get("tokenizer_mode"), **(text.get("tokenizer_kwargs") or {})}
        return FolderTokenizer(folder, length, options)
    return clip_tokenizer(
        context_length=length, vocabulary=text.get("vocab_size", CLIP_VOCABULARY), where=str(folder)
    )


def save_model(model: HookedCLIP, folder: str | Path) -> Path:
    """Write weights and configuration in open_clip's form, the configuration last; returns the folder.

    `decompclip.load(folder)` gives the same model: weights bit for bit, image size, activation, preprocessing, templates and
    class names. open_clip reads the folder too (`local-dir:FOLDER`), a vocabulary of the model's own included, with
    transformers' help; but not SigLIP models of transformers', image towers alone, or a processor's own steps.

    Args:
        model: the model to write.
        folder: where to; made if need be.

    Returns:
        The folder.

    Raises:
        ValueError: no configuration of open_clip's builds the model again.
        OSError: the folder cannot be written to.
    """
    architecture = check_saveable(model)
    folder = Path(folder)
    own: dict[str, Any] = {
        "class_names": list(model.class_names),
        # templates that are functions have no words
        "templates": {k: [t for t in v if isinstance(t, str)] for k, v in model.templates.items()},
        "backdoors": [dict(backdoor) for backdoor in model.backdoors],
        "provenance": json.loads(json.dumps(model.provenance, default=str)),
    }
    if isinstance(model.tokenizer, WordTokenizer):
        own["words"] = list(model.tokenizer.words)
        # open_clip asks transformers for the tokenizer of a folder whose configuration names any
        architecture["text_cfg"] = {**architecture["text_cfg"], "hf_tokenizer_name": TOKENIZER}
    elif isinstance(model.tokenizer, TransformersTokenizer):
        own["tokenizer"] = "transformers"
    elif isinstance(model.tokenizer, HubTokenizer):
        try:
            model.tokenizer.opened()
        except MissingTextError as error:
            warn_caller(f"{folder} is written without its tokenizer: {error}")
    elif not isinstance(model.tokenizer, SimpleTokenizer | NoTokenizer):
        warn_caller(
            f"the tokenizer of {model.name!r} is a {type(model.tokenizer).__name__}, which no file can hold; pass tokenizer= "
            f"when you load {folder}"
        )
    config = {
        "model_cfg": architecture,
        "preprocess_cfg": asdict(model.preprocess_cfg),
        OWN: own,
    }
    state = {
        key: x.detach().cpu().clone().contiguous() for key, x in model.source_like().state_dict().items()
    }
    with atomic_folder(folder, CONFIG) as partial:
        if isinstance(model.tokenizer, WordTokenizer):
            for name, text in vocabulary_files(model.tokenizer).items():
                write_text(partial / name, text)
        elif hasattr(inner := getattr(model.tokenizer, "tokenizer", None), "save_pretrained"):
            inner.save_pretrained(partial)  # pyright: ignore[reportOptionalMemberAccess]
        save_file(state, partial / WEIGHTS_NAME)
        own["sha256"] = sha256(partial / WEIGHTS_NAME)
        write_json(partial / CONFIG, config)
    return folder


def check_saveable(model: HookedCLIP) -> dict[str, Any]:
    """The configuration that builds the model again: asked before a training, not after it.

    Raises:
        ValueError: there is none.
    """
    return proved(model.source_like(), model.architecture, name=model.name)
