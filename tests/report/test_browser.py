"""The report in a real browser: it draws every figure, and nothing goes wrong on the console."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from decompclip.audit.result import AuditResult
from decompclip.audit.scan_result import ScanResult
from decompclip.data.images import SkippedFile
from decompclip.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --enable-logging=stderr"

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser to look at the report: none of {', '.join(NAMES)} is installed"
)


def visit(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The page's elements once its scripts have run, and what its console said."""
    assert BROWSER is not None
    run = subprocess.run(
        [
            BROWSER,
            *QUIET.split(),
            f"--user-data-dir={profile}",
            "--virtual-time-budget=20000",
            "--dump-dom",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, re.findall(r"CONSOLE.*", run.stderr)


def test_a_page_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>nobody.defined(this)</script>")
    _, console = visit(page, tmp_path / "profile")
    assert "nobody is not defined" in console[0]


@pytest.mark.parametrize(
    "options", [[], ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]], ids=["light", "dark"]
)
def test_it_draws_everything_in_silence(
    make: Callable[..., AuditResult], tmp_path: Path, options: list[str]
) -> None:
    evil = "<img src=x onerror=nobody.defined()>"
    results = [
        make(),
        make(
            name=evil,
            labelled=False,
            inferred=True,
            classes=("a", "b", evil),
            skipped=(SkippedFile(evil, evil),),
        ),
    ]
    dom, console = visit(write_report(results, tmp_path), tmp_path / "profile", *options)
    assert console == []
    assert dom.count('class="main-svg"') >= 2 * 9
    assert len(re.findall(r'class="chart js-plotly-plot"', dom)) == 2 * 9


def test_a_scan_is_drawn_in_silence(make_scan: Callable[..., ScanResult], tmp_path: Path) -> None:
    evil = "<img src=x onerror=nobody.defined()>"
    page = write_report([make_scan(), make_scan(name=evil, target=evil, reference=False)], tmp_path)
    dom, console = visit(page, tmp_path / "profile")
    assert console == []
    assert len(re.findall(r'class="chart js-plotly-plot"', dom)) == 4
