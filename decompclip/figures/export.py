"""Figures as files: interactive HTML that needs nothing, and PNG, SVG or PDF through kaleido and a Chrome."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

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
        path.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
        return path
    try:
        data = on_white(figure).to_image(format=kind, width=width, scale=SCALE if kind == "png" else 1)
    except Exception as error:
        if remedy := _remedy(error):
            raise RuntimeError(f"expected kaleido and a Chrome to write {path.name}; {remedy}") from error
        raise
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
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


def plotly_script() -> str:
    """plotly.js, for pages that open without a network; it cannot end the element it stands in."""
    return re.sub(r"</(script)", r"<\\/\1", get_plotlyjs(), flags=re.IGNORECASE)
