"""open_clip's image towers into `HookedViT` and back: the same weights, the same features."""

from __future__ import annotations

from decompclip.tower.convert.rules import SUPPORTED, WHY_NOT, oddities, refuse
from decompclip.tower.convert.towers import Source, config_of, convert_open_clip

__all__ = ["SUPPORTED", "WHY_NOT", "Source", "config_of", "convert_open_clip", "oddities", "refuse"]
