"""The report in use: by keyboard alone, on small and large screens, in both schemes, and on paper."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from decompclip.audit.result import AuditResult
from decompclip.audit.scan_result import ScanResult
from decompclip.report import write_report
from tests.report.test_browser import BROWSER

choreographer = pytest.importorskip("choreographer", reason="needs kaleido's browser driver, choreographer")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser to look at the report: none is installed"
)

T = TypeVar("T")

KEYS = {
    "Tab": (9, None),
    "Enter": (13, "\r"),
    "ArrowUp": (38, None),
    "ArrowRight": (39, None),
    "End": (35, None),
}


DRAWN = """document.readyState === 'complete' && document.getElementById('verdict') && document.querySelectorAll('.figure').length ===
[...document.querySelectorAll('.js-plotly-plot')].filter(chart => chart._fullLayout).length"""


class Page:
    """A tab of the browser, driven over its debugging protocol."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        answer = await self.tab.send_command(method, parameters)
        assert "error" not in answer, answer
        return answer["result"]

    async def ask(self, script: str) -> Any:
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def press(self, key: str) -> None:
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        await self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    async def resize(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )


@cache
def loop() -> asyncio.AbstractEventLoop:
    """Runs in a thread of its own as long as the tests, for the browser belongs to it."""
    running = asyncio.new_event_loop()
    threading.Thread(target=running.run_forever, daemon=True).start()
    return running


def there(steps: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(steps, 120), loop()).result()


@cache
def browser() -> Any:
    async def opened() -> Any:
        return await choreographer.Browser(path=BROWSER, headless=True)

    return there(opened())


@pytest.fixture(scope="module", autouse=True)
def one_browser() -> Iterator[None]:
    """For all tests of a module."""
    yield
    if browser.cache_info().currsize:
        there(browser().close())
        browser.cache_clear()


def use(path: Path, steps: Callable[[Page], Awaitable[None]], drawn: str = DRAWN) -> None:
    """Open the page in a tab that knows nothing of others, wait until it is drawn (by default, all figures of a report), and
    carry out the steps."""
    chromium = browser()

    async def run() -> None:
        tab = await chromium.create_tab(path.as_uri())
        page = Page(tab)
        try:
            there_yet = (
                f"location.href === {json.dumps(path.as_uri())} && ({drawn})"  # a blank tab is complete too
            )
            for _ in range(600):
                if await page.ask(there_yet):
                    break
                await asyncio.sleep(0.1)
            else:
                raise AssertionError(f"expected {path.name} to be drawn within a minute")
            await steps(page)
        finally:
            await page.ask("localStorage.clear()")  # files share it
            await chromium.close_tab(tab.target_id)

    there(run())


