"""Importing decompclip and asking for help are instant: heavy libraries wait until they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import decompclip

HEAVY = ("torch", "transformer_lens", "open_clip", "plotly", "pandas")
HELP = "sys.argv = ['decompclip', '--help']; runpy.run_module('decompclip.cli', run_name='__main__')"
PROBE = """
import atexit, json, runpy, sys, time
start = time.process_time()
def tell():
    seconds = time.process_time() - start
    print(json.dumps([sorted({{name.partition(".")[0] for name in sys.modules}}), seconds]), file=sys.stderr)
atexit.register(tell)
{statement}
"""


def probe(statement: str) -> tuple[set[str], float]:
    """Packages loaded and CPU seconds spent by a fresh Python that runs `statement`."""
    script = PROBE.format(statement=statement)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    loaded, seconds = json.loads(run.stderr.splitlines()[-1])
    return set(loaded), seconds


def test_the_probe_sees_a_heavy_import() -> None:
    loaded, seconds = probe("import numpy")
    assert "numpy" in loaded
    assert seconds > 0


@pytest.mark.parametrize(
    ("statement", "limit"), [("import decompclip", 0.5), (HELP, 1.0)], ids=["import", "help"]
)
def test_start_is_light(statement: str, limit: float) -> None:
    loaded, seconds = probe(statement)
    assert "decompclip" in loaded
    assert not loaded.intersection(HEAVY)
    assert seconds < limit


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "shapes", "--clean", "nowhere/", "--out", "x"),
        ("audit", "shapes", "--clean", "shapes", "--target", "star", "--out", "x"),
        ("apply-trigger", "nowhere/", "--trigger", "badnet", "--size", "32", "--out", "x"),
        ("apply-trigger", ".", "--trigger", "badnet", "--out", "x"),
    ],
    ids=str,
)
def test_a_plain_mistake_is_said_before_anything_heavy_is_imported(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    script = (
        "import atexit, runpy, sys\n"
        f"sys.argv = {['decompclip', *words]!r}\n"
        f"atexit.register(lambda: print(*[name for name in {HEAVY!r} if name in sys.modules]))\n"
        "runpy.run_module('decompclip.cli', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 2 and run.stderr.startswith("error: expected"), run.stderr
    assert run.stdout.strip() == ""
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_there() -> None:
    assert len(decompclip.__all__) == len(set(decompclip.__all__)) > 80
    for name in decompclip.__all__:
        assert getattr(decompclip, name) is not None
    assert set(decompclip.__all__) <= set(dir(decompclip))
    with pytest.raises(AttributeError, match="No decompclip attribute lod"):
        getattr(decompclip, "lod")  # noqa: B009 - a name that type checkers refuse


def test_the_version_is_the_package_s() -> None:
    assert decompclip.__version__ == version("decompclip")
