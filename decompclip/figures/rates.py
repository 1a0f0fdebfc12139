"""Attack success, control and clean accuracy of a few settings, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.evaluation.intervals import Rate
from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS, Style, figure

if TYPE_CHECKING:
    from decompclip.audit.scoring import Setting

ROW, FRAME = 44, 84
"""Pixels of height a setting, and around them."""


def rates(settings: Sequence[Setting]) -> go.Figure:
    """One row a setting, one marker a rate, one whisker its 95 % interval."""
    names = [_wrap(setting.name) for setting in settings]
    plot = figure(height=FRAME + ROW * len(settings), margin={"l": 10, "r": 16, "t": 34, "b": 44})
    for style, offset, values in (
        (SUCCESS, 0.22, [setting.success for setting in settings]),
        (CONTROL, 0.0, [setting.control for setting in settings]),
        (ACCURACY, -0.22, [setting.report.cacc for setting in settings]),
    ):
        known = [(row, rate) for row, rate in enumerate(values) if rate is not None and rate.total]
        if known:
            plot.add_trace(_markers(style, [(row - offset, rate) for row, rate in known], names))
    plot.update_xaxes(title="images, %", range=[-2, 102], dtick=20)
    plot.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 0.5, -0.5],
        automargin=True,
        showgrid=False,
        zeroline=False,
        ticks="",
    )
    return plot


def short(style: Style) -> str:
    """The label without its explanation, for legends."""
    return style.label.split(" (")[0]


def _markers(style: Style, points: Sequence[tuple[float, Rate]], names: Sequence[str]) -> go.Scatter:
    return go.Scatter(
        x=[100 * rate.value for _, rate in points],
        y=[y for y, _ in points],
        error_x={
            "array": [100 * (rate.high - rate.value) for _, rate in points],
            "arrayminus": [100 * (rate.value - rate.low) for _, rate in points],
            "thickness": 1.5,
            "width": 4,
        },
        mode="markers",
        marker=style.marker(),
        name=short(style),
        customdata=[[names[round(y)].replace("<br>", " "), str(rate), rate.total] for y, rate in points],
        hovertemplate="%{customdata[0]}: %{customdata[1]} of %{customdata[2]} images<extra>"
        + style.label
        + "</extra>",
    )


def _wrap(name: str, width: int = 24) -> str:
    lines = [""]
    for word in name.split(" "):  # not at a no-break space
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)
