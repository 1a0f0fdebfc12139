"""Curves in panels: several series over one axis, each with its band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.panels import STYLES
from decompclip.figures.theme import TEMPLATE, Style, band

LINE = 15
"""Pixels of height a further line of a title takes."""


@dataclass(frozen=True)
class Curve:
    """Values along x, with the ends of a band around them, and a second, thinner curve that goes with them."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    thin: Sequence[float] | None = None


@dataclass(frozen=True)
class LinePanel:
    """One pair of axes.

    Attributes:
        marks: where vertical lines stand, and what they say.
        ends: of the vertical axis.
        levels: of series, where a dashed horizontal line of theirs stands, such as what was before.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Curve]
    log_x: bool = False
    log_y: bool = False
    ends: tuple[float, float] | None = None
    marks: Mapping[float, str] | None = None
    levels: Mapping[str, float] | None = None
    whole: bool = False
    """Whether x counts: whole ticks alone."""


def line_panels(
    panels: Sequence[LinePanel], *, columns: int, row_height: int = 210, shared_y: bool = True
) -> go.Figure:
    """Panels row by row, with letters; a series looks the same in all of them.

    Raises:
        ValueError: more series than styles.
    """
    series = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    if len(series) > len(STYLES):
        raise ValueError(f"expected at most {len(STYLES)} series; received {len(series)}")
    rows = -(-len(panels) // columns)
    above = LINE * max(
        panel.title.count("<br>") for panel in panels
    )  # what titles of several lines take more
    gap, top = 84 + above, 64 + above
    height = 48 + top + row_height * rows + gap * (rows - 1)
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=[
            f"({chr(97 + i)}) {p.title}" if len(panels) > 1 else p.title for i, p in enumerate(panels)
        ],
        shared_yaxes=shared_y,
        horizontal_spacing=0.04 if shared_y else 0.09,
        vertical_spacing=gap / (height - 48 - top) if rows > 1 else 0,
    )
    shown: set[str] = set()
    for place, panel in enumerate(panels):
        row, col = place // columns + 1, place % columns + 1
        drawn = [
            trace
            for name, curve in panel.curves.items()
            for trace in _traces(name, STYLES[series.index(name)], curve, legend=name not in shown)
        ]
        shown.update(panel.curves)
        drawn += [
            _level(name, STYLES[series.index(name)], y, panel) for name, y in (panel.levels or {}).items()
        ]
        for trace in sorted(drawn, key=lambda trace: trace.fill != "toself"):  # no band over another's line
            plot.add_trace(trace, row=row, col=col)
        edge = col == 1 or not shared_y
        plot.update_xaxes(title=panel.x, type="log" if panel.log_x else "linear", row=row, col=col)
        if panel.log_x:
            plot.update_xaxes(dtick=1, tickformat="~g", row=row, col=col)
        plot.update_yaxes(
            title=panel.y if edge else None, type="log" if panel.log_y else "linear", row=row, col=col
        )
        if panel.whole:
            n = max(len(found.x) for found in panel.curves.values())
            plot.update_xaxes(dtick=1 if n <= 12 else 4, row=row, col=col)
        if panel.ends is not None:
            plot.update_yaxes(range=panel.ends, row=row, col=col)
        for x, text in (panel.marks or {}).items():
            plot.add_trace(_mark(x, text, panel), row=row, col=col)
    plot.update_layout(
        template=TEMPLATE,
        height=height,
        autosize=True,
        margin={"l": 60, "r": 16, "t": top, "b": 48},
        legend={"y": 1 + (26 + above) / (height - 48 - top)},
    )
    plot.update_annotations(font_size=12)
    return plot


def _traces(name: str, style: Style, curve: Curve, *, legend: bool) -> list[go.Scatter]:
    traces: list[Any] = []
    if curve.low is not None and curve.high is not None:
        traces.append(band(curve.x, curve.low, curve.high, style, legendgroup=name))
    if curve.thin is not None:
        traces.append(
            go.Scatter(
                x=list(curve.x),
                y=list(curve.thin),
                mode="lines",
                line={"color": style.colour, "width": 1, "dash": "dot"},
                legendgroup=name,
                showlegend=False,
                hovertemplate="%{x:.4g}: control %{y:.3g}<extra>" + name + "</extra>",
            )
        )
    few = len(curve.x) <= 40
    return [
        *traces,
        go.Scatter(
            x=list(curve.x),
            y=list(curve.y),
            mode="lines+markers" if few else "lines",
            line=style.line(),
            marker=style.marker(size=6),
            name=name,
            legendgroup=name,
            showlegend=legend,
            hovertemplate="%{x:.4g}: %{y:.3g}<extra>" + name + "</extra>",
        ),
    ]


def _level(name: str, style: Style, y: float, panel: LinePanel) -> go.Scatter:
    """A dashed horizontal line in a series' colour."""
    places = [x for curve in panel.curves.values() for x in curve.x]
    return go.Scatter(
        x=[min(places), max(places)],
        y=[y, y],
        mode="lines",
        line={"color": style.colour, "width": 1, "dash": "longdash"},
        legendgroup=name,
        showlegend=False,
        hovertemplate=f"before: {y:.3g}<extra>{name}</extra>",
    )


def _mark(x: float, text: str, panel: LinePanel) -> go.Scatter:
    """A thin vertical line, named at its lower end."""
    values = [v for curve in panel.curves.values() for v in curve.y]
    low, high = panel.ends or (min(values), max(values))
    return go.Scatter(
        x=[x, x],
        y=[low, high],
        mode="lines+text",
        text=[text, ""],
        textposition="top right",
        textfont={"size": 10},
        line={"width": 1, "dash": "dot", "color": "#808a94"},
        hoverinfo="skip",
        showlegend=False,
    )
