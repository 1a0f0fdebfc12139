"""Names of models, as people write them."""

from __future__ import annotations

import difflib
import re

import open_clip

from decompclip.models.bundled import bundled
from decompclip.models.errors import UnknownModelError

_SIZES = {"base": "B", "large": "L", "huge": "H", "giant": "g", "so400m": "SO400M"}


def known_name(name: str) -> str:
    """The name of a bundled model or of an architecture of open_clip's, whatever its case, hyphens and underscores.

    Raises:
        UnknownModelError: there is none; the nearest are offered.
    """
    known = [*bundled(), *open_clip.list_models()]
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
    known = open_clip.list_models()
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
