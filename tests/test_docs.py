"""The documentation is true: its code runs, its commands end well, its site builds without a warning and opens without a network."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

import decompclip
from decompclip.audit.verdict import LOWERED, RULES
from decompclip.cli import app
from decompclip.cli.repair import Method
from tests.report.test_browser import BROWSER

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


def test_methods_of_repair_are_the_command_s() -> None:
    rows = "".join(re.findall(r"^\| (`[^|]+) \|", PAGES["repair"], flags=re.MULTILINE))
    assert set(re.findall(r"`([\w-]+)`", rows)) == {method.value for method in Method}


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


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    pages = {
        path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"
    }
    seen = 0
    for path, page in pages.items():
        for link in re.findall(r'href="?([^" >]+)', page):
            place, _, part = unquote(unescape(link)).partition("#")
            if re.match(r"\w+:", place):
                continue
            target = (path.parent / place).resolve() if place else path
            assert target.exists(), (path.name, link)
            assert not part or re.search(rf'id="?{re.escape(part)}["\s>]', pages[target]), (path.name, link)
            seen += 1
    assert seen > 1_000


@pytest.mark.skipif(BROWSER is None, reason="needs a browser to look at the site: none is installed")
def test_every_page_of_the_site_opens_in_silence_and_fits_a_phone(site: Path) -> None:
    pytest.importorskip("choreographer", reason="needs kaleido's browser driver, choreographer")
    from tests.report.test_page_in_use import Page, browser, there, use

    paths = sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # which a server shows
    heard: list[object] = []
    wide: list[str] = []

    async def listen(event: object) -> None:
        heard.append(event)

    async def steps(page: Page) -> None:
        for event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            page.tab.subscribe(event, listen, repeating=True)
        for domain in ("Runtime", "Log", "Page"):
            await page.send(f"{domain}.enable")
        await page.resize(390, 800)
        for path in paths:
            await page.send("Page.navigate", url=path.as_uri())
            there_yet = f"document.readyState === 'complete' && location.href === {json.dumps(path.as_uri())}"
            for _ in range(200):
                if await page.ask(there_yet):
                    break
                await asyncio.sleep(0.05)
            assert await page.ask("document.querySelector('h1') !== null"), path
            if await page.ask("document.documentElement.scrollWidth") > 390:
                wide.append(path.name)
        assert heard == [] and wide == []
        await page.ask("console.error('heard')")
        await asyncio.sleep(0.1)
        assert heard

    try:
        use(paths[0], steps, "document.readyState === 'complete'")
    finally:
        there(browser().close())
        browser.cache_clear()


def test_each_public_name_has_its_signature(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    for name in decompclip.__all__:
        assert f'id="decompclip.{name}"' in pages, name
    assert "decompclip.load" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
