"""Importing decompclip and asking for help are instant: heavy libraries wait until they are needed."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import decompclip
from decompclip import files
from decompclip.api import still_found
from decompclip.cli import app

HEAVY = ("torch", "transformer_lens", "open_clip", "plotly", "pandas")
HELP = "sys.argv = ['decompclip', '--help']; runpy.run_module('decompclip', run_name='__main__')"
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


MISTAKES = [
    ("demo --out FILE", "FILE is a file"),
    ("audit shapez --clean shapes --out x", "there is no model 'shapez'"),
    ("audit shapes --clean nowhere/ --out x", "there is no folder nowhere/"),
    ("audit shapes --clean shapes --target star --out x", "expected --suspect"),
    ("audit shapes --clean shapes --trigger rain --out x", "expected a trigger among"),
    ("audit shapes --clean . --trigger own --out x", "expected --trigger with --clean shapes"),
    ("audit shapes --clean shapes --reference shapez --out x", "there is no model 'shapez'"),
    ("audit shapes --clean shapes --limit few --out x", "expected a number of images, or all"),
    ("diagnose shapes --images nowhere/", "there is no folder nowhere/"),
    ("diagnose shapes --images shapes --classes none.txt", "--classes; there is no file none.txt"),
    ("evaluate shapes nowhere/", "there is no folder nowhere/"),
    ("evaluate shapes shapes --checkpoint none.pt", "there is no file none.pt"),
    ("evaluate shapes shapes --trigger rain", "expected a trigger among"),
    ("evaluate shapes shapes --target star", "--trigger is missing"),
    ("evaluate shapes shapes --templates none.txt", "--templates; there is no file none.txt"),
    ("evaluate shapes shapes --out .", "is a folder"),
    ("apply-trigger nowhere/ --trigger badnet --size 32 --out x", "there is no folder nowhere"),
    ("apply-trigger . --trigger badnet --out x", "expected --model or --size"),
    ("apply-trigger . --trigger rain --size 32 --out x", "expected a trigger among"),
    ("poison none.csv --target star --count 5 --out x", "there is no file none.csv"),
    ("poison shapes --target star --out x", "expected --count or --rate"),
    ("poison shapes --target star --count 0 --out x", "greater than or equal to 1"),
    ("extract shapes nowhere/ --out x", "there is no folder nowhere/"),
    ("extract shapes shapes --out FILE", "FILE is a file"),
    ("extract shapes shapes --dtype int8 --out x", "is not one of 'fp32', 'fp16', 'bf16'"),
    ("finetune shapes nowhere/ --out x", "there is no folder nowhere/"),
    ("finetune shapes shapes --trigger badnet --out x", "expected --images"),
    ("finetune shapes shapes --epochs 0 --out x", "greater than or equal to 1"),
    ("repair shapes --clean nowhere/ --method rep --out x", "there is no folder nowhere/"),
    ("repair shapes --clean shapes --method rep --out . ", "holds files; name another"),
    ("repair shapes --clean shapes --method par --hint local --out x", "expected --method rep with --hint"),
    ("bench --out FILE", "FILE is a file"),
    ("bench --models nobody --out x", "expected a model among"),
    ("bench --detectors nobody --out x", "expected a detector among"),
    ("bench --repairs nobody --out x", "expected a repair among"),
    ("bench --count 3 --out x", "greater than or equal to 40"),
    ("data check nowhere/", "there is no folder nowhere/"),
    ("data check imagenet:nowhere/", "there is no folder nowhere/"),
    ("zoo card nobody", "no bundled model 'nobody'"),
    ("zoo build shapes-badnet --out FILE", "FILE is a file"),
]
ALL = """
import json, sys
from typer.testing import CliRunner
from decompclip.cli import app
for words in json.loads(sys.argv[1]):
    found = CliRunner().invoke(app, words.split(), env={"COLUMNS": "200"})
    print(json.dumps([found.exit_code, found.stderr, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def test_a_plain_mistake_is_found_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "FILE").touch()
    given = (json.dumps([words for words, _ in MISTAKES]), json.dumps(HEAVY))
    run = subprocess.run(
        [sys.executable, "-c", ALL, *given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = run.stdout.splitlines()
    for (words, message), (code, stderr, heavy) in zip(MISTAKES, map(json.loads, lines), strict=True):
        assert (code, heavy) == (2, []), (words, stderr)
        assert message in stderr and "loading" not in stderr, (words, stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_every_command_is_among_the_mistakes() -> None:
    named = {
        command.name or str(command.callback and command.callback.__name__)
        for command in app.registered_commands
    }
    assert {words.split()[0].replace("-", "_") for words, _ in MISTAKES} == named | {"zoo", "data"}


def test_every_public_name_is_there() -> None:
    assert len(decompclip.__all__) == len(set(decompclip.__all__))
    assert len(decompclip.__all__) <= 90
    for name in decompclip.__all__:
        assert getattr(decompclip, name) is not None
    assert set(decompclip.__all__) <= set(dir(decompclip))
    with pytest.raises(AttributeError, match="No decompclip attribute lod"):
        getattr(decompclip, "lod")  # noqa: B009 - a name that type checkers refuse


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function and class, and their public methods, by name."""
    for name in decompclip.__all__:
        value = getattr(decompclip, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        for method, given in vars(value).items() if inspect.isclass(value) else ():
            plain = given.__func__ if isinstance(given, classmethod | staticmethod) else given
            if inspect.isfunction(plain) and not method.startswith("_"):
                yield f"{name}.{method}", plain


def entries(docstring: str) -> list[str]:
    """The names that a section `Args:` has, in Google's style: one entry a parameter."""
    _, _, section = inspect.cleandoc(docstring).partition("\nArgs:\n")
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^    \*{0,2}(\w+):", section, flags=re.MULTILINE)


def test_arguments_that_are_explained_are_those_that_there_are() -> None:
    explained = {name: (given, entries(given.__doc__ or "")) for name, given in functions()}
    wrong = {
        name: sorted(set(found) ^ (set(inspect.signature(given).parameters) - {"self", "cls"}))
        for name, (given, found) in explained.items()
        if found
    }
    assert {name: odd for name, odd in wrong.items() if odd} == {}
    assert sum(bool(found) for _, found in explained.values()) > 120


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
