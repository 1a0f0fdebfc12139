"""Figures as files: interactive HTML that needs nothing, and PNG, SVG or PDF through kaleido and a Chrome."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from decompclip.files import atomic_write, write_text
from decompclip.printable import printable_all

Format = Literal["html", "png", "svg", "pdf"]

SCALE = 2
"""Of PNG: pixels for each unit of the figure's width."""


def write_figure(figure: go.Figure, path: str | Path, *, width: int = 960) -> Path:
    """Write a figure in the format that the path's ending names.

    Args:
        width: of an image, in CSS pixels; its height is the figure's own.

    Raises:
        ValueError: an unknown ending.
        RuntimeError: an image is asked for, and kaleido or a Chrome is missing.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in get_args(Format):
        raise ValueError(
            f"expected a file that ends in .{', .'.join(get_args(Format))}; received {path.name}"
        )
    if kind == "html":
        return write_text(path, figure.to_html(include_plotlyjs=True, full_html=True, div_id="figure"))
    try:
        data = on_white(figure).to_image(format=kind, width=width, scale=SCALE if kind == "png" else 1)
    except Exception as error:
        if remedy := _remedy(error):
            raise RuntimeError(f"expected kaleido and a Chrome to write {path.name}; {remedy}") from error
        raise
    with atomic_write(path) as partial:
        partial.write_bytes(data)
    return path


def on_white(figure: go.Figure) -> go.Figure:
    """A copy for print: figures are transparent on pages, which may be dark."""
    copy = go.Figure(figure)
    copy.update_layout(paper_bgcolor="#ffffff", plot_bgcolor="#ffffff")
    return copy


def _remedy(error: Exception) -> str:
    """What to do about a missing part; empty for any other error."""
    text = f"{type(error).__name__}: {error}".lower()
    if "kaleido" in text and ("install" in text or isinstance(error, ImportError)):
        return "install it (pip install 'decompclip[export]'), or write .html, which needs nothing"
    if "chrome" in text or "browser" in text:
        return "install Chrome or Chromium (Debian: apt-get install chromium), or write .html, which needs nothing"
    return ""


@cache
def plotly_script() -> Markup:
    """plotly.js, for pages that open without a network; it cannot end the element it stands in."""
    source = get_plotlyjs().replace("\r\n", "\n")  # as a browser reads it: its digest stands in the policy
    # styles of its maps, which our pages have none of, would be put in by script, against the policy
    source = re.sub(r'document\.getElementById\("[0-9a-f]{64}"\)', "true", source)
    return Markup(re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE))


def figure_json(plot: go.Figure) -> Markup:
    """A figure as JSON that cannot end the script element it stands in; names in it are printable."""
    return Markup(json.dumps(printable_all(json.loads(str(plot.to_json())))).replace("<", "\\u003c"))


def content_policy(*, styles: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """The Content-Security-Policy of a page: these styles and scripts, inline, pictures in it, and nothing else.

    plotly.js sets the attribute `style` of what it draws, and makes an empty style element, which it fills rule by rule.
    """
    runs = " ".join(map(_digest, scripts)) or "'none'"
    looks = " ".join(map(_digest, (*styles, "")))
    return (
        f"default-src 'none'; script-src {runs}; style-src {looks}; style-src-attr 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
