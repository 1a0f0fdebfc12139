"""open_clip's configuration of a model, out of a folder from strangers: known fields only, and no code."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import open_clip
import timm
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from decompclip.models.errors import CheckpointError
from decompclip.models.json_files import (
    EPSILON,
    FLAG,
    MEAN,
    NUMBER,
    OBJECT,
    POSITIVE,
    SIDES,
    SIZE,
    STD,
    TEXT,
    WHOLE,
    Kind,
    check_fields,
    may_be_null,
    one_of,
    part,
    shown,
)

_MODEL: Mapping[str, Kind] = {
    "embed_dim": SIZE,
    "vision_cfg": OBJECT,
    "text_cfg": OBJECT,
    "multimodal_cfg": OBJECT,
    "quick_gelu": FLAG,
    "custom_text": FLAG,
    "init_logit_scale": NUMBER,
    "init_logit_bias": may_be_null(NUMBER),
    "nonscalar_logit_scale": FLAG,
    "output_dict": FLAG,
    "pad_id": WHOLE,
    "image_only": TEXT,  # why, where `save_model` wrote an image tower alone
}
_SIGLIP: Mapping[str, Kind] = {
    **dict.fromkeys(("embed_dim", "depth", "num_heads"), SIZE),
    "patch_size": SIDES,
    "mlp_ratio": POSITIVE,
    "act_layer": one_of("gelu", "gelu_tanh"),
    "ln_eps": EPSILON,
}
"""Of `siglip_tower`, which `save_model` writes."""
_NAMED: Mapping[str, Kind] = {
    "image_size": SIDES,
    "patch_size": SIDES,
    # a ResNet's are four; it is refused by that
    "layers": Kind(
        "a whole number above 0",
        lambda x: SIZE.holds(x) or (isinstance(x, list) and len(x) == 4 and all(map(SIZE.holds, x))),
    ),
    "pad_id": WHOLE,
    "eos_id": WHOLE,
    "mlp_ratio": POSITIVE,
}
_KWARGS: Mapping[str, Mapping[str, Kind]] = {
    "norm_kwargs": {"eps": EPSILON},
    "act_kwargs": {"approximate": one_of("none", "tanh")},
    # what open_clip's own classes take of it; the rest would go on to transformers
    "tokenizer_kwargs": {"clean": TEXT, "strip_sep_token": FLAG, "language": may_be_null(TEXT)},
}
PREPROCESS: Mapping[str, Kind] = {
    "size": SIDES,
    "mode": one_of("RGB"),
    "mean": MEAN,
    "std": STD,
    "interpolation": one_of("bicubic", "bilinear", "random"),
    "resize_mode": one_of("shortest", "longest", "squash"),
    "fill_color": WHOLE,
    "steps": OBJECT,
}
_STEPS: Mapping[str, Kind] = {
    "resize": may_be_null(SIDES),
    "crop": may_be_null(
        Kind("two sides in pixels", lambda value: SIDES.holds(value) and isinstance(value, list))
    ),
    "resample": Kind("2 or 3", lambda value: SIZE.holds(value) and value in (2, 3)),
}
"""Of `Preprocessing`, which `save_model` writes."""


def check_architecture(architecture: Mapping[str, Any], *, source: str) -> None:
    """Check a model's configuration before anything is made of it.

    Fields are those of the installed open_clip's own; none of them reaches another package's `from_pretrained`. Towers
    of timm's and transformers' are such as open_clip's configurations name: no path, no place on the hub.

    Raises:
        CheckpointError: a field that open_clip does not have, of another type, or a tower from elsewhere.
    """
    check_fields(architecture, _MODEL, source=source, closed=True)
    for name, kind in (
        ("vision_cfg", CLIPVisionCfg),
        ("text_cfg", CLIPTextCfg),
        ("multimodal_cfg", MultimodalCfg),
    ):
        section = part(architecture, name, source=source)
        where = f"{source}, {name}"
        kinds = _kinds_of(kind)
        if section.get("timm_model_name") or isinstance(section.get("layers"), list):  # of which sizes follow
            kinds = {key: may_be_null(each) for key, each in kinds.items()}
        if name == "vision_cfg" and "siglip_tower" in section:
            tower = part(section, "siglip_tower", source=where)
            check_fields(tower, _SIGLIP, source=f"{where}, siglip_tower", closed=True)
            if lacking := sorted(set(_SIGLIP) - set(tower)):
                raise CheckpointError(f"{where}, siglip_tower lacks {', '.join(lacking)}")
            kinds = {**kinds, "siglip_tower": OBJECT}
        check_fields(section, kinds, source=where, closed=True)
        for key, known in _KWARGS.items():
            check_fields(part(section, key, source=where), known, source=f"{where}, {key}", closed=True)
    vision, text = architecture.get("vision_cfg", {}), architecture.get("text_cfg", {})
    _check_known(vision.get("timm_model_name"), timm.is_model, "a model of timm's", f"{source}, vision_cfg")
    _check_known(
        text.get("hf_model_name"), _is_text_tower, "a text tower of open_clip's", f"{source}, text_cfg"
    )


def preprocess_of(found: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The fields of a `preprocess_cfg` that decide how images are prepared; as in open_clip, others are left.

    Raises:
        CheckpointError: one of them cannot be followed.
    """
    chosen = {key: value for key, value in found.items() if key in PREPROCESS and value is not None}
    check_fields(chosen, PREPROCESS, source=f"{source}, preprocess_cfg")
    check_fields(chosen.get("steps", {}), _STEPS, source=f"{source}, preprocess_cfg, steps", closed=True)
    return {key: value for key, value in chosen.items() if key != "size"}


def _check_known(name: str | None, known: Any, what: str, where: str) -> None:
    if name and (":" in name or not known(name)):
        raise CheckpointError(
            f"{where}: expected {what}, by the name that it has there; received {shown(name)}; paths and places on the hub "
            "are not followed, since what lies there may carry code"
        )


@cache
def _text_towers() -> frozenset[str]:
    configs: list[Any] = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    names = {config["text_cfg"].get("hf_model_name") for config in configs} - {None}
    return frozenset({*names, *(f"FacebookAI/{name}" for name in names if "/" not in name)})


def _is_text_tower(name: str) -> bool:
    return name in _text_towers()


@cache
def _kinds_of(config: Any) -> dict[str, Kind]:
    """The fields of a configuration of open_clip's and what they hold, by its annotations."""
    hints = get_type_hints(config)
    found = {}
    for field in fields(config):
        kind = _NAMED.get(field.name) or _kind_of(hints[field.name])
        optional = type(None) in get_args(hints[field.name]) or field.default is None
        found[field.name] = may_be_null(kind) if optional else kind
    return found


def _kind_of(annotation: Any) -> Kind:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    kinds = {int: SIZE, float: NUMBER, bool: FLAG, str: TEXT, dict: OBJECT}
    return kinds[get_origin(annotation) or annotation]
