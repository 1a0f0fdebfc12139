"""The explorer in a real browser: a saved page, and the same module over messages to Python, as a notebook has it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decompclip.explorer import explore as home
from decompclip.explorer.explore import CSS, JS, Explorer
from tests.report.test_browser import BROWSER, visit
from tests.report.test_page_in_use import Page, one_browser, use  # noqa: F401

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser to look at the explorer: none is installed"
)

DRAWN = "document.querySelector('.dcx')?.getAttribute('aria-busy') === 'false'"
ALIVE = "new Promise(done => setTimeout(done, 20))"
TEXT, OTHER = "a star", "a red ring"


@pytest.fixture(scope="module")
def path(explorer: Explorer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    explorer.answer("ablate", TEXT, 1, 1, "causal")
    return explorer.save_html(tmp_path_factory.mktemp("explorer") / "page.html")


async def click(page: Page, selector: str) -> None:
    """Click where the element lies, as a mouse does."""
    x, y = await page.ask(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
        "const r = e.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        await page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    await page.ask(ALIVE)


async def shown(page: Page, selector: str) -> str:
    return await page.ask(f"document.querySelector({json.dumps(selector)}).textContent")


def cell(layer: int, head: int) -> str:
    """The last layer stands above, below the names of heads."""
    return f".grid > div:nth-child({7 - layer}) > button:nth-of-type({head + 1})"


def signed(value: float, digits: int = 4) -> str:
    size = f"{abs(value):.{digits}f}"
    return size if not float(size) else f"{'−' if value < 0 else '+'}{size}"


@pytest.mark.parametrize(
    "options", [[], ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]], ids=["light", "dark"]
)
def test_it_is_drawn_in_silence(path: Path, tmp_path: Path, options: list[str]) -> None:
    """Names with markup are among the images; what they would run is not defined, and would be heard."""
    dom, console = visit(path, tmp_path / "profile", *options)
    assert console == []
    assert f'data-scheme="{"dark" if options else "light"}"' in dom
    assert len(re.findall(r'<button[^>]+role="gridcell"', dom)) == 6 * 8
    assert "&lt;img src=x onerror=" in dom


def test_a_click_on_a_cell_opens_that_head(path: Path, explorer: Explorer) -> None:
    async def steps(page: Page) -> None:
        await click(page, cell(4, 3))
        assert await shown(page, ".head h3") == "Layer 4, head 3"
        answer = explorer.answer("text", TEXT).arrays
        assert (await shown(page, ".sum")).startswith(
            f"{signed(answer['heads'][0, 4, 3])} of {answer['score'][0]:.3f}"
        )
        words = await page.ask(
            "[...document.querySelectorAll('.words li > :first-child')].map(e => e.textContent)"
        )
        assert words == explorer.answer("words", 4, 3).facts["words"]
        near = await page.ask("[...document.querySelectorAll('.nearest button')].map(e => e.title)")
        assert near == [explorer.names[i] for i in explorer.answer("nearest", 4, 3).arrays["images"][0]]
        after = explorer.answer("ablate", TEXT, 4, 3, "direct").arrays["after"]
        row = await page.ask(
            "[...document.querySelectorAll('.effect tr:nth-child(3) td span:first-child')].map(e => e.textContent)"
        )
        assert [float(x) for x in row] == [float(f"{x:.3f}") for x in (after[0], after.mean())]
        alpha = await page.ask(
            "[...document.querySelector('.pair canvas').getContext('2d').getImageData(0, 0, 6, 6).data].filter((_, i) => i % 4 === 3)"
        )
        patches = explorer.answer("maps", TEXT, 0).arrays["patches"][4 * 8 + 3]
        np.testing.assert_allclose(alpha, 225 * np.abs(patches.astype(float)) / 127, atol=1)
        await click(page, cell(0, 0))  # whose causal effect nobody asked for
        assert await shown(page, ".effect tr:nth-child(4) td") == "needs a kernel"

    use(path, steps, DRAWN)


def test_everything_that_is_chosen_changes_the_view(path: Path, explorer: Explorer) -> None:
    async def steps(page: Page) -> None:
        await click(page, ".thumbs label:nth-of-type(6) img")
        score = explorer.answer("text", TEXT).arrays["score"]
        assert f"cosine {score[5]:.3f} to “a star”" in await shown(page, ".shown")
        await click(page, ".chips label:nth-of-type(2) span")
        answer = explorer.answer("text", OTHER).arrays
        assert f"cosine {answer['score'][5]:.3f} to “a red ring”" in await shown(page, ".shown")
        terms = {
            f"head {layer}.{head}": answer["heads"][5, layer, head] for layer in range(6) for head in range(8)
        }
        terms |= {f"MLP {layer}": value for layer, value in enumerate(answer["mlps"][5])}
        top = sorted(terms, key=lambda name: -abs(terms[name]))[:12]
        bars = await page.ask(
            "[...document.querySelectorAll('.bars li')].map(e => [e.querySelector('span').textContent, e.querySelector('.number').textContent])"
        )
        assert bars == [[name, signed(terms[name])] for name in top]
        await click(page, ".model-map .switch label:nth-of-type(2) span")
        assert await page.ask(f"document.querySelector('{cell(2, 5)}').getAttribute('aria-label')") == (
            f"layer 2, head 5: {signed(float(answer['heads'][:, 2, 5].mean(dtype=np.float64)))}"
        )
        await click(page, ".head .switch label:nth-of-type(2) span")
        assert "Where the head looks" in await shown(page, ".pair .soft")
        await click(page, cell(1, 1))
        after = explorer.answer("ablate", TEXT, 1, 1, "causal").arrays["after"][5]
        await click(page, ".chips label:nth-of-type(1) span")
        assert (await shown(page, ".effect tr:nth-child(4) td")).startswith(f"{after:.3f}")
        await click(page, ".strip button:nth-of-type(2)")
        assert (await shown(page, ".head h3")).endswith(", head 1")
        other = await page.ask("document.querySelector('.nearest button').title")
        await click(page, ".nearest button")
        assert await shown(page, ".shown strong") == other

    use(path, steps, DRAWN)


def test_all_of_it_is_reached_and_moved_by_keys(path: Path) -> None:
    async def steps(page: Page) -> None:
        seen: dict[str, str] = {}
        for _ in range(60):
            await page.press("Tab")
            at = await page.ask(
                "(() => { const e = document.activeElement, shown = e.type === 'radio' ? e.nextSibling : e; return [e.type === 'radio' ? "
                "e.name.replace(/^dcx\\d+-/, '') : e.getAttribute('role') || e.closest('section')?.className || e.tagName, "
                "getComputedStyle(shown).outlineStyle]; })()"
            )
            seen.setdefault(*at)
        assert {"texts", "image", "over", "map", "gridcell", "model-map", "head", "layer"} <= set(seen)
        assert {name for name, outline in seen.items() if outline == "none"} <= {"BODY", "HTML"}

        await page.ask("document.querySelector('[role=gridcell][tabindex=\"0\"]').focus()")
        await page.press("End")
        before = await shown(page, ".head h3")
        await page.press("ArrowUp")
        await page.press("ArrowRight")  # there is no head further right
        await page.ask(ALIVE)
        layer = int(before.split(",")[0].split()[1])
        assert await shown(page, ".head h3") == f"Layer {min(5, layer + 1)}, head 7"
        assert await page.ask("document.activeElement.getAttribute('aria-selected')") == "true"
        assert await page.ask("document.querySelectorAll('[role=gridcell][tabindex=\"0\"]').length") == 1

    use(path, steps, DRAWN)


def test_every_control_has_a_name(path: Path) -> None:
    async def steps(page: Page) -> None:
        nodes = (await page.send("Accessibility.getFullAXTree"))["nodes"]
        roles = {"button", "radio", "gridcell", "textbox", "grid", "radiogroup", "group"}
        nameless = [
            node["role"]["value"]
            for node in nodes
            if not node.get("ignored")
            and node.get("role", {}).get("value") in roles
            and not node.get("name", {}).get("value")
        ]
        assert nameless == []

    use(path, steps, DRAWN)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_page_is_wider_than_its_screen(path: Path, width: int) -> None:
    async def steps(page: Page) -> None:
        await page.resize(width, 800)
        await asyncio.sleep(0.2)
        assert await page.ask("document.documentElement.scrollWidth") <= width
        assert (
            await page.ask(
                f"[...document.querySelectorAll('.dcx *')].filter(e => e.checkVisibility() && !e.closest('.thumbs, .vocabulary') && "
                f"e.getBoundingClientRect().right > {width} + 1).map(e => e.className || e.tagName)"
            )
            == []
        )

    use(path, steps, DRAWN)


# As in a notebook: the module asks, Python's widget answers

LIVE = """<!doctype html><meta charset="utf-8"><style>{css}</style><body style="background: #111"><main></main><script type="module">{js}
const heard = {{}};
window.state = {state};
window.out = [];
window.tell = (event, ...values) => (heard[event] ?? []).forEach((hear) => hear(...values));
window.back = (message, buffers) => tell("msg:custom", message, buffers.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer)));
const model = {{
  get: (name) => state[name], set: (name, value) => {{ state[name] = value; tell(`change:${{name}}`); }}, save_changes() {{}},
  on: (event, hear) => (heard[event] ??= []).push(hear), off: (event, hear) => {{ heard[event] = heard[event].filter((x) => x !== hear); }},
  send: (message) => out.push(message),
}};
window.leave = render({{ model, el: document.querySelector("main") }});
</script>"""


def live(
    explorer: Explorer, path: Path, steps: Callable[[Page, Callable[[], Awaitable[None]]], Awaitable[None]]
) -> None:
    """The module in a page of its own, whose questions are carried to the widget's handler and back."""
    pytest.importorskip("anywidget", reason="needs anywidget: pip install 'decompclip[explore]'")
    widget = explorer.widget
    replies: list[tuple[Any, list[memoryview]]] = []
    widget.send = lambda content, buffers=None: replies.append((content, buffers or []))
    state = json.dumps(explorer.first() | {"about": explorer.about()}).replace("<", "\\u003c")
    path.write_text(LIVE.format(css=CSS, js=JS, state=state), encoding="utf-8")

    async def run(page: Page) -> None:
        async def carry() -> None:
            """Until nothing is asked any more."""
            while questions := await page.ask(f"{ALIVE}.then(() => out.splice(0))"):
                for question in questions:
                    widget._handle_custom_msg(question, [])
                for content, buffers in replies:
                    data = [base64.b64encode(x).decode() for x in buffers]
                    await page.ask(f"back({json.dumps(content)}, {json.dumps(data)})")
                replies.clear()
            await page.ask(ALIVE)

        await carry()
        await steps(page, carry)

    use(path, run, "Boolean(window.leave)")


