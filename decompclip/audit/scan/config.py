"""What a scan can be asked to do otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Options of a scan with clean images alone.

    Attributes:
        bound: most that the probe "everywhere" changes a pixel, in the images' range of 0 to 1.
        patch: side of the patch probes, as a share of the image's shorter side.
        steps, images: of the search for each class's change, and images a step.
        fit: most clean images that the search sees; the others, at most `held_out`, tell how well a change works.
        most_classes: classes that are searched in full; of more, those are left that one step gets furthest with.
        lead: of a class over the next one (see `ProbeResult`) from which the scan calls it a likely target: twice the
            largest that clean models showed, which are not among those reported (`python -m analyses.audit_scan`).
        batch_size: images a forward pass.
        seed: of the split, and of places.
    """

    bound: float = 8 / 255
    patch: float = 1 / 6
    steps: int = 30
    images: int = 24
    fit: int = 192
    held_out: int = 300
    most_classes: int = 16
    lead: float = 0.5
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bound", "patch"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1; received {getattr(self, name)}")
        if not (math.isfinite(self.lead) and self.lead > 0):
            raise ValueError(f"expected a lead above 0; received {self.lead}")
        least = {
            "steps": 1,
            "images": 1,
            "fit": 1,
            "held_out": 20,
            "most_classes": 2,
            "batch_size": 1,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"expected {name} of at least {low}; received {getattr(self, name)}")
