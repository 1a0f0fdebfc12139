"""A trigger seen on images: clean, triggered, and what came between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from decompclip.attacks.quality import Quality, compare
from decompclip.attacks.trigger import Trigger

if TYPE_CHECKING:
    import plotly.graph_objects as go

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
        from decompclip.figures.triggers import trigger_gallery

        return trigger_gallery([self])

    def save(self, path: str | Path) -> Path:
        """Write the pictures as a PNG file; returns its path."""
        from decompclip.figures.triggers import save_gallery

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
