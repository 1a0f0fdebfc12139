"""SigLIP's image tower of any shape, where open_clip's configurations know fixed names of timm's only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
from torch import nn

LEAST: Mapping[str, Any] = {"layers": 1, "width": 1, "head_width": 1, "image_size": 1, "patch_size": 1}
"""The smallest tower that open_clip builds: it stands where this one comes, and is thrown away."""


def siglip_tower(image_size: Any, shape: Mapping[str, Any]) -> TimmModel:
    """open_clip's wrapper around a timm trunk with random weights, drawn from torch's generator.

    Args:
        shape: what `VisionTransformer` calls `patch_size`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio` and `act_layer`,
            and `ln_eps`.
    """
    with torch.device("meta"):
        tower = TimmModel("vit_base_patch16_siglip_224", embed_dim=0, pool="map", proj="none")
    options = dict(shape)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    tower.trunk = VisionTransformer(
        img_size=size,
        norm_layer=partial(nn.LayerNorm, eps=options.pop("ln_eps")),
        num_classes=0,
        class_token=False,
        global_pool="map",
        **options,
    )
    tower.image_size = size
    return tower
