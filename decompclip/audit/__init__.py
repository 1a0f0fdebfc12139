"""The main job: audit a CLIP's image encoder for a backdoor, with every number's uncertainty."""

from __future__ import annotations

from decompclip.audit.config import AuditConfig, ScanConfig
from decompclip.audit.findings import Finding, findings
from decompclip.audit.pipeline import run_audit
from decompclip.audit.result import AuditResult
from decompclip.audit.verdict import Verdict

__all__ = ["AuditConfig", "AuditResult", "Finding", "ScanConfig", "Verdict", "findings", "run_audit"]
