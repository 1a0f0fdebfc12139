"""Results to files: page and numbers come together, and carry one mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decompclip import __version__
from decompclip.audit.findings import findings
from decompclip.audit.result import AuditResult, jsonable
from decompclip.audit.scan.result import ScanResult
from decompclip.files import atomic_folder, digest, write_json, write_text
from decompclip.printable import printable_all
from decompclip.report.html import NUMBERS, render

REPORT = "report.html"
Result = AuditResult | ScanResult

SCHEMA = 2
"""Of the JSON: raised when a field changes its meaning or goes away."""


def write_report(results: Result | Sequence[Result], out: str | Path, *, title: str | None = None) -> Path:
    """Write `report.html` and `audit.json` into the folder `out`; returns the path of the report.

    They come together, the JSON last, and carry the same `run`, a digest of the numbers.

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
    numbers: dict[str, Any] = {"schema": SCHEMA, "decompclip": __version__}
    numbers["audits"] = printable_all([_numbers(result) for result in results])
    numbers["run"] = digest(numbers)
    with atomic_folder(out, NUMBERS) as partial:
        write_text(partial / REPORT, render(results, title=title, run=numbers["run"]))
        write_json(partial / NUMBERS, numbers)
    return out / REPORT


def _numbers(result: Result) -> dict[str, Any]:
    said = (
        {"kind": "scan"} if isinstance(result, ScanResult) else {"findings": jsonable(list(findings(result)))}
    )
    return {"kind": "audit", **result.to_dict(), "verdict": jsonable(result.verdict), **said}
