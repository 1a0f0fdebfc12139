"""Results to files: each written to a temporary name first, so that no half report is ever left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decompclip import __version__
from decompclip.audit.findings import findings
from decompclip.audit.result import AuditResult, jsonable
from decompclip.audit.scan.result import ScanResult
from decompclip.report.html import NUMBERS, render

REPORT = "report.html"
Result = AuditResult | ScanResult

SCHEMA = 2
"""Of the JSON: raised when a field changes its meaning or goes away."""


def write_report(results: Result | Sequence[Result], out: str | Path, *, title: str | None = None) -> Path:
    """Write `report.html` and `audit.json` into the folder `out`; returns the path of the report.

    Args:
        results: one audit or scan, or several to be shown side by side.
        title: of the page.

    Raises:
        ValueError: no results.
        NotADirectoryError: `out` is a file.
    """
    results, out = [results] if isinstance(results, AuditResult | ScanResult) else list(results), Path(out)
    if not results:
        raise ValueError("expected the result of at least one audit; received none")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"expected a folder to write the report to; {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    audits = [_numbers(result) for result in results]
    numbers = {"schema": SCHEMA, "decompclip": __version__, "audits": audits}
    _write(out / NUMBERS, json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(out / REPORT, render(results, title=title))
    return out / REPORT


def _numbers(result: Result) -> dict[str, Any]:
    said = (
        {"kind": "scan"} if isinstance(result, ScanResult) else {"findings": jsonable(list(findings(result)))}
    )
    return {"kind": "audit", **result.to_dict(), "verdict": jsonable(result.verdict), **said}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
