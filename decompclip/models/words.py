"""A model in one line, as `repr` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from decompclip.models.config import ViTConfig
from decompclip.models.image_only import ImageOnly

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP

_POOLS = {"cls": (), "mean": ("mean pool",), "attention": ("attention pool",)}


def clip_in_words(model: HookedCLIP) -> str:
    """Name, weights, and what the tower is made of."""
    facts = [repr(model.name), _weights(model), *tower_facts(model.cfg)]
    if isinstance(model.text, ImageOnly):
        facts.append("image tower alone")
    return f"{type(model).__name__}({', '.join(facts)})"


def tower_in_words(config: ViTConfig) -> str:
    return f"HookedViT({', '.join(tower_facts(config))})"


def tower_facts(config: ViTConfig) -> list[str]:
    """Activation, sizes, and the pool where it is not the class token."""
    return [
        config.activation,
        _by(config.image_size),
        f"patches {_by(config.patch_size)}",
        f"{config.n_layers} layers x {config.n_heads} heads",
        f"d_embed {config.d_embed}",
        *_POOLS[config.pool],
    ]


def _by(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} x {sizes[1]}"


def _weights(model: HookedCLIP) -> str:
    tag, file = (model.provenance.get(key) for key in ("pretrained", "checkpoint"))
    if file is not None:
        return f"checkpoint {Path(file).name!r}"
    return "in memory" if tag is None else "random weights" if tag == "random" else tag
