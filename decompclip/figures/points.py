"""Values with intervals, rows downward: rates of settings, attacks under defenses, detectors over attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.theme import TEMPLATE, Style, lettered, styled

ROW, FRAME = 36, 112
"""Pixels of height a row, and around them."""

PERCENT = (-3.0, 103.0)
"""Ends of an axis of percents, with room for markers at both."""


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


def point_panels(
    rows: Sequence[str],
    panels: Sequence[Panel],
    *,
    columns: int | None = None,
    styles: Mapping[str, Style] | None = None,
) -> go.Figure:
    """Rows downward, values to the right; series differ by colour, marker and place within the row.

    Args:
        rows: their names.
        panels: side by side, with letters where there are several.
        columns: panels in a line; by default all of them.
        styles: of the series; by default one after the other of the theme's.

    Raises:
        ValueError: more series than styles, or a series that is not as long as the rows.
    """
    look = styled([name for panel in panels for name in panel.points], styles)
    columns = columns or len(panels)
    n_rows = -(-len(panels) // columns)
    height = FRAME + n_rows * (ROW * len(rows) + 40)
    plot = make_subplots(
        n_rows,
        columns,
        subplot_titles=lettered([panel.title for panel in panels]),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.16 if n_rows > 1 else 0,
    )
    shown: set[str] = set()
    for place, panel in enumerate(panels):
        row, column = place // columns + 1, place % columns + 1
        for number, (name, points) in enumerate(
            (name, panel.points[name]) for name in look if name in panel.points
        ):
            if len(points) != len(rows):
                raise ValueError(
                    f"expected {len(rows)} points of {name!r}, one a row; received {len(points)}"
                )
            offset = (number - (len(panel.points) - 1) / 2) * min(0.22, 0.7 / len(look))
            named = len(look) > 1 and name not in shown
            trace = _markers(name, look[name], points, rows, offset, legend=named)
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
    titled = any(panel.title for panel in panels)
    plot.update_layout(
        template=TEMPLATE,
        height=height,
        autosize=True,
        margin={"l": 10, "r": 16, "t": 64 if titled else 38, "b": 48},
        legend={"y": 1 + (26 if titled else 4) / (height - 112)},
    )
    plot.update_annotations(font_size=12)
    return plot


def wrapped(name: str, width: int = 24) -> str:
    """A row's name in lines of about `width` letters, never broken at a no-break space."""
    lines = [""]
    for word in name.split(" "):
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)


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
            # an interval of percentiles need not enclose its estimate
            "array": [0 if p.high is None else max(0.0, p.high - p.value) for _, p in known],
            "arrayminus": [0 if p.low is None else max(0.0, p.value - p.low) for _, p in known],
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
