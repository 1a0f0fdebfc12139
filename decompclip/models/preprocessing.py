"""From a picture to the pixels that a tower takes: the one place that carries out a model's own preprocessing.

open_clip's fields, with transformers' steps where they differ. Pictures of extreme proportions are cut before they are
scaled: scaling one of 1 x 60,000 pixels until its shorter side fits makes the longer 13 million long, of which the crop
that follows keeps 224.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

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
from decompclip.tower.config import pair

MOST = 8
"""How many times the window a scaled side may be long; what lies further out has no part in the window's pixels."""


class CutExtremes:
    """Cuts the middle out of a picture whose longer side, scaled as its shorter one, would be far longer than the window.

    The window that is cropped afterwards shows the same, to within rounding; other pictures pass as they are.

    Args:
        size: height and width that the picture is scaled to.
        resize_mode: as open_clip names it. For `"squash"`, which shows all of a picture, a long height is scaled first:
            Pillow begins with the width, whatever the height. `"longest"` would leave no pixel of the shorter side.
        interpolation: as open_clip names it.
    """

    def __init__(self, size: tuple[int, int], resize_mode: str, interpolation: str) -> None:
        self.size, self.resize_mode, self.interpolation = size, resize_mode, interpolation

    def __call__(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        if self.resize_mode == "shortest":
            scale = max(height / picture.height, width / picture.width)
            rows, columns = (_kept(length, scale, self.size) for length in (picture.height, picture.width))
        elif self.resize_mode == "longest":
            rows = min(picture.height, picture.width * height)
            columns = min(picture.width, picture.height * width)
        elif picture.height > MOST * height and picture.width < width:
            resample = (
                Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
            )
            return picture.resize((picture.width, height), resample)
        else:
            return picture
        if (rows, columns) == (picture.height, picture.width):
            return picture
        top, left = (picture.height - rows) // 2, (picture.width - columns) // 2
        return picture.crop((left, top, left + columns, top + rows))


def _kept(length: int, scale: float, size: tuple[int, int]) -> int:
    """How much of a side to keep, so that rounding puts the window where it would lie on the whole side.

    Half of what is cut away lies at each end; and the scaled lengths leave the same rest, for cropping halves them.
    """
    least = int(MOST * max(size) / scale)
    first = least + (length - least) % 2
    if first >= length:
        return length
    scaled = int if size[0] == size[1] else round  # torchvision's way, and open_clip's
    whole = scaled(length * scale)
    return min(range(first, min(first + 64, length), 2), key=lambda kept: (whole - scaled(kept * scale)) % 4)


@dataclass(frozen=True)
class PictureTransform:
    """From an RGB picture to a float image, by way of 8 bits: what crosses to another device is a quarter as large.

    Args:
        geometry: scales and cuts the picture.
        mean, std: of the normalisation; 0 and 1 leave pixels in [0, 1].
    """

    geometry: Callable[[Image.Image], Image.Image]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __call__(self, picture: Image.Image) -> Float[Tensor, "3 h w"]:
        return self.finish(self.bytes(picture))

    def bytes(self, picture: Image.Image) -> UInt8[Tensor, "3 h w"]:
        """The picture scaled and cut."""
        return torch.from_numpy(np.array(self.geometry(picture).convert("RGB"))).permute(2, 0, 1).contiguous()

    def finish(self, images: UInt8[Tensor, "*batch 3 h w"]) -> Float[Tensor, "*batch 3 h w"]:
        """One or many images of `bytes`, wherever they lie, as floats: the same numbers on every device."""
        pixels = images.float()
        pixels /= pixels.new_full((), 255)  # CUDA would multiply by the reciprocal of a plain number
        if any(self.mean):
            pixels -= pixels.new_tensor(self.mean).view(3, 1, 1)
        if any(value != 1 for value in self.std):
            pixels /= pixels.new_tensor(self.std).view(3, 1, 1)
        return pixels


def open_clip_transform(cfg: PreprocessCfg) -> PictureTransform:
    """open_clip's evaluation transform of a `PreprocessCfg`, after `CutExtremes`."""
    whole: Any = image_transform_v2(cfg, is_train=False)
    *geometry, _, _ = whole.transforms  # to a tensor, normalise
    cut = CutExtremes(pair(cfg.size), cfg.resize_mode, cfg.interpolation)
    return PictureTransform(Compose([cut, *geometry]), tuple(cfg.mean), tuple(cfg.std))


@dataclass(frozen=True)
class Steps:
    """How transformers' image processors bring a picture to a size, where open_clip knows one size only.

    Attributes:
        resize: the shorter side to scale to; or height and width, whatever the proportions; None leaves the picture.
        crop: height and width of the middle that is kept, with black around a picture that is smaller; None keeps all.
        resample: Pillow's number of the interpolation.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.resize is not None:
            picture = self._cut(self.resize)(picture)
            height, width = self._size(picture.height, picture.width)
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        if self.crop is None:
            return picture
        # as transformers rounds: towards the upper left, of what is cut and of what is added
        top, left = (
            (have - want) // 2 if have >= want else -((want - have) // 2)
            for have, want in zip((picture.height, picture.width), self.crop, strict=True)
        )
        return picture.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def _cut(self, resize: int | tuple[int, int]) -> CutExtremes:
        how = "bilinear" if self.resample == Image.Resampling.BILINEAR else "bicubic"
        return (
            CutExtremes((resize, resize), "shortest", how)
            if isinstance(resize, int)
            else CutExtremes(resize, "squash", how)
        )

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            assert self.resize is not None
            return self.resize
        short, long = sorted((height, width))
        other = max(1, int(self.resize * long / short))
        return (self.resize, other) if height <= width else (other, self.resize)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of what comes out, where that is one size for all pictures."""
        whole = self.resize if isinstance(self.resize, tuple) else None
        return self.crop or whole

    def scaled(self, factor: tuple[float, float]) -> Steps:
        """The same for a tower of another image size."""

        def both(size: tuple[int, int]) -> tuple[int, int]:
            return round(size[0] * factor[0]), round(size[1] * factor[1])

        resize = round(self.resize * min(factor)) if isinstance(self.resize, int) else self.resize
        return replace(
            self,
            resize=both(resize) if isinstance(resize, tuple) else resize,
            crop=None if self.crop is None else both(self.crop),
        )


@dataclass
class Preprocessing(PreprocessCfg):
    """open_clip's fields, and `steps` where a processor of transformers' goes another way than open_clip's transform."""

    steps: Steps | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if isinstance(self.steps, dict):  # out of JSON
            given: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in self.steps.items()
            }
            self.steps = Steps(**given)

    def pixels(self) -> PictureTransform:
        """From an RGB picture to pixels in [0, 1] of the tower's size, before any normalisation."""
        return replace(self, mean=(0, 0, 0), std=(1, 1, 1)).transform()

    def transform(self) -> PictureTransform:
        """From an RGB picture to the tower's input."""
        if self.steps is None:
            return open_clip_transform(self)
        geometry = _Stepped(self.steps, (int(self.input_size[1]), int(self.input_size[2])))
        return PictureTransform(geometry, tuple(self.mean), tuple(self.std))


