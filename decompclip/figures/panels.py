"""Several series of values over the same rows, panel beside panel: attacks under settings, detectors over attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.theme import RULES, TEMPLATE, Style

ROW, FRAME = 36, 112
"""Pixels of height a row, and around them."""


@dataclass(frozen=True)
class Point:
    """A value with the ends of its interval; without ends a marker alone."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    @staticmethod
    def of(rate: Mapping[str, Any], scale: float = 100) -> Point:
        """A rate or an area as JSON has it, in percent."""
        low, high = (None if rate.get(end) is None else scale * rate[end] for end in ("low", "high"))
        return Point(scale * rate["value"], low, high)


@dataclass(frozen=True)
class Panel:
    """One axis of values: `points[series][row]`; None where there is no value.

    Attributes:
        unit: title of the axis.
        ends: of the axis; by default those of the values.
        line: where a thin line stands, such as that of chance.
    """

    title: str
    unit: str
    points: Mapping[str, Sequence[Point | None]]
    ends: tuple[float, float] | None = None
    line: float | None = None


PERCENT = (-3.0, 103.0)


def point_panels(rows: Sequence[str], panels: Sequence[Panel], *, columns: int | None = None) -> go.Figure:
    """Rows downward, values to the right; series differ by colour, marker and place within the row.

    Raises:
        ValueError: more series than styles, or a series that is not as long as the rows.
    """
    series = list(dict.fromkeys(name for panel in panels for name in panel.points))
    if len(series) > len(STYLES):
        raise ValueError(f"expected at most {len(STYLES)} series; received {len(series)}")
    columns = columns or len(panels)
    n_rows = -(-len(panels) // columns)
    letters = [f"({chr(97 + i)}) " if len(panels) > 1 else "" for i in range(len(panels))]
    height = FRAME + n_rows * (ROW * len(rows) + 40)
    plot = make_subplots(
        n_rows,
        columns,
        subplot_titles=[letter + panel.title for letter, panel in zip(letters, panels, strict=True)],
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.16 if n_rows > 1 else 0,
    )
    shown: set[str] = set()
    for place, panel in enumerate(panels):
        row, column = place // columns + 1, place % columns + 1
        for name, points in panel.points.items():
            if len(points) != len(rows):
                raise ValueError(
                    f"expected {len(rows)} points of {name!r}, one a row; received {len(points)}"
                )
            number = series.index(name)
            offset = (number - (len(series) - 1) / 2) * min(0.22, 0.7 / len(series))
            named = len(series) > 1 and name not in shown
            trace = _markers(name, STYLES[number], points, rows, offset, legend=named)
            shown.add(name)
            plot.add_trace(trace, row=row, col=column)
        if panel.line is not None:
            plot.add_trace(_line(panel.line, len(rows)), row=row, col=column)
        plot.update_xaxes(title=panel.unit, range=panel.ends, row=row, col=column)
    plot.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=list(rows),
        range=[len(rows) - 0.5, -0.5],
        zeroline=False,
        ticks="",
        automargin=True,
    )
    plot.update_layout(
        template=TEMPLATE,
        height=height,
        autosize=True,
        margin={"l": 10, "r": 16, "t": 64, "b": 48},
        legend={"y": 1 + 26 / (height - 112)},
    )
    plot.update_annotations(font_size=12)
    return plot


STYLES = (
    *RULES,
    Style("", "#E69F00", "longdash", "cross"),
    Style("", "#56B4E9", "longdashdot", "x"),
    Style("", "#333d47", "solid", "star"),
)


def _line(x: float, n_rows: int) -> go.Scatter:
    return go.Scatter(
        x=[x, x],
        y=[-0.5, n_rows - 0.5],
        mode="lines",
        line={"width": 1, "dash": "dot", "color": "#808a94"},
        hoverinfo="skip",
        showlegend=False,
    )


def _markers(
    name: str,
    style: Style,
    points: Sequence[Point | None],
    rows: Sequence[str],
    offset: float,
    *,
    legend: bool,
) -> go.Scatter:
    known = [(row, point) for row, point in enumerate(points) if point is not None]
    return go.Scatter(
        x=[point.value for _, point in known],
        y=[row + offset for row, _ in known],
        error_x={
            "array": [0 if p.high is None else p.high - p.value for _, p in known],
            "arrayminus": [0 if p.low is None else p.value - p.low for _, p in known],
            "thickness": 1.5,
            "width": 3,
        },
        mode="markers",
        marker=style.marker(),
        name=name,
        legendgroup=name,
        showlegend=legend,
        customdata=[[rows[row].replace("<br>", " "), point.note] for row, point in known],
        hovertemplate="%{customdata[0]}: %{x:.3g} %{customdata[1]}<extra>" + name + "</extra>",
    )
