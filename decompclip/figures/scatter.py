"""Points: values with their intervals row by row, and pairs of values with the line on which both are equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.theme import INK, Style, escaped, figure, framed, lettered, styled, thin_line, whisker

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
    styles: Mapping[str, Style] | None = None,
    bars: str = "",
) -> go.Figure:
    """Rows downward, values to the right; series differ by colour, marker and place within the row.

    Args:
        rows: their names, shown as they are, with `<br>` where a new line begins.
        panels: side by side, with letters where there are several.
        styles: of the series; by default one after the other of the theme's.
        bars: what the ends of intervals are, for the legend; needed where a point has them.

    Raises:
        ValueError: more series than styles, a series that is not as long as the rows, or intervals that nothing explains.
    """
    rows = [escaped(row).replace(escaped("<br>"), "<br>") for row in rows]
    look = styled([name for panel in panels for name in panel.points], styles)
    height = FRAME + ROW * len(rows) + 40
    plot = make_subplots(
        1,
        len(panels),
        subplot_titles=lettered([panel.title for panel in panels]),
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    shown: set[str] = set()
    for column, panel in enumerate(panels, 1):
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
            plot.add_trace(trace, row=1, col=column)
        if panel.line is not None:
            plot.add_trace(thin_line([panel.line] * 2, [-0.5, len(rows) - 0.5]), row=1, col=column)
        plot.update_xaxes(title=panel.unit, range=panel.ends, row=1, col=column)
    plot.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=rows,
        range=[len(rows) - 0.5, -0.5],
        zeroline=False,
        ticks="",
        automargin=True,
    )
    known = [point for panel in panels for points in panel.points.values() for point in points if point]
    if any(point.low is not None for point in known):
        plot.add_trace(whisker(bars), row=1, col=1)
    lines = max(1 + panel.title.count("<br>") for panel in panels) if any(p.title for p in panels) else 0
    above = 4 + bool(lines) * 8 + 14 * lines
    framed(
        plot,
        height=height,
        margin={"l": 10, "r": 16, "t": 34 + above, "b": 48},
        legend={"y": 1 + above / (height - 82 - above)},
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


def whiskers(points: Sequence[Point], width: int = 3) -> dict[str, Any]:
    """The intervals of points, none where there are no ends; an interval of percentiles need not enclose its estimate."""
    return {
        # as arrays: in a list nan becomes null, which is drawn as an interval of no width
        "array": np.array([math.nan if p.high is None else max(0.0, p.high - p.value) for p in points]),
        "arrayminus": np.array([math.nan if p.low is None else max(0.0, p.value - p.low) for p in points]),
        "thickness": 1.5,
        "width": width,
    }


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
        error_x=whiskers([point for _, point in known]),
        mode="markers",
        marker=style.marker(),
        name=name,
        legendgroup=name,
        showlegend=legend,
        customdata=[[rows[row].replace("<br>", " "), point.note] for row, point in known],
        hovertemplate="%{customdata[0]}: %{x:.3g} %{customdata[1]}<extra>" + name + "</extra>",
    )


Pairs = Sequence[tuple[float, float]]

LABELLED = 5
"""Markers that carry their name: so many of those farthest off the diagonal, and of the largest."""


def scatter_panels(panels: Mapping[str, Mapping[str, Pairs]], *, x: str, y: str) -> go.Figure:
    """`panels[title][series]` are (x, y); series look the same in every panel."""
    plot = make_subplots(1, len(panels), subplot_titles=lettered(list(panels)), horizontal_spacing=0.1)
    look = styled([name for panel in panels.values() for name in panel])
    for column, panel in enumerate(panels.values(), 1):
        values = [v for pairs in panel.values() for pair in pairs for v in pair]
        ends = [min(values, default=0.0), max(values, default=1.0)]
        plot.add_trace(_equal(ends, "equal", legend=column == 1), row=1, col=column)
        for name, pairs in panel.items():
            plot.add_trace(
                go.Scatter(
                    x=[pair[0] for pair in pairs],
                    y=[pair[1] for pair in pairs],
                    mode="markers",
                    marker=look[name].marker(size=6, opacity=0.7),
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    hovertemplate="%{x:.3g}, %{y:.3g}<extra>" + name + "</extra>",
                ),
                row=1,
                col=column,
            )
        plot.update_xaxes(title=x, row=1, col=column)
        plot.update_yaxes(
            title={"text": y if column == 1 else None, "standoff": 8}, automargin=True, row=1, col=column
        )
    height = 420
    margin = {"l": 10, "r": 16, "t": 64, "b": 48}
    framed(plot, height=height, margin=margin, legend={"y": 1 + 26 / (height - 112)})
    plot.update_annotations(font_size=12)
    return plot


@dataclass(frozen=True)
class Effect:
    """Two numbers of several things, with half-widths of their intervals."""

    names: Sequence[str]
    kinds: Sequence[str]
    x: Float[Tensor, " thing"]
    y: Float[Tensor, " thing"]
    x_error: Float[Tensor, " thing"]
    y_error: Float[Tensor, " thing"]


def effect_scatter(found: Effect, *, x: str, y: str, equal: str) -> go.Figure:
    """One marker a thing, its kind by colour and shape; those farthest off the diagonal, and the largest, are named.

    Raises:
        ValueError: more kinds than styles.
    """
    across, up = found.x.numpy(), found.y.numpy()
    ends = [float(min(across.min(), 0)), float(max(across.max(), 0))]
    plot = figure(height=460, margin={"l": 64, "r": 64, "t": 34, "b": 52})
    plot.add_trace(_equal(ends, equal, legend=True))
    size, off = across**2 + up**2, np.abs(up - across)
    far = list(dict.fromkeys([*np.argsort(-off)[:LABELLED].tolist(), *np.argsort(-size)[:LABELLED].tolist()]))
    sides = {i: "middle left" if rank % 2 == 0 else "middle right" for rank, i in enumerate(far)}
    for kind, style in styled(found.kinds, None).items():
        rows = [i for i, of in enumerate(found.kinds) if of == kind]
        plot.add_trace(
            go.Scatter(
                x=across[rows],
                y=up[rows],
                error_x=_whiskers(found.x_error[rows].numpy()),
                error_y=_whiskers(found.y_error[rows].numpy()),
                mode="markers+text",
                marker=style.marker(),
                text=[f" {found.names[i]} " if i in sides else "" for i in rows],
                textposition=[sides.get(i, "top center") for i in rows],
                cliponaxis=False,
                textfont={"size": 10},
                name=kind,
                customdata=[found.names[i] for i in rows],
                hovertemplate="%{customdata}: %{x:.4f}, %{y:.4f}<extra></extra>",
            )
        )
    plot.update_xaxes(title=x)
    plot.update_yaxes(title=y)
    return plot


def _equal(ends: Sequence[float], name: str, *, legend: bool) -> go.Scatter:
    look = {"width": 1, "dash": "dot", "color": INK}
    return thin_line(ends, ends, line=look, name=name, legendgroup=name, showlegend=legend)


def _whiskers(errors: object) -> dict[str, object]:
    return {"array": errors, "thickness": 1, "width": 0, "color": "rgba(128, 138, 148, 0.5)"}
