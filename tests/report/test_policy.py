"""Pages carry a Content-Security-Policy: nothing runs, looks or is fetched but what is ours; and all of it works."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from analyses.study.index import write_index
from analyses.study.results import RESULTS
from decompclip.audit.result import AuditResult
from decompclip.audit.scan_result import ScanResult
from decompclip.bench.page import write_board
from decompclip.data.images import SkippedFile
from decompclip.report import write_report
from tests.report.test_browser import BROWSER, visit

INJECTED = """<script>document.title = "ran"</script><img src="https://example.org/a.png" onerror="document.title = 'ran'">
<style>body { --seen: 1 }</style><link rel="stylesheet" href="https://example.org/a.css"></head>"""
HIDDEN = os.fsdecode(b"caf\xe9") + "\u202ed\x1b[2J\n=1"
"""No UTF-8, turned around, a terminal's command, and a new line."""
SEEN = "caf\\xe9\\u202ed\\x1b[2J\\n=1"


@pytest.fixture(params=["audit", "scan", "bench", "analyses"])
def page(
    request: pytest.FixtureRequest,
    make: Callable[..., AuditResult],
    make_scan: Callable[..., ScanResult],
    tmp_path: Path,
) -> Path:
    if request.param == "bench":
        board = json.loads((RESULTS / "leaderboard" / "leaderboard.json").read_text(encoding="utf-8"))
        return write_board(board, tmp_path)
    if request.param == "analyses":
        (tmp_path / "shapes").mkdir()
        for name in ("figure1", "table1"):
            shutil.copy(RESULTS / "shapes" / f"{name}.json", tmp_path / "shapes")
        return write_index(tmp_path)
    return write_report([make(), make(name="other")] if request.param == "audit" else [make_scan()], tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="needs a browser to look at the page: none is installed")
def test_ours_works_and_what_is_injected_does_not(page: Path, tmp_path: Path) -> None:
    dom, console = visit(page, tmp_path / "profile")
    assert console == []
    figures = len(re.findall(r'<div class="figure"', dom))
    assert len(re.findall(r'class="[^"]*js-plotly-plot"', dom)) == figures
    assert dom.count('class="main-svg"') >= figures
    page.write_text(page.read_text(encoding="utf-8").replace("</head>", INJECTED, 1), encoding="utf-8")
    dom, console = visit(page, tmp_path / "profile")
    assert "<title>ran</title>" not in dom
    blocked = re.findall(r"(script-src(?:-attr)?|style-src(?:-elem)?|img-src) ", " ".join(console))
    assert {name.removesuffix("-elem").removesuffix("-attr") for name in blocked} == {
        "script-src",
        "style-src",
        "img-src",
    }


def test_pages_and_numbers_carry_one_mark(page: Path) -> None:
    if page.name == "index.html":
        return
    numbers = json.loads(next(page.parent.glob("*.json")).read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'<meta name="decompclip-run" content="(\w{16})">', text) == [numbers["run"]]


def test_names_that_cannot_be_seen_are_shown_everywhere(
    make: Callable[..., AuditResult], make_scan: Callable[..., ScanResult], tmp_path: Path
) -> None:
    results = [
        make(name=HIDDEN, classes=("a", "b", HIDDEN), skipped=(SkippedFile(HIDDEN, HIDDEN),)),
        make_scan(name=HIDDEN, target=HIDDEN),
    ]
    path = write_report(results, tmp_path, title=HIDDEN)
    for file in (path, tmp_path / "audit.json"):
        text = file.read_text(encoding="utf-8")  # which is UTF-8
        shown = text[: text.index("<script>/**")] if file == path else text  # plotly.js holds what it likes
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", shown)
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["audits"][0]["name"] == SEEN
    assert f"<title>{SEEN}</title>" in path.read_text(encoding="utf-8")
