"""Options of an audit, and of a scan with clean images alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from decompclip.api import check_choice
from decompclip.decomposition.maps import Convention


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Options of an audit; the defaults are the paper's where it names one.

    Attributes:
        convention: bookkeeping of the decomposition's means and biases (docs/method.md, section 1).
        epsilon: fixed similarity below which Decomp-Rep and Decomp-Det flag a head (docs/method.md, section 3).
        quantile: of a head's own clean similarities, where the threshold is taken from them instead.
        false_positives: share of clean images that detection without a hint is set to flag.
        zeta: Decomp-Det calls an image suspicious when more heads than this are flagged.
        validation: share of the clean images that fits means and prototypes, and is reported nowhere.
        batch_size: images a forward pass.
        examples: suspect images over which attention and contribution maps are drawn.
        seed: of the validation split.
    """

    convention: Convention = "centred"
    epsilon: float = 0.002
    quantile: float = 0.05
    false_positives: float = 0.05
    zeta: int = 5
    validation: float = 0.2
    batch_size: int = 64
    examples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("convention", self.convention, Convention)
        if not math.isfinite(self.epsilon):
            raise ValueError(f"expected a finite epsilon, a similarity; received {self.epsilon}")
        _check(self, ("quantile", "false_positives", "validation"), batch_size=1, examples=0, zeta=0, seed=0)


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Options of a scan with clean images alone.

    Attributes:
        bound: most that the probe "everywhere" changes a pixel, in the images' range of 0 to 1.
        patch: side of the patch probes, as a share of the image's shorter side.
        steps: of the search for each class's change.
        images: images a step.
        fit: most clean images that the search sees.
        held_out: most other images, which tell how well a change works.
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
        if not (math.isfinite(self.lead) and self.lead > 0):
            raise ValueError(f"expected a lead above 0; received {self.lead}")
        least = {"steps": 1, "images": 1, "fit": 1, "held_out": 20, "most_classes": 2}
        _check(self, ("bound", "patch"), **least, batch_size=1, seed=0)


def _check(config: Any, shares: tuple[str, ...], **least: int) -> None:
    for name in shares:
        if not 0 < getattr(config, name) < 1:
            raise ValueError(f"expected {name} between 0 and 1, a share; received {getattr(config, name)}")
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"expected {name} of at least {low}; received {getattr(config, name)}")
