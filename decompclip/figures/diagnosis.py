"""The ways in which a diagnosis ran a model: the accuracy of each, with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.evaluation.intervals import Rate
from decompclip.figures.theme import ACCURACY, figure

if TYPE_CHECKING:
    from decompclip.audit.diagnosis.result import Diagnosis

ROW, FRAME = 30, 84
"""Pixels of height a way, and around them."""


def comparisons(diagnosis: Diagnosis) -> go.Figure:
    """One row a way: as the model is, then every other; the dashed line is chance."""
    rates: dict[str, Rate] = {"as it is": diagnosis.accuracy}
    rates |= {comparison.name: comparison.accuracy for comparison in diagnosis.comparisons}
    names, values = list(rates), list(rates.values())
    plot = figure(height=FRAME + ROW * len(names), margin={"l": 10, "r": 16, "t": 34, "b": 44})
    plot.add_trace(
        go.Scatter(
            x=[100 * rate.value for rate in values],
            y=names,
            error_x={
                "array": [100 * (rate.high - rate.value) for rate in values],
                "arrayminus": [100 * (rate.value - rate.low) for rate in values],
                "thickness": 1.5,
                "width": 4,
            },
            mode="markers",
            marker=ACCURACY.marker(),
            customdata=[[str(rate), rate.total] for rate in values],
            hovertemplate="%{y}: %{customdata[0]} of %{customdata[1]} images<extra></extra>",
            showlegend=False,
        )
    )
    plot.add_vline(x=100 * diagnosis.chance, line_dash="dash", line_width=1)
    plot.update_xaxes(title="zero-shot accuracy, %", range=[-2, 102], dtick=20)
    plot.update_yaxes(autorange="reversed", automargin=True, showgrid=False, zeroline=False, ticks="")
    return plot
