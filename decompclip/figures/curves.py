"""Curves in panels: several series over one axis, each with its band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.scatter import PERCENT, Point, wrapped
from decompclip.figures.theme import (
    BAND,
    INK,
    Style,
    band,
    escaped,
    faint,
    framed,
    lettered,
    styled,
    thin_line,
)

LINE = 15
"""Pixels of height a further line of a title takes."""

FEW = 40
"""Places along x up to which each carries a marker."""

SHORT = 5
"""Letters of a tick that needs no turning."""


@dataclass(frozen=True)
class Curve:
    """Values along x, with the ends of a band around them.

    Attributes:
        thin: a second, thinner curve that goes with them.
        hollow: whether the marker of each place is drawn in outline.
        large: the place whose marker is larger than the others.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    thin: Sequence[float] | None = None
    hollow: Sequence[bool] | None = None
    large: int | None = None


@dataclass(frozen=True)
class LinePanel:
    """One pair of axes.

    Attributes:
        title: above it.
        x: title of the horizontal axis.
        y: title of the vertical one.
        curves: by series.
        log_x: whether x is drawn on a logarithmic axis.
        ends: of the vertical axis.
        marks: where vertical lines stand, and what they say.
        levels: of series, where a dashed horizontal line of theirs stands, such as what was before.
        whole: whether x counts: whole ticks alone.
        ticks: names of x = 0, 1, ...
        diagonal: whether a thin line shows where y is x.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Curve]
    log_x: bool = False
    ends: tuple[float, float] | None = None
    marks: Mapping[float, str] | None = None
    levels: Mapping[str, float] | None = None
    whole: bool = False
    ticks: Sequence[str] | None = None
    diagonal: bool = False


def line_panels(
    panels: Sequence[LinePanel],
    *,
    columns: int,
    row_height: int = 210,
    shared_y: bool = True,
    styles: Mapping[str, Style] | None = None,
    bands: str = "95 % interval",
    thin: str = "control",
    levels: str = "as it is",
    marks: str = "",
) -> go.Figure:
    """Panels row by row, with letters; a series looks the same in all of them. What is drawn beside the series stands in the legend.

    Args:
        panels: in reading order.
        columns: panels in a line.
        row_height: pixels of a panel's height.
        shared_y: whether a line of panels has one vertical axis.
        styles: of the series; by default one after the other of the theme's.
        bands: what the series' bands are.
        thin: what their thin curves are.
        levels: what the dashed horizontal lines are.
        marks: what the vertical lines are, where these do not say it; by default they have no place in the legend.

    Raises:
        ValueError: more series than styles.
    """
    look = styled([name for panel in panels for name in panel.curves], styles)
    rows = -(-len(panels) // columns)
    above = LINE * max(panel.title.count("<br>") for panel in panels)
    titled = any(panel.title for panel in panels)
    gap, top = 84 + above, (64 if titled else 40) + above
    height = 48 + top + row_height * rows + gap * (rows - 1)
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=lettered([panel.title for panel in panels]),
        shared_yaxes=shared_y,
        horizontal_spacing=0.04 if shared_y else 0.09,
        vertical_spacing=gap / (height - 48 - top) if rows > 1 else 0,
    )
    shown: set[str] = set()
    for place, panel in enumerate(panels):
        row, col = place // columns + 1, place % columns + 1
        several = len(look) > 1
        drawn = [
            trace
            for name, curve in panel.curves.items()
            for trace in _traces(name, look[name], curve, thin, legend=several and name not in shown)
        ]
        shown.update(panel.curves)
        drawn += [_level(name, look[name], y, panel, levels) for name, y in (panel.levels or {}).items()]
        if panel.diagonal:
            drawn.append(thin_line(panel.ends or (0, 1), panel.ends or (0, 1)))
        for trace in sorted(drawn, key=lambda trace: trace.fill != "toself"):  # no band over another's line
            plot.add_trace(trace, row=row, col=col)
        _axes(plot, panel, row, col, titled=col == 1 or not shared_y)
    curves = [curve for panel in panels for curve in panel.curves.values()]
    for name, dash, there in (
        (bands, "", any(curve.low is not None for curve in curves)),
        (thin, "dot", any(curve.thin is not None for curve in curves)),
        (levels, "longdash", any(panel.levels for panel in panels)),
        (marks, "dot", any(panel.marks for panel in panels)),
    ):
        if name and there:
            plot.add_trace(_explained(name, dash))
    framed(
        plot,
        height=height,
        margin={"l": 60, "r": 16, "t": top, "b": 48},
        legend={"y": 1 + ((26 if titled else 4) + above) / (height - 48 - top)},
    )
    plot.update_annotations(font_size=12)
    return plot


def sweep_panels(
    panels: Mapping[str, Mapping[Style, Sequence[Point | None]]],
    before: Mapping[Style, float],
    *,
    columns: int = 3,
    x: str = "x, counted from 0",
    ticks: Sequence[str] | None = None,
) -> go.Figure:
    """Shares of the images setting by setting, in percent with their bands; dashed lines are the model as it is.

    Args:
        panels: by title and series, a share for each setting; None where there is none.
        before: by series, its share with nothing changed.
        columns: panels in a line.
        x: title of the horizontal axis.
        ticks: names of the settings; by default they are counted.
    """
    styles = {style.short: style for series in panels.values() for style in series}
    y = "images, %" if len(styles) > 1 else f"{wrapped(next(iter(styles)), 20)}, %"
    drawn = []
    for title, series in panels.items():
        curves = {}
        for style, points in series.items():
            known = [(float(place), p) for place, p in enumerate(points) if p is not None]
            if known:
                curves[style.short] = Curve(
                    [place for place, _ in known],
                    [p.value for _, p in known],
                    [p.value if p.low is None else p.low for _, p in known],
                    [p.value if p.high is None else p.high for _, p in known],
                )
        levels = {style.short: value for style, value in before.items() if style.short in curves}
        panel = LinePanel(title, x, y, curves, ends=PERCENT, levels=levels, whole=True, ticks=ticks)
        drawn.append(panel)
    height = 170 if len(drawn) > 1 else 230
    return line_panels(drawn, columns=min(columns, len(drawn)), row_height=height, styles=styles)


def _axes(plot: go.Figure, panel: LinePanel, row: int, col: int, *, titled: bool) -> None:
    plot.update_xaxes(title=panel.x, type="log" if panel.log_x else "linear", row=row, col=col)
    if panel.log_x:
        plot.update_xaxes(dtick=1, tickformat="~g", row=row, col=col)
    plot.update_yaxes(title=panel.y if titled else None, row=row, col=col)
    if panel.whole:
        n = max(len(found.x) for found in panel.curves.values())
        plot.update_xaxes(dtick=1 if n <= 12 else 2 if n <= 24 else 4, row=row, col=col)
    if panel.ticks is not None:
        names = {"tickvals": list(range(len(panel.ticks))), "ticktext": list(panel.ticks)}
        angle = -30 if max(map(len, panel.ticks)) > SHORT else None  # short ones turn where they do not fit
        plot.update_xaxes(tickangle=angle, automargin=True, row=row, col=col, **names)
    if panel.ends is not None:
        plot.update_yaxes(range=panel.ends, dtick=25 if panel.ends == PERCENT else None, row=row, col=col)
    for x, text in (panel.marks or {}).items():
        plot.add_trace(_mark(x, text, panel), row=row, col=col)


def _traces(name: str, style: Style, curve: Curve, what: str, *, legend: bool) -> list[go.Scatter]:
    traces: list[Any] = []
    name = escaped(name)
    shown, ends = "%{y:.3g}", None
    if curve.low is not None and curve.high is not None:
        traces.append(band(curve.x, curve.low, curve.high, style, legendgroup=name))
        shown, ends = (
            "%{y:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]",
            list(zip(curve.low, curve.high, strict=True)),
        )
    if curve.thin is not None:
        traces.append(
            thin_line(
                curve.x,
                curve.thin,
                line={"color": style.colour, "width": 1, "dash": "dot"},
                legendgroup=name,
                hoverinfo=None,
                hovertemplate="%{x:.4g}: " + what + " %{y:.3g}<extra>" + name + "</extra>",
            )
        )
    marker = style.marker(size=6)
    if curve.hollow is not None:
        marker["symbol"] = [style.symbol + ("-open" if open_ else "") for open_ in curve.hollow]
    if curve.large is not None:
        marker["size"] = [13 if place == curve.large else 5 for place in range(len(curve.x))]
    return [
        *traces,
        go.Scatter(
            x=list(curve.x),
            y=list(curve.y),
            mode="lines+markers" if len(curve.x) <= FEW else "lines",
            line=style.line(),
            marker=marker,
            name=name,
            legendgroup=name,
            showlegend=legend,
            customdata=ends,
            hovertemplate="%{x:.4g}: " + shown + "<extra>" + name + "</extra>",
        ),
    ]


def _level(name: str, style: Style, y: float, panel: LinePanel, what: str) -> go.Scatter:
    """A dashed horizontal line in a series' colour."""
    name = escaped(name)
    places = [x for curve in panel.curves.values() for x in curve.x]
    return thin_line(
        [min(places), max(places)],
        [y, y],
        line={"color": style.colour, "width": 1, "dash": "longdash"},
        legendgroup=name,
        hoverinfo=None,
        hovertemplate=f"{what}: {y:.3g}<extra>{name}</extra>",
    )


def _explained(name: str, dash: str) -> go.Scatter:
    """An entry of the legend alone, in no series' colour: a line, or without a dash a band."""
    if not dash:
        square = {"symbol": "square", "size": 14, "color": faint(INK, BAND)}
        return go.Scatter(x=[None], y=[None], mode="markers", marker=square, name=name, showlegend=True)
    look = {"color": INK, "width": 1, "dash": dash}
    return go.Scatter(x=[None], y=[None], mode="lines", line=look, name=name, showlegend=True)


def _mark(x: float, text: str, panel: LinePanel) -> go.Scatter:
    """A thin vertical line, named at its lower end."""
    values = [v for curve in panel.curves.values() for v in curve.y]
    low, high = panel.ends or (min(values), max(values))
    words = {"text": [text, ""], "textposition": "top right", "textfont": {"size": 10}}
    return thin_line([x, x], [low, high], mode="lines+text", **words)
