"""Hugging Face transformers' `CLIPModel`, `SiglipModel` and their image towers as open_clip's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decompclip.models.architecture import check_sizes, towers_of
from decompclip.models.checkpoint import read_checkpoint
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import CheckpointError, ModelError, warn_caller
from decompclip.models.fit import check_fit, image_size_words, with_positions_of
from decompclip.models.hf_architecture import (
    WHY,
    activation_of,
    architecture_of,
    completed,
    rename,
    with_prefix,
)
from decompclip.models.json_files import TEXT, check_fields, part, read_json, shown
from decompclip.models.preprocessing import DEFAULTS, preprocess_in
from decompclip.models.spec import Choice, ModelSpec, OpenCLIP, build_image_only, build_open_clip
from decompclip.models.text import (
    WITHOUT_TEXT,
    ImageOnly,
    MissingTextError,
    NoTokenizer,
    Tokenizer,
    TransformersTokenizer,
    clip_tokenizer,
    image_side,
    tokenizer_in,
)
from decompclip.tower.config import pair

Text = bool | Literal["auto"]
"""Whether to have the text side: yes, no, or as far as it can be had, with a warning."""

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """An open_clip model with what a `HookedCLIP` needs beside it."""

    model: OpenCLIP
    tokenizer: Tokenizer
    preprocess: Mapping[str, Any]
    activation: str
    architecture: Mapping[str, Any]
    files: Sequence[Path] = ()
    resized: str | None = None

    def hook(self, provenance: Mapping[str, Any]) -> HookedCLIP:
        """The model, which the result takes over, as a `HookedCLIP`."""
        return ModelSpec(
            name=provenance["name"],
            architecture=self.architecture,
            tokenizer=self.tokenizer,
            preprocess=self.preprocess,
        ).hook(self.model, provenance)


def read_folder(
    folder: Path,
    *,
    text: Text = "auto",
    activation: Choice = "auto",
    image_size: tuple[int, int] | None = None,
    prefix: str | None = None,
) -> ModelParts:
    """The model of a folder that `save_pretrained` wrote, or that the hub's snapshot is.

    Args:
        image_size, prefix: as `load` takes them.

    Raises:
        CheckpointError: no such model there, one of another type, or weights that do not fit its config.json.
        MissingTextError: `text=True`, and it is an image tower alone.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"the folder {folder} holds no config.json (it holds {_listed(folder)}); expected a folder as transformers' "
            "save_pretrained writes, or one with open_clip_config.json; for a file of weights give its own path"
        )
    found = read_json(path)
    _check_deployed_alike(found, folder)
    config = completed(found, source=str(path))
    kind, (text, why) = config["model_type"], _text(config, text)
    files = weights_in(folder)
    state = _read(files, prefix)
    own_size = pair(config["vision_config"]["image_size"])
    if image_size is not None:
        config["vision_config"] |= {"image_size": list(image_size)}
    architecture = architecture_of(config, activation)
    check_sizes(towers_of(architecture, text=text is not False), state, source=str(path))
    if text is False:
        architecture["image_only"] = why
    resize = image_size is not None
    with torch.device("meta"):  # weights that do not fit are refused before memory is taken for a model
        _fitting(_built(architecture), state, config, source=str(folder), resize=resize)
    model = _built(architecture)
    model.load_state_dict(_fitting(model, state, config, source=str(folder), resize=resize))
    preprocess, resized = preprocess_in(folder, kind, own_size), None
    if image_size is not None:
        resized = image_size_words(image_size, rename(state, kind, source=str(folder)))
        if "steps" in preprocess:
            factor = image_size[0] / own_size[0], image_size[1] / own_size[1]
            preprocess |= {"steps": preprocess["steps"].scaled(factor)}
    return ModelParts(
        model=model,
        tokenizer=NoTokenizer(why) if text is False else _tokenizer(folder, config["text_config"], text),
        preprocess=preprocess,
        activation=activation_of(config, activation),
        files=files,
        architecture=architecture,
        resized=resized,
    )


def _built(architecture: Mapping[str, Any]) -> OpenCLIP:
    why = architecture.get("image_only")
    return build_open_clip(architecture) if why is None else build_image_only(architecture, why=why)


def _check_deployed_alike(config: Mapping[str, Any], folder: Path) -> None:
    """Check that nothing in a folder makes transformers run other weights than those that are read here.

    Raises:
        CheckpointError: it names another file, quantises, or lays an adapter over the weights.
    """
    adapter = folder / "adapter_config.json"
    why = next(
        (
            f"{folder / 'config.json'} has {name} ({shown(config[name])})"
            for name in ("transformers_weights", "quantization_config")
            if config.get(name) is not None
        ),
        f"{adapter} lays an adapter over the weights" if adapter.is_file() else None,
    )
    if why is not None:
        raise CheckpointError(
            f"{why}: transformers would run other weights than the plain ones in {folder}; merge them, save the model "
            "with save_pretrained, and give that folder"
        )


