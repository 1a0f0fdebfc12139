"""JSON out of folders from strangers: known fields of the types that they are read as, or an error; open_clip's among them."""

from __future__ import annotations

import json
import math
import stat
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import open_clip
import timm
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from decompclip.models.errors import CheckpointError

LARGEST = 64 << 20
"""Bytes of a JSON that are read; a tokenizer's of a million tokens has less."""

MOST = 2**31 - 1
"""No size is larger."""

LONGEST_SIDE = 1 << 14
"""Pixels; more are no image that a tower takes."""


@dataclass(frozen=True)
class Kind:
    """What a field may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_size(value: Any) -> bool:
    return is_whole(value) and value > 0


def is_side(value: Any) -> bool:
    """Whether it is a side of an image or patch in pixels."""
    return _is_size(value) and value <= LONGEST_SIDE


def _is_list(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and length in (None, len(value)) and all(map(holds, value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
NUMBER = Kind("a finite number", is_number)
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
EPSILON = Kind("a number above 0 and below 1", lambda value: is_number(value) and 0 < value < 1)
WHOLE = Kind("a whole number from 0", is_whole)
SIZE = Kind("a whole number above 0", _is_size)
SIDES = Kind(
    f"a whole number from 1 to {LONGEST_SIDE}, or two of them",
    lambda value: is_side(value) or _is_list(value, is_side, 2),
)
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
TEXTS = Kind("a list of texts", lambda value: _is_list(value, TEXT.holds))
OBJECTS = Kind("a list of objects", lambda value: _is_list(value, OBJECT.holds))
MEAN = Kind("three finite numbers", lambda value: _is_list(value, is_number, 3))
STD = Kind(
    "three numbers from 1e-6 to 1e6",
    lambda value: _is_list(value, lambda x: is_number(x) and 1e-6 <= x <= 1e6, 3),
)


def between(low: float, high: float) -> Kind:
    return Kind(f"a number from {low:g} to {high:g}", lambda value: is_number(value) and low <= value <= high)


def either(*kinds: Kind) -> Kind:
    return Kind(
        ", or ".join(kind.words for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds)
    )


def may_be_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: there is no regular file, it cannot be read or holds none, or what no writer of configurations writes: NaN, text that is no Unicode,
            thousands of levels, more than 64 MiB.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a FIFO would be waited for without end
            raise ValueError("it is a folder, FIFO or device, expected a regular file")
        if about.st_size > LARGEST:
            raise ValueError(f"it has {about.st_size:,} bytes; expected {LARGEST:,} at most")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
    except RecursionError as error:
        raise CheckpointError(f"{path} is no JSON of a model: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}; copy or download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds {type(found).__name__}, expected an object; copy or download it again"
        )
    return found


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")


def check_fields(
    found: Mapping[str, Any], kinds: Mapping[str, Kind], *, source: str, closed: bool = False
) -> None:
    """Check that each field that is there holds what it is read as.

    Args:
        kinds: by the field's name.
        source: the file and the part of it, for the errors.
        closed: no other field may be there.

    Raises:
        CheckpointError: one does not.
    """
    for name, kind in kinds.items():
        if name in found and not kind.holds(found[name]):
            raise CheckpointError(
                f"{source}: expected {name} to be {kind.words}; received {shown(found[name])}; mend it, or copy or "
                "download the file again"
            )
    if closed and (odd := sorted(set(found) - set(kinds))):
        raise CheckpointError(
            f"{source}: expected no fields but open_clip's own; received {', '.join(map(shown, odd[:4]))}, which it "
            f"does not know; take {'it' if len(odd) == 1 else 'them'} out"
        )


def part(found: Mapping[str, Any], name: str, *, source: str) -> dict[str, Any]:
    """The object under a name; an empty one where there is none, or null.

    Raises:
        CheckpointError: it is something else.
    """
    check_fields(found, {name: may_be_null(OBJECT)}, source=source)
    return dict(found.get(name) or {})


def shown(value: Any) -> str:
    """A value out of JSON in a few characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else _in_short(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_short(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(x, str | int | float | None) for x in value[:5]):
        return json.dumps(list(value[:5]))
    return f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__


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
