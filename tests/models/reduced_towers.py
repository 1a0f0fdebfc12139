"""Any image tower of open_clip's, small: what makes its family stays, what makes it large goes.

Two blocks of three heads on an image of three by two patches. Activation, norms, stem, prefix tokens, positions,
pooling, and the ratios of widths are the configuration's own, since open_clip's and timm's own code builds the tower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import open_clip
import timm
import torch
from open_clip import factory
from timm.models.vitamin import VitCfg
from torch import Tensor, nn

from decompclip.models.spec import build_image_only

DEPTH, HEADS, WIDTH = 2, 3, 48
NARROW = 32
"""Width of the joint space, where it is not that of the stream; as all pools', a multiple of 8 heads."""
GRID = (3, 2)


@contextmanager
def reduced(name: str) -> Iterator[dict[str, Any]]:
    """Whatever open_clip builds of this configuration inside is small; its small configuration is given."""
    config = _reduced_config(name)
    with (
        patch.dict(factory._MODEL_CONFIGS, {name: config}),
        patch.object(timm, "create_model", _small(timm.create_model)),
    ):
        yield config


def reduced_tower(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """open_clip's small image tower in evaluation mode, with no weight trivial."""
    with reduced(name) as config:
        visual = build_image_only(config, why="an image tower alone").visual
    fill(visual, torch.Generator().manual_seed(seed))
    return visual.to(dtype).eval()


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights: gains about one, biases about zero; a mistake in ones and zeros would not show."""

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    for name, x in module.named_parameters():
        if x.ndim < 2:
            gain = name.endswith(("weight", "gamma", "gamma_1", "gamma_2"))
            x.copy_(gain + 0.3 * noise(x))
        else:
            x.copy_(noise(x) * math.prod(x.shape[1:]) ** -0.5)
    for part in module.modules():
        if (
            isinstance(part, nn.BatchNorm2d)
            and part.running_mean is not None
            and part.running_var is not None
        ):
            part.running_mean.copy_(0.3 * noise(part.running_mean))
            part.running_var.copy_(1 + 0.3 * noise(part.running_var).abs())


def features(visual: nn.Module, images: Tensor) -> Tensor:
    """What a source tower puts out, without the tokens that CoCa's gives beside."""
    out = visual(images)
    return out[0] if isinstance(out, tuple) else out


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _reduced_config(name: str) -> dict[str, Any]:
    found = open_clip.get_model_config(name)
    if found is None:
        raise ValueError(f"open_clip has no configuration {name!r}")
    config = deepcopy(found)
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        config["embed_dim"] = NARROW
        return config
    config["embed_dim"] = WIDTH if config["embed_dim"] == vision["width"] else NARROW
    size = [n * vision["patch_size"] for n in GRID]
    vision |= {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "image_size": size}
    return config


def _small(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`timm.create_model` for small transformers."""

    def create_small(name: str, **options: Any) -> nn.Module:
        patch_size = re.search(r"patch(\d+)", name)
        side = int(patch_size.group(1)) if patch_size else 16  # of the stems of convolutions
        options |= {"depth": DEPTH, "img_size": tuple(n * side for n in GRID)}
        if name.startswith("vitamin"):
            options["embed_cfg"] = VitCfg(
                embed_dim=(16, 32, WIDTH), depths=(2, 4, 1), stem_width=16, head_type="1d"
            )
        if name != "vit_base_mci_224":  # whose stem has one width
            options |= {"embed_dim": WIDTH, "num_heads": HEADS}
        return create(name, **options)

    return create_small
