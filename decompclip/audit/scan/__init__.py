"""Audit with clean images alone: is there a class that a small change sends every image to?"""

from __future__ import annotations

from decompclip.audit.scan.config import ScanConfig
from decompclip.audit.scan.result import ScanResult
from decompclip.audit.scan.run import run_scan
from decompclip.audit.scan.verdict import scan_verdict

__all__ = ["ScanConfig", "ScanResult", "run_scan", "scan_verdict"]
