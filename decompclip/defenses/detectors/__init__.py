"""Detectors of triggered images, one a file; by name in `DETECTORS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from decompclip.defenses.agnostic_det import AgnosticDet
from decompclip.defenses.decomp_det import DecompDet
from decompclip.defenses.detectors.bdetclip import BDetCLIP, prompts
from decompclip.defenses.detectors.density import DAO, LID, SLOF, KDistance, Mahalanobis
from decompclip.defenses.detectors.detector import Detector, OnTerms
from decompclip.defenses.detectors.scale_up import ScaleUp
from decompclip.defenses.detectors.strip import STRIP
from decompclip.defenses.detectors.teco import TeCo

if TYPE_CHECKING:
    from torch import Tensor

    from decompclip.models.clip import HookedCLIP


DETECTORS: dict[str, Callable[[HookedCLIP, Tensor], Detector]] = {
    "STRIP": STRIP,
    "SCALE-UP": ScaleUp,
    "TeCo": TeCo,
    "BDetCLIP": lambda model, classifier: BDetCLIP(
        model, classifier, *prompts(model.encode_text, model.class_names)
    ),
    "k-distance": lambda model, classifier: KDistance(model),
    "SLOF": lambda model, classifier: SLOF(model),
    "LID": lambda model, classifier: LID(model),
    "DAO": lambda model, classifier: DAO(model),
    "Mahalanobis": lambda model, classifier: Mahalanobis(model),
    "Mahalanobis by class": Mahalanobis,
    "Decomp-Det (paper)": lambda model, classifier: OnTerms(model, DecompDet.paper(), convention="paper"),
    "Decomp-Det (cosine, quantile)": lambda model, classifier: OnTerms(
        model, DecompDet(similarity="cosine", threshold="quantile")
    ),
    "agnostic": lambda model, classifier: OnTerms(model, AgnosticDet(classifier)),
}
"""From a model and the zero-shot classifier of its own class names to a detector with its source's settings."""
