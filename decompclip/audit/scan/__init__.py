"""Audit with clean images alone: is there a class that a small change sends every image to?"""

from __future__ import annotations

from decompclip.audit.scan.result import ScanConfig, ScanResult, scan_verdict
from decompclip.audit.scan.run import run_scan

__all__ = ["ScanConfig", "ScanResult", "run_scan", "scan_verdict"]
