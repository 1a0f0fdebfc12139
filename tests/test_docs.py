"""The documentation is true: its code runs, its commands end well, its site builds without a warning and opens without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import decompclip
from decompclip.audit.verdict import LOWERED, RULES
from decompclip.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of code of a page, with their languages."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("few_kept")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if {"python", "sh"} & {name for name, _ in blocks(page)}]
)
def test_code_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One block after another, as a reader would: Python in one namespace, commands in the same folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), namespace)
        elif language == "sh":
            for command in text.replace("\\\n", " ").splitlines():
                run_command(command)


def run_command(command: str) -> None:
    words = command.split(" #", maxsplit=1)[0].split()
    if words[0] == "decompclip":
        run = CliRunner().invoke(app, words[1:])
        assert run.exit_code == 0, (command, run.output, run.exception)
    else:
        assert words[:4] == ["python", "-m", "pip", "install"], command


def test_each_of_the_ten_tasks_takes_three_lines_at_most() -> None:
    _, *tasks = [text for language, text in blocks("tasks") if language == "python"]
    assert len(tasks) == PAGES["tasks"].count("\n## ") == 10
    assert max(text.count("\n") for text in tasks) <= 3


def test_names_of_extras_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(
        r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], flags=re.MULTILINE
    )
    assert set(re.findall(r"`\.\[(\w+)\]`", PAGES["index"])) == set(extras)


def test_the_table_of_confidence_is_the_verdict_s() -> None:
    for rule in RULES:
        assert f"| {rule.level} | {rule.confidence} | {rule.when} |\n" in PAGES["confidence"]
    assert LOWERED in PAGES["confidence"]


def test_messages_are_the_package_s() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "decompclip").rglob("*.py")]
    said = [
        re.findall(r"`([^`]+)`", row.split(" | ")[0])
        for row in PAGES["errors"].splitlines()
        if row.startswith("| `")
    ]
    assert len(said) > 12
    for fragments in said:
        assert any(all(part.replace("\\|", "|") in text for part in fragments) for text in sources), fragments


def test_every_public_name_stands_in_an_example_of_the_reference() -> None:
    used = set(
        re.findall(r"\w+", "".join(text for language, text in blocks("reference") if language == "python"))
    )
    assert sorted(set(decompclip.__all__) - used) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_the_site_asks_nothing_of_a_server(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert len(pages) > 25
    for page in pages:
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=.?(?:https?:)?//", page)


def test_each_public_name_has_its_signature(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    for name in decompclip.__all__:
        assert f'id="decompclip.{name}"' in pages, name
    assert "decompclip.load" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
