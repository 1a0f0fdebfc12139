"""The one look of every figure: Okabe and Ito's colours, and a dash and a marker beside each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = "#333d47"
GRID = "rgba(128, 138, 148, 0.25)"
BAND = 0.18
"""Opacity of an interval's band."""

DIVERGING = [[0.0, "#0072B2"], [0.25, "#7fb8d8"], [0.5, "#f5f5f2"], [0.75, "#eaa277"], [1.0, "#D55E00"]]
"""Negative to positive, white in the middle; blue and vermillion differ for every kind of colour vision."""

SEQUENTIAL = "Cividis"


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
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red}, {green}, {blue}, {BAND})"


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
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    fill = colour if filled else f"rgba({red}, {green}, {blue}, 0.12)"
    return {"color": fill, "line": {"color": colour, "width": 1.5}}


def figure(*, height: int, **layout: Any) -> go.Figure:
    """An empty figure in the theme; its width is that of the page."""
    return go.Figure(layout={"template": TEMPLATE, "height": height, "autosize": True} | layout)


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
