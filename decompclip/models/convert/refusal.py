"""Which image towers have no exact decomposition here, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from decompclip.models.tower_errors import UnsupportedTowerError

SUPPORTED = "every transformer tower of open_clip's: native ViT, CLIPA, CoCa, SigLIP, MobileCLIP-B/-L, ViTamin, EVA, PE"

WHY_NOT = {
    "resnet": "it is a ResNet: it has no attention heads that write to a residual stream",
    "conv": "it is a convolutional network: it has no attention heads that write to a residual stream of tokens",
    "windows": "it is a Swin Transformer: its tokens are merged from stage to stage, so that no one stream of tokens "
    "goes through it",
    "foreign": "it is no image tower of open_clip's",
    "pool": "its feature is pooled in a way that has no frozen linear map",
    "block": "its blocks hold norms, gates or scales that no tower of open_clip's has",
    "activation": "its MLPs use an activation that is not known",
    "norm": "its norms are no LayerNorms of one epsilon",
}

# timm's modules of model definitions.
TRANSFORMERS = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "eva",
    "vitamin",
)
WINDOWS = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


def refuse(name: str, oddities: Sequence[str]) -> None:
    """Raise `UnsupportedTowerError` where a tower has any of `WHY_NOT`'s oddities."""
    if oddities:
        reasons = "; ".join(WHY_NOT[oddity] for oddity in oddities)
        raise UnsupportedTowerError(
            f"the image tower {name!r} is not supported: {reasons}. Supported: {SUPPORTED}"
        )


def oddities(vision_cfg: Mapping[str, Any]) -> list[str]:
    """What in open_clip's `vision_cfg` rules out a decomposition, before anything is built."""
    if name := vision_cfg.get("timm_model_name"):
        if timm.models.is_model_in_modules(name, TRANSFORMERS):
            return []
        return ["windows" if timm.models.is_model_in_modules(name, WINDOWS) else "conv"]
    return ["resnet"] if isinstance(vision_cfg.get("layers"), list | tuple) else []


def one_epsilon(name: str, module: nn.Module, skip: tuple[str, ...] = ()) -> float:
    """The epsilon that all LayerNorms of a tower share, but for those under the prefixes to skip.

    Raises:
        UnsupportedTowerError: they have several, or there is none.
    """
    found = {
        m.eps
        for path, m in module.named_modules()
        if isinstance(m, nn.LayerNorm) and not path.startswith(skip or ("\0",))
    }
    if len(found) != 1:
        refuse(name, ["norm"])
    return found.pop()
