"""Names of models, as people write them, and the cards of the bundled ones. Nothing heavy is imported: commands ask before they load."""

from __future__ import annotations

import difflib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decompclip.models.errors import UnknownModelError

SUFFIX = ".difference"
"""Of weights that are stored as a difference from another model's."""

WEIGHTS = Path(__file__).parent / "weights"


def bundled(folder: Path = WEIGHTS) -> tuple[str, ...]:
    """Names of the bundled models.

    Args:
        folder: of the weights and cards; by default the package's own.
    """
    return tuple(
        sorted(
            path.stem
            for path in folder.glob("*.json")
            if any(path.with_suffix(suffix).exists() for suffix in (".safetensors", SUFFIX))
        )
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


def architectures() -> list[str]:
    """The names that `open_clip.list_models()` gives, read from its files as long as it is not imported."""
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].list_models()
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    return [path.stem for path in Path(spec.origin).with_name("model_configs").glob("*.json")]


_SIZES = {"base": "B", "large": "L", "huge": "H", "giant": "g", "so400m": "SO400M"}


def known_name(name: str) -> str:
    """The name of a bundled model or of an architecture of open_clip's, whatever its case, hyphens and underscores.

    Raises:
        UnknownModelError: there is none; the nearest are offered.
    """
    known = [*bundled(), *architectures()]
    if name in known:
        return name
    same = [each for each in known if _key(each) == _key(name)]
    if len(same) == 1:
        return same[0]
    like = _of_hub(name)
    near = same or like or difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if not near:  # a difference of case alone counts as one of every letter
        keys = {_key(each): each for each in known}
        near = [keys[key] for key in difflib.get_close_matches(_key(name), keys, n=4, cutoff=0.5)]
    tag = ", pretrained='openai'" if like and name.startswith("openai/") else ""
    hub = f" (that is a repository of the hub's: `load({like[0]!r}{tag})`)" if like else ""
    raise UnknownModelError(
        f"there is no model {name!r}{hub}; nearest: {', '.join(map(repr, near)) or 'none'}; `decompclip.bundled()` "
        "and `open_clip.list_models()` list all. Weights from elsewhere: download them, and pass the name of their "
        "architecture with checkpoint=PATH, or their folder"
    )


def _key(name: str) -> str:
    return re.sub(r"[-_ /.]+", "", name.casefold())


def _of_hub(name: str) -> list[str]:
    """open_clip's architectures that a repository's name speaks of, the nearest first."""
    if "/" not in name:
        return []
    words = name.rsplit("/", maxsplit=1)[-1].lower()
    known = architectures()
    clip = re.search(r"clip-vit-(base|large|huge|giant)-patch(\d+)(?:-(\d+))?", words)
    siglip = re.search(r"siglip(2?)-(base|large|so400m)-patch(\d+)-(\d+)", words)
    wanted: list[str] = []
    if clip:
        plain = f"ViT-{_SIZES[clip[1]]}-{clip[2]}"
        wanted = [f"{plain}-{clip[3]}", plain] if clip[3] else [plain]
    elif siglip:
        plain = f"ViT-{_SIZES[siglip[2]]}-{siglip[3]}-SigLIP{siglip[1]}"
        wanted = [f"{plain}-{siglip[4]}", plain]
    else:  # as in laion/CLIP-ViT-H-14-laion2B-s32B-b79K
        wanted = sorted(
            (each for each in known if f"-{each.lower()}-" in f"-{words}-"), key=len, reverse=True
        )
    return [each for each in wanted if each in known]
