"""A CLIP of which the image tower alone could be had, or was wanted."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NoReturn

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from decompclip.models.errors import ModelError
from decompclip.models.siglip_tower import LEAST, siglip_tower

# The smallest text tower that open_clip builds; it is thrown away.
_LEAST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
_IMAGE_SIDE = (
    "embed_dim",
    "vision_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)


WITHOUT_TEXT = "it was loaded with text=False; load it without that option"


class MissingTextError(ModelError):
    """Text was asked of a model whose text tower or tokenizer is not there; the message says why."""


class ImageOnly(nn.Module):
    """Stands for an open_clip model without its text side; a `HookedCLIP` keeps it, less `visual`, as its `text`.

    Attributes:
        why: why there is no text tower, and what to do.
    """

    context_length = 0
    vocab_size = 0

    def __init__(
        self, visual: nn.Module, logit_scale: Tensor, logit_bias: Tensor | None = None, *, why: str
    ) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(logit_scale)
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias)
        self.why = why

    def encode_text(self, text: Any = None, normalize: bool = False) -> NoReturn:
        """Explain.

        Raises:
            MissingTextError: always.
        """
        raise MissingTextError(f"this model has no text tower: {self.why}")


class NoTokenizer:
    """Stands for a tokenizer that is not there; `tower`: whether the text tower is, so that token ids would do."""

    def __init__(self, why: str, *, tower: bool = False) -> None:
        self.why = why
        self.tower = tower

    def __call__(self, texts: list[str]) -> NoReturn:
        """Explain.

        Raises:
            MissingTextError: always.
        """
        if not self.tower:
            raise MissingTextError(f"this model has no text tower: {self.why}")
        raise MissingTextError(
            f"this model has no tokenizer: {self.why}; set `model.tokenizer` to a function from a list of texts to "
            "token ids, or pass token ids in place of texts"
        )


def build_image_only(architecture: Mapping[str, Any], *, why: str, seed: int = 0) -> ImageOnly:
    """The image tower of an open_clip architecture with random weights; of the text side nothing is built."""
    options = deepcopy({key: architecture[key] for key in _IMAGE_SIDE if key in architecture})
    vision = options["vision_cfg"]
    vision["timm_model_pretrained"] = False
    siglip = vision.pop("siglip_tower", None)
    if siglip is not None:
        options["vision_cfg"] = dict(LEAST)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = CLIP(**options, text_cfg=_LEAST_TEXT)  # pyright: ignore[reportArgumentType]
        if siglip is not None:
            model.visual = siglip_tower(vision["image_size"], siglip)
    bias = model.logit_bias
    return ImageOnly(
        model.visual, model.logit_scale.detach(), None if bias is None else bias.detach(), why=why
    )


def image_side(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that an `ImageOnly` takes."""
    return {
        key: value
        for key, value in state.items()
        if key.split(".")[0] in {"visual", "logit_scale", "logit_bias"}
    }