@pytest.fixture(scope="module", params=["audit", "scan"])
def path(
    request: pytest.FixtureRequest,
    make: Callable[..., AuditResult],
    make_scan: Callable[..., ScanResult],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    results = [make(), make(name="other")] if request.param == "audit" else [make_scan()]
    return write_report(results, tmp_path_factory.mktemp(request.param))


def test_everything_is_reached_by_keyboard(path: Path) -> None:
    async def steps(page: Page) -> None:
        wanted = await page.ask(
            "[...document.querySelectorAll('a[href], button, summary, .scroll')]"
            ".filter(e => e.checkVisibility()).length"
        )
        reached = set()
        for _ in range(wanted + 5):
            await page.press("Tab")
            reached.add(
                await page.ask(
                    "[...document.querySelectorAll('*')].indexOf(document.activeElement) + ':' + "
                    "(document.activeElement.getAttribute('download') || document.activeElement.id || document.activeElement.tagName)"
                )
            )
        names = {name.split(":", 1)[1] for name in reached}
        assert "scheme" in names and "SUMMARY" in names
        assert sum(name.endswith(".csv") for name in names) == await page.ask(
            "document.querySelectorAll('.download').length"
        )

        await page.ask("document.activeElement.blur(); window.scrollTo(0, 0)")
        await page.ask("document.querySelector('.skip').focus()")
        assert await page.ask("document.querySelector('.skip').getBoundingClientRect().left") >= 0
        await page.press("Enter")
        assert await page.ask("document.activeElement.id") == "verdict"

    use(path, steps)


def test_the_scheme_changes_by_keyboard_and_figures_with_it(path: Path) -> None:
    async def steps(page: Page) -> None:
        ink = "document.querySelector('.js-plotly-plot')._fullLayout.font.color"
        ground = "getComputedStyle(document.body).backgroundColor"
        before = await page.ask(ground), await page.ask(ink)
        await page.ask("document.getElementById('scheme').focus()")
        await page.press("Enter")
        assert await page.ask("document.documentElement.dataset.scheme") == "dark"
        after = await page.ask(ground), await page.ask(ink)
        assert before[0] != after[0] and before[1] != after[1]
        await page.press("Enter")
        assert await page.ask(ground) == before[0]

    use(path, steps)


def test_no_page_is_wider_than_its_screen(path: Path) -> None:
    async def steps(page: Page) -> None:
        for width in (320, 390, 820, 1440):
            await page.resize(width, 800)
            await asyncio.sleep(0.3)
            assert await page.ask("document.documentElement.scrollWidth") <= width
            outside = (
                "[...document.querySelectorAll('h1, h2, h3, p, li, summary, .download')].filter(e => e.checkVisibility() && "
                f"e.getBoundingClientRect().right > {width} + 1 && !e.closest('.scroll')).map(e => e.textContent.slice(0, 40))"
            )
            assert await page.ask(outside) == [], width

    use(path, steps)


def test_on_paper_no_table_is_past_its_box(path: Path) -> None:
    async def steps(page: Page) -> None:
        await page.send("Emulation.setEmulatedMedia", media="print")
        await page.resize(717, 1000)  # A4 less its margins
        await page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        await asyncio.sleep(0.3)
        outside = (
            "[...document.querySelectorAll('table, .figure')].filter(e => e.getBoundingClientRect().right > "
            "e.closest('section, main').getBoundingClientRect().right + 1).map(e => e.className)"
        )
        assert await page.ask("document.querySelectorAll('table').length") > 3
        assert await page.ask(outside) == []

    use(path, steps)


PAINTED = re.compile(rb"\bq\b|\bQ\b|((?:[-.\d]+ )+)(cm|Tm|Td)\b|/MCID (\d+) ?>>\s*BDC|\bTj\b")
"""Of a page's operators those that place its text."""


def lowest(stream: bytes) -> dict[int, float]:
    """The lowest baseline of each marked part of a printed page that has text; heights count upward, in points."""

    def placed(row: tuple[float, ...], a: float, b: float, c: float, d: float, e: float, f: float) -> Any:
        across, up, height = row
        return across * a + up * b, across * c + up * d, across * e + up * f + height

    now, before, line, part = (0.0, 1.0, 0.0), [], (0.0, 1.0, 0.0), -1  # of a matrix, what makes heights
    low: dict[int, float] = {}
    for found in PAINTED.finditer(stream):
        numbers, operator, mark = found.groups()
        values = [float(number) for number in (numbers or b"").split()]
        if operator == b"cm":
            now = placed(now, *values)
        elif operator == b"Tm":
            line = placed(now, *values)
        elif operator == b"Td":
            line = placed(line, 1, 0, 0, 1, *values)
        elif mark:
            part = int(mark)
        elif found[0] == b"q":
            before.append(now)
        elif found[0] == b"Q":
            now = before.pop()
        else:
            low[part] = min(low.get(part, line[2]), line[2])
    return low


def headings(pdf: bytes) -> tuple[int, list[bytes]]:
    """How many headings a tagged PDF of Chromium has, and those that have no text below them on their page."""
    things = dict(re.findall(rb"\n(\d+) 0 obj\n(.*?)\nendobj", pdf, re.DOTALL))

    def number(thing: bytes, name: bytes) -> bytes:
        found = re.search(rb"/%s (\d+)" % name, thing)
        assert found, thing
        return found[1]

    def marks(thing: bytes) -> list[tuple[bytes, int]]:
        """The marked parts of an element, each with its page."""
        found = re.search(rb"/K \[?([^\]>]*)", thing)
        children = re.findall(rb"(\d+) 0 R", found[1]) if found else []
        own = re.findall(rb"\d+", re.sub(rb"\d+ 0 R", b"", found[1])) if found else []
        return [(number(thing, b"Pg"), int(mark)) for mark in own] + [
            mark for child in children for mark in marks(things[child])
        ]

    low = {
        page: lowest(zlib.decompress(things[number(thing, b"Contents")].split(b"stream\n", 1)[1]))
        for page, thing in things.items()
        if re.search(rb"/Type /Page\b", thing)
    }
    found = [thing for thing in things.values() if re.search(rb"/S /H[1-6]\b", thing)]
    alone = []
    for heading in found:
        own = marks(heading)
        page = own[-1][0]
        end = min(low[page][mark] for place, mark in own if place == page)
        if not any(height < end for mark, height in low[page].items() if (page, mark) not in own):
            alone.append(heading)
    return len(found), alone


async def printed(page: Page) -> bytes:
    return base64.b64decode(
        (await page.send("Page.printToPDF", printBackground=True, generateTaggedPDF=True))["data"]
    )


def test_a_stranded_heading_is_noticed(tmp_path: Path) -> None:
    for tall, alone in ((880, 1), (300, 0)):
        page = tmp_path / f"{tall}.html"
        page.write_text(
            f"<!doctype html><div style='height: {tall}px'>above</div><h2>A heading <em>in parts</em></h2>"
            "<p style='break-inside: avoid; margin: 0'>its text<br>of two lines<br>and three</p>"
            "<svg height=90><text transform='rotate(-90 20 80)' x=20 y=80>up</text></svg>"
        )

        async def steps(tab: Page, alone: int = alone) -> None:
            count, found = headings(await printed(tab))
            assert (count, len(found)) == (1, alone)

        use(page, steps, "document.readyState === 'complete'")


def test_on_paper_all_is_unfolded_and_light_and_no_heading_stands_alone(path: Path) -> None:
    async def steps(page: Page) -> None:
        await page.ask("document.getElementById('scheme').click()")
        folded = await page.ask("document.querySelectorAll('details:not([open])').length")
        assert folded
        await page.ask(
            "window.addEventListener('beforeprint', () => { window.atPrint = ["
            "document.querySelectorAll('details:not([open])').length, document.documentElement.dataset.scheme] })"
        )
        pdf = await printed(page)
        assert pdf.startswith(b"%PDF")
        pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
        assert 2 <= pages <= 40 and len(pdf) < 5_000_000
        count, alone = headings(pdf)
        assert count > 10 and alone == []
        assert await page.ask("window.atPrint") == [0, "light"]
        assert await page.ask("document.querySelectorAll('details:not([open])').length") == folded
        assert await page.ask("document.documentElement.dataset.scheme") == "dark"

    use(path, steps)
