"""Detectors of triggered images, by name in `DETECTORS`: those of pixels, and those of terms behind `OnTerms`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from decompclip.defenses.agnostic import AgnosticDet
from decompclip.defenses.decomp import DecompDet
from decompclip.defenses.detectors import published
from decompclip.defenses.detectors.detector import DETECTORS, Detector, OnTerms, registered
from decompclip.defenses.detectors.token_rep import TokenRep

__all__ = ["DETECTORS", "Detector", "published"]


@registered("Decomp-Det (paper)")
def _decomp_det(model: Any, classifier: Tensor) -> OnTerms:
    return OnTerms(model, DecompDet.paper(), convention="paper")


@registered("Decomp-Det (cosine, quantile)")
def _decomp_det_by_quantile(model: Any, classifier: Tensor) -> OnTerms:
    return OnTerms(model, DecompDet(similarity="cosine", threshold="quantile"))


@registered("agnostic")
def _agnostic(model: Any, classifier: Tensor) -> OnTerms:
    return OnTerms(model, AgnosticDet(classifier))


registered("token")(TokenRep)
