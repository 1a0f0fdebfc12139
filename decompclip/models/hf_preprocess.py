"""transformers' image preprocessing as `Preprocessing`, open_clip's fields with transformers' steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from decompclip.models.errors import CheckpointError, warn_caller
from decompclip.models.json_files import (
    FLAG,
    MEAN,
    SIZE,
    STD,
    TEXT,
    Kind,
    between,
    check_fields,
    either,
    is_side,
    may_be_null,
    part,
    read_json,
)
from decompclip.models.preprocessing import Steps
from decompclip.tower.convert.native import pair

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
    "siglip": {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
"""By `model_type`: what is taken where nothing is said."""

_PILLOW = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, by which transformers names them
_RESAMPLE = {name: number for number, name in _PILLOW.items()}

_SIZES = Kind(
    "a side in pixels, or an object of them",
    lambda value: (
        is_side(value)
        or (isinstance(value, Mapping) and all(each is None or is_side(each) for each in value.values()))
    ),
)
_FIELDS: Mapping[str, Kind] = {
    key: may_be_null(kind)
    for key, kind in {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"), FLAG),
        "image_mean": either(MEAN, between(-1e6, 1e6)),
        "image_std": either(STD, between(1e-6, 1e6)),
        "resample": SIZE,
        "rescale_factor": between(1e-6, 1e3),
        "size": _SIZES,
        "crop_size": _SIZES,
        "image_processor_type": TEXT,
        "feature_extractor_type": TEXT,
    }.items()
}


def preprocess_in(folder: Path, model_type: str, image_size: int | Sequence[int]) -> dict[str, Any]:
    """The preprocessing that a folder names, or else what its kind of model was trained with.

    Raises:
        CheckpointError: it cannot be carried out, or there is such a file and it cannot be read.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if os.path.lexists(path):  # what is there and no file is refused, not passed over
            found = read_json(path)
            found = part(found, key, source=str(path)) if key else found
            if found:
                return preprocess_of(found, model_type, image_size, source=str(path))
    warn_caller(f"{folder} does not say how images are prepared; those of {model_type!r} models were taken")
    return dict(DEFAULTS[model_type])


def preprocess_of(
    found: Mapping[str, Any], model_type: str, image_size: int | Sequence[int], *, source: str
) -> dict[str, Any]:
    """An image processor of transformers, given as a dict, as `Preprocessing` takes it.

    Args:
        image_size: of the tower; a processor for another size is brought to it, with a warning.

    Raises:
        CheckpointError: it cannot be carried out.
    """
    defaults = DEFAULTS[model_type]
    tower = pair(image_size)
    check_fields(found, _FIELDS, source=source)
    resample = found.get("resample")
    interpolation = _PILLOW.get(int(resample)) if resample is not None else defaults["interpolation"]
    odd = {
        f"resample {resample} (expected bilinear, 2, or bicubic, 3)": interpolation is None,
        "padding (do_pad)": bool(found.get("do_pad")),
        "channels in another order (do_flip_channel_order)": bool(found.get("do_flip_channel_order")),
    }
    size = found.get("size")
    if isinstance(size, Mapping):
        size = {key: value for key, value in size.items() if value is not None}
        odd[f"size {size}"] = set(size) not in ({"shortest_edge"}, {"height", "width"})
    crop = found.get("crop_size")
    if isinstance(crop, Mapping):
        odd[f"crop_size {dict(crop)}"] = set(crop) != {"height", "width"} or None in crop.values()
    if refused := [what for what, present in odd.items() if present]:
        raise CheckpointError(
            f"{source} prepares images in a way that is not known here: {refused[0]}; write what the model was trained "
            "with into it"
        )
    steps = _steps(found, size, model_type, tower, _RESAMPLE[interpolation or "bicubic"])
    if steps.size is not None and steps.size != tower:
        given, wanted = (f"{height} x {width}" for height, width in (steps.size, tower))
        warn_caller(
            f"{source} prepares images of {given} pixels, and the tower takes {wanted}, so that transformers refuses them: "
            f"here they are scaled and cut in the same proportions, to {wanted}"
        )
        steps = steps.scaled((tower[0] / steps.size[0], tower[1] / steps.size[1]))
    squash = isinstance(steps.resize, tuple) and steps.crop is None  # as open_clip's transform does it
    return {
        **_normalisation(found, defaults),
        "interpolation": interpolation,
        "resize_mode": "squash" if squash else "shortest",
        **({} if squash else {"steps": steps}),
    }


def _steps(
    found: Mapping[str, Any], size: Any, model_type: str, tower: tuple[int, int], resample: int
) -> Steps:
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or model_type).lower()
    crops = kind.startswith("clip")
    resize: int | tuple[int, int]
    if isinstance(size, Mapping):
        resize = int(size["shortest_edge"]) if "shortest_edge" in size else (size["height"], size["width"])
    elif size is None:
        resize = min(tower) if crops else tower
    else:  # a number, in older versions
        resize = int(size) if crops else pair(size)
    crop = found.get("crop_size")
    if isinstance(crop, Mapping):
        crop = (crop["height"], crop["width"])
    return Steps(
        resize=resize if found.get("do_resize", True) else None,
        crop=(tower if crop is None else pair(crop)) if found.get("do_center_crop", crops) else None,
        resample=resample,
    )


def _normalisation(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and deviation of pixels in [0, 1], where the processor may scale them otherwise."""
    factor = found.get("rescale_factor") or 1 / 255
    scale = 255 * factor if found.get("do_rescale", True) else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-3 else scale  # 0.00392 for 1 / 255
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if found.get("do_normalize", True):
        mean, std = (found.get(f"image_{key}") or defaults[key] for key in ("mean", "std"))
    mean, std = ((x,) * 3 if isinstance(x, int | float) else x for x in (mean, std))
    return {"mean": tuple(x / scale for x in mean), "std": tuple(x / scale for x in std)}