def _read(files: Sequence[Path], prefix: str | None) -> dict[str, Tensor]:
    """The weights of all files.

    Raises:
        CheckpointError: one is in two of them.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        found = read_checkpoint(file, prefix=prefix)
        if twice := sorted(state.keys() & found.keys()):
            raise CheckpointError(
                f"{file} holds {len(twice)} weights that are in another shard too ({', '.join(twice[:3])}); copy or download "
                "the folder again"
            )
        state |= found
    return state


def _text(config: Mapping[str, Any], text: Text) -> tuple[Text, str]:
    """Whether to have the text side of what config.json describes, and why not."""
    if not config.get("alone"):
        return text, WITHOUT_TEXT
    if text is True:
        raise MissingTextError(f"the text tower cannot be had: {WHY}")
    return False, WHY


def _fitting(
    model: nn.Module,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    source: str,
    resize: bool = False,
) -> dict[str, Tensor]:
    """The weights under the names of `model`, checked; `resize`: their positions brought to its grid."""
    kind = config["model_type"]
    if config.get("alone"):
        state = with_prefix(state, kind, source=source)
    wanted = rename(state, kind, source=source)
    if isinstance(model, ImageOnly):
        wanted = image_side(wanted)
    if config.get("alone"):  # the scale of logits belongs to the pair of towers
        wanted |= {key: value for key, value in model.state_dict().items() if key.startswith("logit_")}
    wanted = with_positions_of(model, wanted, source=source) if resize else wanted
    check_fit(model, wanted, source=source, name="its config.json")
    return wanted


def _tokenizer(folder: Path, words: Mapping[str, Any], text: Text) -> Tokenizer:
    try:
        return tokenizer_in(
            folder, context_length=words["max_position_embeddings"], vocabulary=words["vocab_size"]
        )
    except ModelError as error:
        if text is True:
            raise
        warn_caller(f"{error}. The model was loaded without a tokenizer")
        return NoTokenizer(str(error), tower=True)


def _listed(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"


def from_transformers(model: nn.Module, *, tokenizer: Any = None, text: bool = True) -> HookedCLIP:
    """Hook a `CLIPModel`, `SiglipModel` or image tower of transformers that is in memory; it is left as it is.

    Args:
        tokenizer: transformers' tokenizer of that model, or a function from a list of texts to token ids; by
            default open_clip's own where the vocabulary is CLIP's.

    Raises:
        CheckpointError: a model of another type.
        UnsupportedTowerError: its image tower is none of those that `HookedViT` runs.
    """
    live: Any = model
    name = type(model).__name__
    source = f"the {name} in memory"
    config = completed(live.config.to_dict(), source=source)
    kind, words = config["model_type"], config["text_config"]
    having, why = _text(config, "auto" if text else False)
    like = next(model.parameters())
    architecture = architecture_of(config)
    if having is False:
        architecture["image_only"] = why
    built = _built(architecture)
    built = built.to(device=like.device, dtype=like.dtype)
    state = {key: x.detach() for key, x in model.state_dict().items()}
    built.load_state_dict(_fitting(built, state, config, source=source))
    if having is False:
        tokenizer = NoTokenizer(why)
    elif tokenizer is None:
        tokenizer = clip_tokenizer(
            context_length=words["max_position_embeddings"], vocabulary=words["vocab_size"], where="the model"
        )
    elif hasattr(tokenizer, "model_max_length"):
        tokenizer = TransformersTokenizer(tokenizer, words["max_position_embeddings"])
    activation = activation_of(config)
    provenance = {
        "name": getattr(live.config, "_name_or_path", "") or f"{name} in memory",
        "pretrained": None,
        "checkpoint": None,
        "sha256": None,
        "activation": activation,
        "activation_source": "config.json",
    }
    return ModelParts(
        model=built,
        tokenizer=tokenizer,
        preprocess=DEFAULTS[kind],
        activation=activation,
        architecture=architecture,
    ).hook(provenance)


def weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder, in order: shards where there is an index.

    Raises:
        CheckpointError: there are none, a shard is missing, or its name is a path to elsewhere.
    """
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise CheckpointError(
            f"the folder {folder} holds no weights (it holds {_listed(folder)}); expected model.safetensors, alone or in shards "
            "with model.safetensors.index.json, or pytorch_model.bin"
        )
    if first.suffix != ".json":
        return [first]
    shards = part(read_json(first), "weight_map", source=str(first))
    check_fields(shards, dict.fromkeys(shards, TEXT), source=f"{first}, weight_map")
    names = sorted(set(shards.values()))
    astray = [name for name in names if Path(name).name != name]
    if astray:
        raise CheckpointError(
            f"{first} names the shard {shown(astray[0])}, a path that leads out of the folder or into another; expected names "
            "of files that lie beside it; refused, nothing was read there"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{first} names {len(names)} shards, of which {len(missing)} are not in the folder "
            f"({', '.join(missing[:3]) or 'none'}); copy or download them again"
        )
    return [folder / name for name in names]
