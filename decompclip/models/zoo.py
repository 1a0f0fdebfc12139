"""The bundled small CLIPs: their weights, each with a card that says what it is and what it can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).parent / "weights"
"""Where the bundled models lie: `NAME.safetensors` and `NAME.json`."""


def bundled(folder: Path = WEIGHTS) -> tuple[str, ...]:
    """Names of the bundled models, sorted."""
    return tuple(sorted(path.stem for path in folder.glob("*.json")))


def card(name: str, folder: Path = WEIGHTS) -> dict[str, Any]:
    """A bundled model's card: architecture, tokenizer, preprocessing, training, accuracies, backdoor, hash.

    Raises:
        ValueError: no such model is bundled.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"expected a bundled model among {', '.join(bundled(folder))}; received {name!r}")
    return json.loads(path.read_text(encoding="utf-8"))


def build_open_clip(architecture: Mapping[str, Any]) -> CLIP:
    """open_clip's model of a card's `architecture`, with its own random weights."""
    return CLIP(
        **{key: dict(value) if isinstance(value, Mapping) else value for key, value in architecture.items()}
    )


def write_bundled(
    model: CLIP, card: Mapping[str, Any], folder: Path = WEIGHTS, *, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Write weights and card under `card["name"]`, each to a temporary name first; returns the card written.

    Args:
        dtype: of the stored weights; they are read back as fp32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, card_path = folder / f"{card['name']}.safetensors", folder / f"{card['name']}.json"
    partial = path.with_suffix(".partial")
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_file(state, partial)
    written = {**card, "dtype": str(dtype).removeprefix("torch."), "sha256": _sha256(partial)}
    partial.replace(path)
    partial.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(card_path)
    return written


def load_bundled(name: str, folder: Path = WEIGHTS) -> tuple[CLIP, dict[str, Any]]:
    """A bundled model as open_clip's `CLIP` in fp32, with its card.

    Raises:
        ValueError: no such model is bundled, or its weights are not those that the card was written for.
        FileNotFoundError: the card stands without weights.
    """
    facts = card(name, folder)
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the weights of {name!r} in {path}; the file is missing; reinstall decompclip"
        )
    if (found := _sha256(path)) != facts["sha256"]:
        raise ValueError(
            f"expected {path.name} with the SHA-256 {facts['sha256']}; received {found}; the file was changed or "
            "is incomplete: reinstall decompclip"
        )
    model = build_open_clip(facts["architecture"])
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval(), facts


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
