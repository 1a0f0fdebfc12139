"""All that is needed to build a CLIP but its weights, and open_clip's models built of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from decompclip.models.clip import HookedCLIP
from decompclip.models.text import ImageOnly, Tokenizer
from decompclip.tower.config import Activation, pair
from decompclip.tower.families import oddities, refuse

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
        seed: of the weights.

    Raises:
        OSError, RuntimeError: a text tower of transformers' whose configuration cannot be had.
    """
    options: dict[str, Any] = deepcopy(dict(architecture))
    text = options["text_cfg"]
    custom = options.pop("custom_text", False) or "hf_model_name" in text
    kind = CoCa if "multimodal_cfg" in options else CustomTextCLIP if custom else CLIP
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    return _build(kind, options, seed)


def build_image_only(architecture: Mapping[str, Any], *, why: str, seed: int = 0) -> ImageOnly:
    """The image tower of an open_clip architecture; of the text side nothing is built.

    Args:
        architecture: as `build_open_clip` takes it.
        why: why there is no text tower, and what to do.
        seed: of the weights.
    """
    options = deepcopy({key: architecture[key] for key in _IMAGE_SIDE if key in architecture})
    return ImageOnly.of(_build(CLIP, {**options, "text_cfg": _LEAST_TEXT}, seed), why=why)


# The smallest towers that open_clip builds: they stand where others come, and are thrown away.
_LEAST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
_LEAST_VISION = {"layers": 1, "width": 1, "head_width": 1, "image_size": 1, "patch_size": 1}
_IMAGE_SIDE = (
    "embed_dim",
    "vision_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)


def _build(kind: Any, options: dict[str, Any], seed: int) -> Any:
    vision = options["vision_cfg"]
    if "timm_model_name" in vision:  # no tower's own weights: they come with the CLIP's
        vision["timm_model_pretrained"] = False
    siglip = vision.pop("siglip_tower", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**(options if siglip is None else options | {"vision_cfg": dict(_LEAST_VISION)}))
        if siglip is not None:
            model.visual = _siglip_tower(vision["image_size"], siglip)
        return model


def _siglip_tower(image_size: Any, shape: Mapping[str, Any]) -> TimmModel:
    """SigLIP's image tower of any shape, where open_clip's configurations know fixed names of timm's only.

    Args:
        image_size: height and width, or one number for both.
        shape: what `VisionTransformer` calls `patch_size`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio` and `act_layer`,
            and `ln_eps`.
    """
    with torch.device("meta"):
        tower = TimmModel("vit_base_patch16_siglip_224", embed_dim=0, pool="map", proj="none")
    options = dict(shape)
    tower.trunk = VisionTransformer(
        img_size=pair(image_size),
        norm_layer=partial(nn.LayerNorm, eps=options.pop("ln_eps")),
        num_classes=0,
        class_token=False,
        global_pool="map",
        **options,
    )
    tower.image_size = pair(image_size)
    return tower


FEATURE = ("decompclip", "torch", "open_clip_torch", "transformer_lens")
"""Packages that a feature depends on."""


def versions(packages: Sequence[str] = FEATURE) -> dict[str, str]:
    """Of packages; of those that are not installed it says so."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # decompclip run from a checkout
            found[package] = "not installed"
    return found
