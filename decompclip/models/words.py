"""A model in one line, as `repr` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from decompclip.models.config import tower_facts
from decompclip.models.image_only import ImageOnly

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


def clip_in_words(model: HookedCLIP) -> str:
    """Name, weights, and what the tower is made of."""
    facts = [repr(model.name), _weights(model), *tower_facts(model.cfg)]
    if isinstance(model.text, ImageOnly):
        facts.append("image tower alone")
    return f"{type(model).__name__}({', '.join(facts)})"


def _weights(model: HookedCLIP) -> str:
    tag, file = (model.provenance.get(key) for key in ("pretrained", "checkpoint"))
    if file is not None:
        return f"checkpoint {Path(file).name!r}"
    return "in memory" if tag is None else "random weights" if tag == "random" else tag
