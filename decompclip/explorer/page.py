"""The view's files, and the page around it that needs no kernel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from decompclip.printable import printable, printable_all


def _text(name: str) -> str:
    return (files("decompclip.explorer") / name).read_text(encoding="utf-8")


JS, CSS = _text("explore.js"), _text("explore.css")


def page(title: str, state: Mapping[str, Any], answers: Sequence[Sequence[Any]]) -> str:
    """One HTML file with everything in it: nothing is fetched, and only this script may run."""
    from decompclip.figures.theme import content_policy

    script = f"{JS}\nopenSaved(document);\n"
    data = json.dumps(
        printable_all({"state": state, "answers": answers}), separators=(",", ":"), allow_nan=False
    )
    parts = {
        "policy": escape(content_policy(styles=[CSS], scripts=[script])),
        "title": escape(printable(title)),
        "css": CSS,
        "data": data.replace("<", "\\u003c"),
        "script": script,
    }
    return _text("page.html").format(**parts)