async def typed(page: Page, text: str) -> None:
    await page.ask("document.querySelector('.ask input').focus()")
    await page.send("Input.insertText", text=text)
    await page.press("Enter")


def test_a_typed_text_is_answered(explorer: Explorer, tmp_path: Path) -> None:
    async def steps(page: Page, carry: Callable[[], Awaitable[None]]) -> None:
        assert await page.ask(DRAWN)
        assert (
            await page.ask("document.querySelector('.dcx').dataset.scheme") == "dark"
        )  # as what lies behind
        await typed(page, "a blue square")
        await carry()
        score = explorer.answer("text", "a blue square").arrays["score"]
        assert f"cosine {score[0]:.3f} to “a blue square”" in await shown(page, ".shown")
        assert await page.ask("state.texts.at(-1)") == "a blue square"
        await typed(page, "a blue <b>unicorn</b>")
        await carry()
        assert "unicorn" in await shown(page, ".said")
        assert await page.ask("document.querySelectorAll('.dcx b b').length") == 0
        await page.ask("document.querySelector('.chips input').click()")
        await carry()
        assert await shown(page, ".said") == ""
        await typed(page, "   ")
        assert "Type a text" in await shown(page, ".said")

    live(explorer, tmp_path / "live.html", steps)


def test_a_causal_effect_comes_at_a_click(explorer: Explorer, tmp_path: Path) -> None:
    async def steps(page: Page, carry: Callable[[], Awaitable[None]]) -> None:
        await page.ask(f"document.querySelector('{cell(2, 6)}').click()")
        await carry()
        assert await shown(page, ".effect tr:nth-child(4) td") == "Run"
        await click(page, ".effect button")
        assert await shown(page, ".effect tr:nth-child(4) td") == "running all images…"
        await carry()
        after = explorer.answer("ablate", TEXT, 2, 6, "causal").arrays["after"]
        assert float(await shown(page, ".effect tr:nth-child(4) td span")) == float(f"{after[0]:.3f}")

    live(explorer, tmp_path / "live.html", steps)


def test_what_python_sets_is_shown_and_what_fails_is_said(
    explorer: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("<i>out of memory</i>")

    async def steps(page: Page, carry: Callable[[], Awaitable[None]]) -> None:
        await page.ask("state.layer = 1, state.head = 2, tell('change:layer')")
        await carry()
        assert await shown(page, ".head h3") == "Layer 1, head 2"
        monkeypatch.setattr(home, "encode_texts", fails)
        await typed(page, "a text that fails")
        await carry()
        assert await shown(page, ".said") == "<i>out of memory</i>"
        assert await page.ask("state.text") == TEXT
        await page.ask("leave()")
        assert await page.ask("document.querySelectorAll('.dcx').length") == 0

    live(explorer, tmp_path / "live.html", steps)
