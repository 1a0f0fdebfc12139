"""Importing decompclip and asking for help are instant: heavy libraries wait until they are needed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import decompclip
from decompclip import files
from decompclip.moved import still_found

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
    assert len(decompclip.__all__) == len(set(decompclip.__all__))
    assert 80 < len(decompclip.__all__) <= 90
    for name in decompclip.__all__:
        assert getattr(decompclip, name) is not None
    assert set(decompclip.__all__) <= set(dir(decompclip))
    with pytest.raises(AttributeError, match="No decompclip attribute lod"):
        getattr(decompclip, "lod")  # noqa: B009 - a name that type checkers refuse


@pytest.mark.parametrize("name", [n for names in decompclip.MOVED.values() for n in names.split()])
def test_a_name_that_moved_is_found_with_a_warning(name: str) -> None:
    old, _, new = name.partition("=")
    (place,) = [place for place, names in decompclip.MOVED.items() if name in names.split()]
    with pytest.warns(DeprecationWarning, match=f"decompclip.{old} is now {place}.{new or old};") as found:
        value = getattr(decompclip, old)
    assert value is getattr(importlib.import_module(place), new or old)
    assert found[0].filename == __file__
    assert old not in {*decompclip.__all__, *dir(decompclip)}


def test_a_module_may_keep_names_of_its_own() -> None:
    find = still_found("m", {"decompclip.files": "old=write_text"})
    with pytest.warns(DeprecationWarning, match="m.old is now decompclip.files.write_text"):
        assert find("old") is files.write_text
    with pytest.raises(AttributeError, match="module 'm' has no attribute 'other'"):
        find("other")


def test_the_version_is_the_package_s() -> None:
    assert decompclip.__version__ == version("decompclip")
