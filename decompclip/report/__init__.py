"""The audit's report: one HTML file that opens offline, and a JSON with every number."""

from __future__ import annotations

from decompclip.report.write import render, write_report

__all__ = ["render", "write_report"]
