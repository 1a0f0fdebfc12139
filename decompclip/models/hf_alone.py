"""transformers' image towers without a text tower, brought to the form of whole models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from decompclip.models.errors import CheckpointError

ALONE: Mapping[str, str] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""By `model_type`: the whole model's."""

WHY = "what it was loaded from is transformers' image tower alone; load a whole CLIPModel or SiglipModel"


def in_whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as that of a whole model, marked `alone` where it was of an image tower."""
    kind = str(config.get("model_type"))
    if kind not in ALONE:
        return dict(config)
    text = {"projection_size": config.get("hidden_size", 768)}  # of a text tower that would fit
    if "hidden_act" in config:
        text["hidden_act"] = config["hidden_act"]
    return {
        "model_type": ALONE[kind],
        "projection_dim": config.get("projection_dim"),
        "vision_config": dict(config),
        "text_config": text,
        "alone": True,
    }


def with_prefix(state: Mapping[str, Tensor], kind: str, *, source: str) -> dict[str, Tensor]:
    """The weights under a whole model's names; newer versions of transformers leave `vision_model.` out.

    Raises:
        CheckpointError: a CLIP's tower without the projection, whose features lie in no joint space.
    """
    if kind == "clip" and "visual_projection.weight" not in state:
        raise CheckpointError(
            f"expected an image tower with its projection; received {source}, a CLIPVisionModel, whose features do not lie "
            "in the space that images and texts share; take CLIPVisionModelWithProjection or CLIPModel"
        )
    stays = ("vision_model.", "visual_projection.")
    return {key if key.startswith(stays) else f"vision_model.{key}": value for key, value in state.items()}
