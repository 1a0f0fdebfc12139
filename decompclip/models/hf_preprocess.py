"""transformers' image preprocessing as open_clip's `PreprocessCfg`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from decompclip.models.errors import CheckpointError

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}; copy or download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds {type(found).__name__}, expected an object; copy or download it again"
        )
    return found


def preprocess_in(folder: Path, model_type: str) -> dict[str, Any]:
    """The preprocessing that a folder names, or else what its kind of model was trained with.

    Raises:
        CheckpointError: it cannot be carried out by open_clip's transform.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            found = read_json(path)
            found = found.get(key, {}) if key else found
            if found:
                return preprocess_of(found, model_type, source=str(path))
    warnings.warn(
        f"{folder} does not say how images are prepared; those of {model_type!r} models were taken",
        stacklevel=6,
    )
    return dict(DEFAULTS[model_type])


def preprocess_of(found: Mapping[str, Any], model_type: str, *, source: str) -> dict[str, Any]:
    """open_clip's fields of an image processor of transformers, given as a dict.

    Raises:
        CheckpointError: it cannot be carried out by open_clip's transform.
    """
    defaults = DEFAULTS[model_type]
    resample = found.get("resample")
    interpolation = _PILLOW.get(int(resample)) if resample is not None else defaults["interpolation"]
    scale = found.get("rescale_factor") or 1 / 255
    if interpolation is None or abs(scale * 255 - 1) > 1e-3 or not found.get("do_rescale", True):
        raise CheckpointError(
            f"{source} prepares images in a way that open_clip's transform does not: resample {resample}, "
            f"rescale_factor {scale}; expected bilinear (2) or bicubic (3), and 1/255"
        )
    size = found.get("size")
    whole = isinstance(size, Mapping) and "shortest_edge" not in size and not found.get("do_center_crop")
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    normal = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    chosen = normal if found.get("do_normalize", True) else plain
    return {
        "mean": tuple(chosen["mean"] or defaults["mean"]),
        "std": tuple(chosen["std"] or defaults["std"]),
        "interpolation": interpolation,
        "resize_mode": "squash" if whole else "shortest" if size else defaults["resize_mode"],
    }
