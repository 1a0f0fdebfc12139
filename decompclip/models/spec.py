"""ModelSpec: all that is needed to build a CLIP but its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP

from decompclip.models.clip import HookedCLIP
from decompclip.models.siglip_tower import LEAST, siglip_tower
from decompclip.models.text import ImageOnly, Tokenizer, build_image_only
from decompclip.tower.config import Activation
from decompclip.tower.convert import oddities, refuse

Choice = Literal["auto", "gelu", "quick_gelu"]
"""The activation that a user asks for; "auto" leaves it to what the weights were trained with."""

OpenCLIP = CLIP | CustomTextCLIP | CoCa | ImageOnly


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model without weights.

    Attributes:
        architecture: open_clip's model configuration: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        preprocess: fields of open_clip's `PreprocessCfg`.
        templates: the model's own prompt templates, by property.
        backdoors: as `HookedCLIP.backdoors`.
    """

    name: str
    architecture: Mapping[str, Any]
    tokenizer: Tokenizer
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    backdoors: Sequence[Mapping[str, Any]] = ()

    @property
    def activation(self) -> Activation:
        return "quick_gelu" if self.architecture.get("quick_gelu") else "gelu"

    def with_activation(self, activation: Activation) -> ModelSpec:
        return replace(self, architecture={**self.architecture, "quick_gelu": activation == "quick_gelu"})

    def build(self, *, seed: int = 0) -> CLIP | CustomTextCLIP | CoCa:
        """open_clip's model with random weights.

        Raises:
            UnsupportedTowerError: an image tower that `HookedViT` cannot run; nothing is built.
        """
        refuse(self.name, oddities(self.architecture["vision_cfg"]))
        return build_open_clip(self.architecture, seed=seed)

    def build_image_only(self, why: str, *, seed: int = 0) -> ImageOnly:
        """The image tower with random weights, and in place of the text tower an answer that tells `why`.

        Raises:
            UnsupportedTowerError: an image tower that `HookedViT` cannot run; nothing is built.
        """
        refuse(self.name, oddities(self.architecture["vision_cfg"]))
        return build_image_only(self.architecture, why=why, seed=seed)

    def hook(self, model: OpenCLIP, provenance: Mapping[str, Any]) -> HookedCLIP:
        """`model`, which the result takes over, as a `HookedCLIP`."""
        hooked = HookedCLIP.from_open_clip(
            model,
            tokenizer=self.tokenizer,
            preprocess=self.preprocess,
            templates=self.templates,
            class_names=self.class_names,
            provenance={"name": self.name, **provenance, "versions": versions()},
            copy=False,
        )
        hooked.architecture = self.architecture
        hooked.backdoors = tuple(self.backdoors)
        if "activation" in provenance:  # a timm tower's own, which no configuration of open_clip's tells
            hooked.provenance["activation"] = hooked.cfg.activation
        return hooked


def build_open_clip(architecture: Mapping[str, Any], *, seed: int = 0) -> CLIP | CustomTextCLIP | CoCa:
    """open_clip's CLIP of this architecture, its weights drawn from `seed`; nothing is downloaded but, for a text
    tower of transformers', its configuration.

    Args:
        architecture: open_clip's model configuration: `embed_dim`, `vision_cfg`, `text_cfg`, and
            optionally `quick_gelu` and the like; `vision_cfg` may hold a `siglip_tower` instead of sizes.

    Raises:
        OSError, RuntimeError: a text tower of transformers' whose configuration cannot be had.
    """
    options: dict[str, Any] = deepcopy(dict(architecture))
    vision_cfg, text_cfg = options["vision_cfg"], options["text_cfg"]
    custom = options.pop("custom_text", False) or "hf_model_name" in text_cfg
    kind = CoCa if "multimodal_cfg" in options else CustomTextCLIP if custom else CLIP
    # no tower's own weights: they come with the CLIP's
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_pretrained"] = False
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    siglip = vision_cfg.pop("siglip_tower", None)
    if siglip is not None:
        options["vision_cfg"] = dict(LEAST)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**options)
        if siglip is not None:
            model.visual = siglip_tower(vision_cfg["image_size"], siglip)
        return model


def versions() -> dict[str, str]:
    """Versions of the packages that a feature depends on."""
    found = {}
    for package in ("decompclip", "torch", "open_clip_torch", "transformer_lens"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # decompclip run from a checkout
            found[package] = "not installed"
    return found
