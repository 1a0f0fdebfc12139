"""From pictures to pixels in [0, 1] and back: before the model's normalisation, for triggers come first."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from decompclip.api import check_choice
from decompclip.data.files import open_rgb, reason

if TYPE_CHECKING:
    from decompclip.models.preprocessing import PictureTransform

Pixels = Float[Tensor, "batch 3 h w"]
"""RGB images in [0, 1], before the model's normalisation."""

Preprocess = Callable[[Image.Image], Float[Tensor, "3 h w"]]
"""From an RGB picture to pixels in [0, 1]; a `PictureTransform` runs in threads, others in one, for they may draw."""

ResizeMode = Literal["shortest", "longest", "squash"]


def to_pixels(
    size: int | tuple[int, int] | None = None,
    *,
    resize_mode: ResizeMode = "shortest",
    interpolation: str = "bicubic",
) -> Preprocess:
    """open_clip's evaluation transform without its normalisation: pixels in [0, 1].

    Args:
        size: of the model's images (height, width); None leaves pictures at their own size.
        resize_mode: `"shortest"` scales the shorter side and crops the middle; `"longest"` scales the longer one and
            adds black; `"squash"` changes proportions.
        interpolation: as open_clip names it.

    Raises:
        ValueError: an unknown resize mode.
    """
    check_choice("resize_mode", resize_mode, ResizeMode)
    if size is None:
        return picture_pixels
    from open_clip.transform import PreprocessCfg

    from decompclip.models.preprocessing import open_clip_transform

    cfg = PreprocessCfg(
        size, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=resize_mode
    )
    return open_clip_transform(cfg)


def picture_pixels(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    """A picture's pixels in [0, 1], at its own size."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def bytes_of(pixels: Float[Tensor, "*batch 3 h w"]) -> UInt8[Tensor, "*batch h w 3"]:
    """Pixels in [0, 1] in 8 bits a channel, as an image file holds them."""
    return (pixels.detach().cpu() * 255).round().clamp(0, 255).byte().movedim(-3, -1).contiguous()


def encode_png(pixels: Float[Tensor, "3 h w"], *, optimize: bool = False) -> bytes:
    """Pixels in [0, 1] as a PNG file of 8 bits a channel; `optimize` takes longer and makes it smaller."""
    buffer = io.BytesIO()
    Image.fromarray(bytes_of(pixels).numpy()).save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def stack_images(
    images: Sequence[Tensor], preprocess: Any = None, *, device: torch.device | str | None = None
) -> Float[Tensor, "batch 3 h w"]:
    """Images as one tensor of floats on `device`; those that are in 8 bits go there so.

    Args:
        images: of one size: floats, or 8 bits as `prepare` leaves them.
        preprocess: what prepared those in 8 bits.
        device: None for where they are.

    Raises:
        ValueError: images of several sizes, or in 8 bits that are not of a `PictureTransform`.
    """
    if not images:
        return torch.zeros(0, 3, 0, 0, device=device)
    if len(sizes := sorted({tuple(image.shape) for image in images})) > 1:
        raise ValueError(
            f"expected images of one size in a batch; received {sizes[0]} and {sizes[-1]}; pass "
            "preprocess=to_pixels(size)"
        )
    if all(image.dtype == torch.uint8 for image in images) and (ours := _by_bytes(preprocess)):
        return ours.finish(onto(torch.stack(list(images)), device))
    return onto(torch.stack([finished(image, preprocess) for image in images]), device)


def onto(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor on a device; a GPU gets it out of pinned memory, and nobody waits for it."""
    if device is None or tensor.device == (device := torch.device(device)):
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prepare(preprocess: Preprocess, picture: Image.Image) -> Tensor:
    """What `preprocess` makes of a picture, still in 8 bits where it goes by way of them (`PictureTransform`)."""
    ours = _by_bytes(preprocess)
    return preprocess(picture) if ours is None else ours.bytes(picture)


def is_ours(preprocess: Preprocess) -> bool:
    """Whether it is this package's, which draws nothing and may run in several threads at a time."""
    return preprocess is picture_pixels or _by_bytes(preprocess) is not None


def _by_bytes(preprocess: Any) -> PictureTransform | None:
    from decompclip.models.preprocessing import PictureTransform

    return preprocess if isinstance(preprocess, PictureTransform) else None


def finished(image: Tensor, preprocess: Any) -> Float[Tensor, "3 h w"]:
    """An image of `prepare` in floats.

    Raises:
        ValueError: 8 bits that are not of a `PictureTransform`.
    """
    if image.dtype != torch.uint8:
        return image
    if (ours := _by_bytes(preprocess)) is None:
        raise ValueError(
            f"expected floats of preprocess; received {image.dtype}, whose scale nobody knows; divide by 255, or pass "
            "preprocess=to_pixels(size)"
        )
    return ours.finish(image)


def read_image(image: Any, preprocess: Preprocess, *, root: str | Path | None = None) -> Tensor | str:
    """An image as `prepare` leaves it, or why there is none.

    Args:
        image: the path of an image file, a file's content, a picture, or a tensor in [0, 1].
        preprocess: from a picture to pixels; tensors pass as they are.
        root: a folder that a file must lie in, links resolved; None allows any.
    """
    try:
        if isinstance(image, Path):
            image = open_rgb(image, root=root)
        elif isinstance(image, bytes):
            image = open_rgb(io.BytesIO(image))
        return prepare(preprocess, image) if isinstance(image, Image.Image) else check_image(image)
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return reason(error)


def check_image(image: Any) -> Float[Tensor, "3 h w"]:
    """Raises ValueError unless `image` is a tensor of RGB pixels in [0, 1]."""
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"expected a picture or a tensor [3, h, w]; received {found}")
    if not (image.is_floating_point() and image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"expected pixels in [0, 1]; received {image.dtype} in {image.min():.2f}..{image.max():.2f}; leave the "
            "normalisation to the model"
        )
    return image


def check_pixels(pixels: Tensor, where: str = "") -> None:
    """Raises ValueError unless `pixels` are `[batch, 3, h, w]` in [0, 1]; `where` says for the error which they are."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected images [batch, 3, h, w]; received {list(pixels.shape)}{where}")
    low, high = (float(x) for x in pixels.aminmax()) if pixels.numel() else (0.0, 1.0)
    if not (low >= 0 and high <= 1):  # nan too
        raise ValueError(
            f"expected pixels in [0, 1]; received {low:.2f}..{high:.2f}{where}; leave the normalisation to the model"
        )
