"""Results as one self-contained page; page and numbers are written together, and carry the same digest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from decompclip import __version__
from decompclip.audit.checks import cost, difference, plus_minus, points, rate
from decompclip.audit.components import WEIGHTS_CONCLUDE
from decompclip.audit.controls import KINDS
from decompclip.audit.findings import alarms, area, findings, gap
from decompclip.audit.result import AuditResult, jsonable
from decompclip.audit.scan_result import CONCLUDES, ScanResult
from decompclip.audit.verdict import LOWERED, RULES
from decompclip.display import printable, printable_all, shown
from decompclip.figures.theme import content_policy, plotly_script
from decompclip.files import atomic_folder, digest, write_json, write_text
from decompclip.report.view import scans, subjects

NUMBERS = "audit.json"
"""Beside the page."""

TEMPLATES = files("decompclip.report") / "templates"


def render(results: Sequence[AuditResult | ScanResult], *, title: str | None = None, run: str = "") -> str:
    """The report as HTML, with plotly.js in it once, so that it opens without a network.

    Args:
        run: what the page and the numbers beside it have in common.
    """
    names = " and ".join(dict.fromkeys(result.name for result in results))
    pairs = [result for result in results if isinstance(result, AuditResult)]
    alone = [result for result in results if isinstance(result, ScanResult)]
    audits, scanned = subjects(pairs), scans(alone, first=len(pairs))
    images = [image for audit in audits if audit["maps"] for image in audit["maps"]["images"]]
    images += [image for scan in scanned for pictures in scan["pictures"] for image in pictures]
    css = _text("report.css")
    css += "".join(f".{image['class']} {{ background-image: url({image['uri']}); }}\n" for image in images)
    js, plotly = _text("report.js"), plotly_script()
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=title or f"Audit of {names}",
            subjects=audits,
            scans=scanned,
            weighed=[each for each in audits + scanned if each["result"].weights is not None],
            policy=Markup(content_policy(styles=[css], scripts=[plotly, js])),
            run=run,
            css=Markup(css),
            js=Markup(js),
            plotly=plotly,
            several=len(results) > 1,
            numbers=NUMBERS,
            concludes=CONCLUDES,
            weights_conclude=WEIGHTS_CONCLUDE,
            rules=RULES,
            rules_note=LOWERED,
            corruptions=len(KINDS),
        )
    )


def tied(text: str) -> str:
    """Numbers and their units never part at a line's end, nor does an interval."""
    text = re.sub(r"(?<=\d) (?=%|±|points)|(?<=±) |(?<=%|s) (?=\[)", "\u00a0", text)
    return re.sub(r"(?<=\[)([^\s\]]+), (?=[^\s\]]+\])", "\\1,\u00a0", text)


def cell(text: str) -> Markup:
    """A value with its interval in an element of its own, which a narrow table puts below it."""
    value, bracket, interval = printable(text).partition(" [")
    if not bracket:
        return escape(tied(value))
    return escape(tied(value)) + Markup(' <span class="interval">{}</span>').format(tied(f"[{interval}"))


def coded(text: str) -> Markup:
    """A sentence whose options, and what stands between backticks, are code that no line end breaks: `--reference`."""
    return Markup(
        re.sub(
            r"`([^`<>]+)`|--[a-z][a-z-]*",
            lambda found: f'<code class="option">{found[1] or found[0]}</code>',
            str(escape(printable(text))),
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    words = (alarms, area, cell, coded, cost, difference, gap, plus_minus, points, rate, tied)
    environment.filters |= {word.__name__: word for word in words}
    return environment


@lru_cache
def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


REPORT = "report.html"
Result = AuditResult | ScanResult

SCHEMA = 2
"""Of the JSON: raised when a field changes its meaning or goes away."""


def write_report(results: Result | Sequence[Result], out: str | Path, *, title: str | None = None) -> Path:
    """Write `report.html` and `audit.json` into the folder `out`; returns the path of the report.

    They come together, the JSON last, and carry the same `run`, a digest of the numbers.

    Args:
        results: one audit or scan, or several to be shown side by side.
        out: the folder, new or of an earlier report.
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
    if isinstance(result, ScanResult):
        return {"kind": "scan", **result.to_dict()}
    return {"kind": "audit", **result.to_dict(), "findings": jsonable(findings(result))}
