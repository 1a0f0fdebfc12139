"""A trigger seen on images: clean, triggered, and what came between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decompclip.attacks.quality import Quality, compare
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