@dataclass(frozen=True)
class _Stepped:
    steps: Steps
    size: tuple[int, int]

    def __call__(self, picture: Image.Image) -> Image.Image:
        made = self.steps(picture.convert("RGB"))
        if (made.height, made.width) != self.size:
            raise ValueError(
                f"expected a picture of {self.size[0]} x {self.size[1]} pixels, since this model's preprocessing scales "
                f"none; received {made.height} x {made.width}; bring pictures to that size first"
            )
        return made


LOOKS = 8
"""Batches on an accelerator that are looked at: each look waits for it once."""

_SAMPLE = 4096
_MANY = 16


class RawPixels:
    """Warns once of images in [0, 1] or 0..255 that a model takes normalised.

    Normalised images of a photograph have negative numbers: all that is darker than the mean. Those without any are looked at
    more closely, for a pale picture may have none: raw pixels reach both 0 and 1, stand on the grid of 8 bits, or end at
    black, 0 in every channel, where normalised ones would end at the mean of every channel.
    """

    def __init__(self) -> None:
        self.warned = False
        self.looks = 0

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Looks at nothing meanwhile: for images that are in a wrong range on purpose."""
        before, self.warned = self.warned, True
        try:
            yield
        finally:
            self.warned = before

    @torch.no_grad()
    def look(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        if self.warned or images.numel() == 0 or images.is_meta or max(mean) <= 0:
            return
        if images.device.type != "cpu":
            self.looks += 1
            if self.looks > LOOKS:
                return
        flat = images.detach().reshape(-1)
        if float(flat[:: max(1, len(flat) // _SAMPLE)].min()) < 0:  # nearly all normalised batches end here
            return
        low, high = (float(x) for x in images.aminmax())
        most = max((1 - m) / s for m, s in zip(mean, std, strict=True))
        if low < 0 or not (high <= 1 or high > 4 * max(most, 1)):
            return
        scale = 1 if high <= 1 else 255
        if scale == 1 and not _raw(images, low, high, mean, std):
            return
        self.warned = True
        warn_caller(
            f"these images lie in {low:.2f}..{high:.2f}, as pixels in {'[0, 1]' if scale == 1 else '0..255'} do, and this "
            "model takes them normalised; pass pixels in [0, 1] through `model.normalize`, or pictures through "
            "`model.preprocess`: without that it answers wrongly"
        )


def _raw(images: Tensor, low: float, high: float, mean: Sequence[float], std: Sequence[float]) -> bool:
    few = images[:4].float()
    own, width = (few.new_tensor(x).view(1, -1, 1, 1) for x in (mean, std))
    if _on_grid(few * width + own):  # 8 bits, normalised
        return False
    return _on_grid(few) or (low < 0.02 and high > 0.98) or _ends_at_black(images, mean, std)


def _ends_at_black(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether 0, and nothing below it, is the least of every channel, in images that are not of one colour.

    Normalised, the darkest of all would be a colour near the mean: where the channels' means differ it is a certain colour,
    which is no bound of pictures. Where they are alike it is a grey, at which a few pale images may end: there it is
    exactly 0 that counts, which no pixel of 8 bits comes to, or many images.
    """
    least, most = images.amin((2, 3)), images.amax((2, 3))
    varied = ((most - least) > 0.1).any(1)
    if not bool(varied.any()):
        return False
    zeros = [m / s for m, s in zip(mean, std, strict=True)]
    certain = max(zeros) - min(zeros) > 0.1 or int(varied.sum()) >= _MANY
    return float(least[varied].amin(0).max()) < (0.02 if certain else 1e-6)


def _on_grid(pixels: Tensor) -> bool:
    steps = pixels * 255
    return bool((steps - steps.round()).abs().max() < 2e-3)


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
"""By `model_type`: what is taken where a folder does not say."""

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
        given = {key: found.get(f"image_{key}") for key in ("mean", "std")}
        mean, std = (defaults[key] if value is None else value for key, value in given.items())
    mean, std = ((x,) * 3 if isinstance(x, int | float) else x for x in (mean, std))
    return {"mean": tuple(x / scale for x in mean), "std": tuple(x / scale for x in std)}
