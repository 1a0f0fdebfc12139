"""The one look of every figure: Okabe and Ito's colours, and a dash and a marker beside each of them.

Figures as files: interactive HTML that needs nothing, and PNG, SVG or PDF through kaleido and a Chrome.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from decompclip.display import printable_all
from decompclip.files import atomic_write, write_text

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = "#333d47"
GRID = "rgba(128, 138, 148, 0.25)"
BAND = 0.18
"""Opacity of an interval's band."""

DIVERGING = [[0.0, "#0072B2"], [0.25, "#7fb8d8"], [0.5, "#f5f5f2"], [0.75, "#eaa277"], [1.0, "#D55E00"]]
"""Negative to positive, white in the middle; blue and vermillion differ for every kind of colour vision."""

SEQUENTIAL = "Cividis"


def faint(colour: str, opacity: float) -> str:
    """A colour such as `#0072B2` with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


@dataclass(frozen=True)
class Style:
    """How one series is told from the others: by colour, dash and marker together."""

    label: str
    colour: str
    dash: str
    symbol: str

    def line(self, **more: Any) -> dict[str, Any]:
        return {"color": self.colour, "dash": self.dash, "width": 2} | more

    def marker(self, **more: Any) -> dict[str, Any]:
        return {"color": self.colour, "symbol": self.symbol, "size": 8} | more

    @property
    def short(self) -> str:
        """The label without its explanation, for legends."""
        return self.label.split(" (")[0]

    @property
    def band(self) -> str:
        return faint(self.colour, BAND)


SUCCESS = Style("Attack success (suspect images taken for the target)", "#D55E00", "solid", "circle")
CONTROL = Style("Control (clean images taken for the target)", "#0072B2", "dash", "square")
ACCURACY = Style("Clean accuracy", "#009E73", "dot", "diamond")
RULES = (
    Style("", "#0072B2", "solid", "circle"),
    Style("", "#D55E00", "dash", "square"),
    Style("", "#009E73", "dot", "diamond"),
    Style("", "#CC79A7", "dashdot", "triangle-up"),
)

STYLES = (
    *RULES,
    Style("", "#E69F00", "longdash", "cross"),
    Style("", "#56B4E9", "longdashdot", "x"),
    Style("", "#333d47", "solid", "star"),
)
"""Of series without a meaning of their own, in this order."""

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "margin": {"l": 56, "r": 16, "t": 40, "b": 48},
        "xaxis": {"gridcolor": GRID, "zerolinecolor": GRID, "ticks": "outside", "tickcolor": GRID},
        "yaxis": {"gridcolor": GRID, "zerolinecolor": GRID, "ticks": "outside", "tickcolor": GRID},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "hoverlabel": {"font": {"family": FONT}},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": "#a3abb2", "activecolor": "#0072B2"},
    }
)


def styled(names: Sequence[str], styles: Mapping[str, Style] | None = None) -> dict[str, Style]:
    """A look for each series, the same one wherever it comes up.

    Raises:
        ValueError: more series than styles.
    """
    series = list(dict.fromkeys(names))
    if styles is not None:
        return {name: styles[name] for name in series}
    if len(series) > len(STYLES):
        raise ValueError(f"expected at most {len(STYLES)} series; received {len(series)}")
    return dict(zip(series, STYLES, strict=False))


def lettered(titles: Sequence[str]) -> list[str]:
    """Titles of panels; with letters where there are several."""
    if len(titles) == 1 or not any(titles):
        return list(titles)
    return [f"({chr(97 + place)}) {title}" for place, title in enumerate(titles)]


def escaped(text: str) -> str:
    """Text as plotly shows it: it reads a few tags, and places for numbers."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%&#123;")


def bars(colour: str, *, filled: bool) -> dict[str, Any]:
    """How a series of bars looks: filled, or in outline, so that two are told apart without colour.

    Hatches would do as well, but a browser prints each as a picture of its own: a report then takes 50 MB.
    """
    return {"color": colour if filled else faint(colour, 0.12), "line": {"color": colour, "width": 1.5}}


def framed(plot: go.Figure, *, height: float, **layout: Any) -> go.Figure:
    """The figure in the theme; its width is that of the page."""
    return plot.update_layout(template=TEMPLATE, height=height, autosize=True, **layout)


def figure(*, height: int, **layout: Any) -> go.Figure:
    """An empty figure in the theme."""
    return framed(go.Figure(), height=height, **layout)


def thin_line(x: Sequence[float], y: Sequence[float], **changes: Any) -> go.Scatter:
    """A dotted line that is no series: it has no hover and, unless `changes` says so, no legend."""
    look = {"width": 1, "dash": "dot", "color": "#808a94"}
    options: dict[str, Any] = {"mode": "lines", "line": look, "hoverinfo": "skip", "showlegend": False}
    return go.Scatter(x=list(x), y=list(y), **options | changes)


def whisker(name: str) -> go.Scatter:
    """The legend's entry that says what the ends of intervals are.

    Raises:
        ValueError: no name.
    """
    if not name:
        raise ValueError("expected bars='...', what the intervals are, for the legend; received none")
    look = {"symbol": "line-ew-open", "size": 14, "color": INK, "line": {"width": 2}}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=look, name=name, showlegend=True)


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], style: Style, **more: Any
) -> go.Scatter:
    """The area between the ends of intervals."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=style.band,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        mode="lines",
        **more,
    )


Format = Literal["html", "png", "svg", "pdf"]

SCALE = 2
"""Of PNG: pixels for each unit of the figure's width."""


def write_figure(
    figure: go.Figure, path: str | Path, *, width: int = 960, script: Literal["inside", "beside"] = "inside"
) -> Path:
    """Write a figure in the format that the path's ending names.

    Args:
        width: of an image, in CSS pixels; its height is the figure's own.
        script: where plotly.js, 5 MB, stands for .html: inside the file, which then needs nothing, or in `plotly.min.js`
            beside it, once for all figures of the folder.

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
        if script == "beside" and not (own := path.with_name("plotly.min.js")).exists():
            write_text(own, get_plotlyjs())
        inside = True if script == "inside" else "directory"
        return write_text(path, figure.to_html(include_plotlyjs=inside, full_html=True, div_id="figure"))
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


def keep_pictures(width: int = 880, scale: float = 1.2) -> None:
    """Have a notebook keep a picture of each figure beside the interactive one: what GitHub shows, and `jupyter nbconvert --execute --to html`.

    Pictures are PNG, on white, which serves in the dark too. Without kaleido or a Chrome there are none, which a warning says.

    Args:
        width: of figures that leave theirs to the page, in CSS pixels.
        scale: pixels for each.
    """
    import plotly.io as pio
    from plotly.io.base_renderers import MimetypeRenderer

    class Pictures(MimetypeRenderer):
        def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
            own = fig_dict["layout"].get("width", width)
            try:
                return {"image/png": on_white(go.Figure(fig_dict)).to_image("png", width=own, scale=scale)}
            except Exception as error:
                if not (remedy := _remedy(error)):
                    raise
                warnings.warn(
                    f"figures are kept without pictures, which need kaleido and a Chrome; {remedy}",
                    stacklevel=2,
                )
                return {}

    pio.renderers["pictures"] = Pictures()
    shown = [name for name in (pio.renderers.default or "").split("+") if name and name != "pictures"]
    pio.renderers.default = "+".join([*shown, "pictures"])


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
