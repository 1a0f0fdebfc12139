"""ModelSpec: all that is needed to build a CLIP but its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP

from decompclip.models.clip import HookedCLIP, Tokenizer
from decompclip.models.config import Activation
from decompclip.models.convert import oddities, refuse


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model without weights.

    Attributes:
        architecture: open_clip's model configuration: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        preprocess: fields of open_clip's `PreprocessCfg`.
        templates: the model's own prompt templates, by property.
    """

    name: str
    architecture: Mapping[str, Any]
    tokenizer: Tokenizer
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    class_names: Sequence[str] = ()

    @property
    def activation(self) -> Activation:
        return "quick_gelu" if self.architecture.get("quick_gelu") else "gelu"

    def with_activation(self, activation: Activation) -> ModelSpec:
        return replace(self, architecture={**self.architecture, "quick_gelu": activation == "quick_gelu"})

    def build(self, *, seed: int = 0) -> CLIP | CustomTextCLIP:
        """open_clip's model with random weights.

        Raises:
            UnsupportedTowerError: an image tower that `HookedViT` cannot run; nothing is built.
        """
        refuse(self.name, oddities(self.architecture["vision_cfg"]))
        return build_open_clip(self.architecture, seed=seed)

    def hook(self, model: CLIP | CustomTextCLIP, provenance: Mapping[str, Any]) -> HookedCLIP:
        """`model`, which the result takes over, as a `HookedCLIP`."""
        return HookedCLIP.from_open_clip(
            model,
            tokenizer=self.tokenizer,
            preprocess=self.preprocess,
            templates=self.templates,
            class_names=self.class_names,
            provenance={"name": self.name, **provenance, "versions": versions()},
            copy=False,
        )


def build_open_clip(architecture: Mapping[str, Any], *, seed: int = 0) -> CLIP | CustomTextCLIP:
    """open_clip's CLIP of this architecture, its weights drawn from `seed`.

    Args:
        architecture: open_clip's model configuration: `embed_dim`, `vision_cfg`, `text_cfg`, and
            optionally `quick_gelu` and the like.
    """
    options: dict[str, Any] = deepcopy(dict(architecture))
    text_cfg = options["text_cfg"]
    custom = options.pop("custom_text", False) or "hf_model_name" in text_cfg
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_pretrained"] = False  # its weights come with the CLIP's
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CustomTextCLIP(**options) if custom else CLIP(**options)


def versions() -> dict[str, str]:
    """Versions of the packages that a feature depends on."""
    found = {}
    for package in ("decompclip", "torch", "open_clip_torch", "transformer_lens"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # decompclip run from a checkout
            found[package] = "not installed"
    return found
