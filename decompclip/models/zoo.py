"""The bundled small CLIPs: weights and cards inside the package, verified when read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

from decompclip.models.checkpoint import check_fit, read_checkpoint, sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import CheckpointError, UnknownModelError
from decompclip.models.spec import ModelSpec, build_open_clip
from decompclip.models.tokenizer import WordTokenizer

__all__ = ["WEIGHTS", "build_open_clip", "bundled", "card", "load_bundled", "spec_of", "write_bundled"]

WEIGHTS = Path(__file__).parent / "weights"

_REQUIRED = ("name", "architecture", "tokenizer", "preprocess", "templates", "class_names")


def bundled(folder: Path = WEIGHTS) -> tuple[str, ...]:
    """Names of the bundled models."""
    return tuple(
        sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".safetensors").exists())
    )


def card(name: str, folder: Path = WEIGHTS) -> dict[str, Any]:
    """How a bundled model was made and what it scores.

    Raises:
        UnknownModelError: no such model; the bundled ones are listed.
    """
    if name not in bundled(folder):
        raise UnknownModelError(
            f"no bundled model {name!r} in {folder}; there are: {', '.join(bundled(folder)) or 'none'}"
        )
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def spec_of(card: Mapping[str, Any]) -> ModelSpec:
    """The model that a card describes, without its weights."""
    words = card["tokenizer"]
    return ModelSpec(
        name=card["name"],
        architecture=card["architecture"],
        tokenizer=WordTokenizer(tuple(words["words"]), words["context_length"]),
        preprocess=card["preprocess"],
        templates=card["templates"],
        class_names=card["class_names"],
    )


def load_bundled(name: str, *, folder: Path = WEIGHTS) -> HookedCLIP:
    """A bundled model in fp32.

    Raises:
        UnknownModelError: no such model.
        CheckpointError: the weights are not those of the card.
    """
    facts = card(name, folder)
    path = folder / f"{name}.safetensors"
    found = sha256(path)
    if found != facts["sha256"]:
        raise CheckpointError(
            f"the weights of {name!r} are not those of its card: {path} has SHA-256 {found}, expected "
            f"{facts['sha256']}. The file was changed or cut; install decompclip again, or `git checkout -- {path}`"
        )
    spec = spec_of(facts)
    model = spec.build()
    state = read_checkpoint(path)
    check_fit(model, state, source=str(path), name=name)
    model.load_state_dict(state)
    return spec.hook(
        model,
        {
            "pretrained": "bundled",
            "checkpoint": None,
            "sha256": found,
            "activation": spec.activation,
            "activation_source": "card",
        },
    )


def write_bundled(
    model: CLIP | CustomTextCLIP | CoCa,
    card: Mapping[str, Any],
    folder: Path = WEIGHTS,
    *,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Any]:
    """Write a model's weights and its card, each under a temporary name and then renamed.

    Returns:
        The card as written, with `sha256`, `dtype` and `parameters` filled in.

    Raises:
        ValueError: the card lacks a field, names no plain file, or describes another model; or a weight
            does not fit `dtype`.
    """
    missing = [key for key in _REQUIRED if key not in card]
    if missing:
        raise ValueError(f"the card lacks {', '.join(missing)}; needed are {', '.join(_REQUIRED)}")
    name = card["name"]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ValueError(f"expected a name of lower-case letters, digits and hyphens, got {name!r}")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    check_fit(build_open_clip(card["architecture"]), state, source="the model", name=f"{name} (its card)")
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    unfit = [key for key, value in stored.items() if not value.isfinite().all()]
    if unfit:
        raise ValueError(
            f"{len(unfit)} weights are not finite in {dtype}, first {unfit[0]}; pass torch.float32"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.safetensors.partial"
    save_file(stored, partial)
    written = {
        **card,
        "sha256": sha256(partial),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(value.numel() for value in state.values()),
    }
    partial_card = folder / f"{name}.json.partial"
    partial_card.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.safetensors")
    partial_card.replace(folder / f"{name}.json")
    return written
