"""A trigger seen on images: clean, triggered, and what came between.

How visible a trigger is: PSNR and SSIM of triggered images against their clean twins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.trigger import Trigger
from decompclip.files import atomic_write

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from decompclip.figures.gallery import TriggerRow


GAIN = 10.0


@dataclass(frozen=True)
class Preview:
    """Twins, the trigger's card, and how visible it is."""

    clean: Float[Tensor, "batch 3 h w"]
    triggered: Float[Tensor, "batch 3 h w"]
    card: Mapping[str, Any]
    quality: Quality

    def difference(self, gain: float = GAIN) -> Float[Tensor, "batch 3 h w"]:
        """Triggered less clean, times `gain`, around mid-grey."""
        return (0.5 + gain * (self.triggered - self.clean)).clamp(0, 1)

    def figure(self) -> go.Figure:
        """The first image: clean, triggered, and the difference."""
        return gallery([self])

    def save(self, path: str | Path) -> Path:
        """Write the pictures as a PNG file; returns its path."""
        return save_gallery([self], path)


def preview(
    trigger: Trigger,
    images: Float[Tensor, "batch 3 h w"],
    indices: Sequence[int] | Int[Tensor, " batch"] | None = None,
) -> Preview:
    """`trigger` on `images`.

    Raises:
        ValueError: as `Trigger.__call__`, or images smaller than SSIM's window.
    """
    triggered = trigger(images, indices)
    return Preview(images, triggered, trigger.card(), compare(images, triggered))


def gallery(previews: Sequence[Preview], *, image: int = 0) -> go.Figure:
    """One row a trigger, its name and fidelity beside it.

    Args:
        previews: of the triggers.
        image: which of each preview's images to show.

    Raises:
        ValueError: no previews, or an image that one of them lacks.
    """
    from decompclip.figures.gallery import trigger_gallery

    return trigger_gallery(_rows(previews, image))


def save_gallery(previews: Sequence[Preview], path: str | Path, *, image: int = 0) -> Path:
    """The same gallery as a PNG file, without a browser; written to a temporary name and renamed.

    Args:
        previews: of the triggers.
        path: of the file.
        image: which of each preview's images to show.

    Raises:
        ValueError: as `gallery`.
    """
    from decompclip.figures.gallery import trigger_sheet

    sheet, path = trigger_sheet(_rows(previews, image)), Path(path)
    with atomic_write(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)
    return path


def _rows(previews: Sequence[Preview], image: int) -> list[TriggerRow]:
    from decompclip.figures.gallery import TriggerRow

    if not previews:
        raise ValueError("expected at least one preview; received none")
    fewest = min(len(preview.clean) for preview in previews)
    if not 0 <= image < fewest:
        raise ValueError(f"expected an image among the first {fewest} of each preview; received {image}")
    return [
        TriggerRow(
            _lines(preview),
            [_bytes(x[image]) for x in (preview.clean, preview.triggered, preview.difference())],
        )
        for preview in previews
    ]


def _lines(preview: Preview) -> list[str]:
    quality = preview.quality.summary()
    return [
        preview.card["name"],
        f"{preview.card['extent']}, {preview.card['structure']}",
        f"PSNR {quality['psnr']:.1f} dB",
        f"SSIM {quality['ssim']:.3f}",
        f"{100 * quality['changed']:.1f} % of pixels",
    ]


def _bytes(pixels: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "h w 3"]:
    return (pixels.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


WINDOW = 11
SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Quality:
    """Fidelity of each triggered image to its clean twin.

    Attributes:
        psnr: peak signal-to-noise ratio in dB; infinite where nothing changed.
        ssim: structural similarity, 1 where nothing changed.
        changed: share of the pixels that changed.
    """

    psnr: Float[Tensor, " batch"]
    ssim: Float[Tensor, " batch"]
    changed: Float[Tensor, " batch"]

    def summary(self) -> dict[str, float]:
        """The three means, ready for a card or a table."""
        return {
            "psnr": round(self.psnr.mean().item(), 2),
            "ssim": round(self.ssim.mean().item(), 4),
            "changed": round(self.changed.mean().item(), 4),
        }


def measure(
    trigger: Trigger,
    images: Float[Tensor, "batch 3 h w"],
    indices: Sequence[int] | Int[Tensor, " batch"] | None = None,
) -> Quality:
    """What `trigger` does to `images`.

    Raises:
        ValueError: as `Trigger.__call__`, or images smaller than SSIM's window.
    """
    return compare(images, trigger(images, indices))


def compare(clean: Float[Tensor, "batch 3 h w"], triggered: Float[Tensor, "batch 3 h w"]) -> Quality:
    """PSNR, SSIM and the share of changed pixels of twins.

    Raises:
        ValueError: twins of different shapes, or images smaller than SSIM's window.
    """
    changed = (clean != triggered).any(dim=1).float()
    return Quality(psnr(clean, triggered), ssim(clean, triggered), reduce(changed, "b h w -> b", "mean"))


def psnr(
    clean: Float[Tensor, "batch c h w"], triggered: Float[Tensor, "batch c h w"]
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1].

    Raises:
        ValueError: twins of different shapes.
    """
    _check_twins(clean, triggered)
    return -10 * reduce((clean - triggered).square(), "b c h w -> b", "mean").log10()


def ssim(
    clean: Float[Tensor, "batch c h w"], triggered: Float[Tensor, "batch c h w"]
) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al., 2004) of images in [0, 1], a mean over pixels and channels.

    The source's settings: Gaussian window of 11 x 11 pixels and sigma 1.5, K = 0.01 and 0.03; only windows
    that lie inside the image count.

    Raises:
        ValueError: twins of different shapes, or images smaller than the window.
    """
    _check_twins(clean, triggered)
    if min(clean.shape[-2:]) < WINDOW:
        raise ValueError(
            f"expected images of at least {WINDOW} x {WINDOW} pixels, SSIM's window; received "
            f"{clean.shape[-2]} x {clean.shape[-1]}"
        )
    x, y = (rearrange(images, "b c h w -> (b c) 1 h w") for images in (clean, triggered))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return reduce(light * structure, "(b c) 1 h w -> b", "mean", c=clean.shape[1])


def _blur(x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 h2 w2"]:
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.softmax(-0.5 * (offsets / SIGMA) ** 2, dim=0)
    return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def _check_twins(clean: Tensor, triggered: Tensor) -> None:
    if clean.shape != triggered.shape or clean.ndim != 4:
        raise ValueError(
            f"expected twins [batch, channel, h, w] of one shape; received {list(clean.shape)} and "
            f"{list(triggered.shape)}"
        )
