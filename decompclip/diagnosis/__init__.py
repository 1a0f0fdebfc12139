"""The parts of `diagnose`: what it reads, what it tries, and what it says."""

from __future__ import annotations

from decompclip.diagnosis.result import Comparison, Diagnosis, Fault, Measurement, Severity

__all__ = ["Comparison", "Diagnosis", "Fault", "Measurement", "Severity"]
