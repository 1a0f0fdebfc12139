"""Neurons: how much each of them writes, on average and at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.figures.theme import RULES, figure

if TYPE_CHECKING:
    from decompclip.operators.neurons import NeuronTerms

SHOWN = 30
"""Neurons drawn, those that write most."""


def neuron_bars(result: NeuronTerms) -> go.Figure:
    """The neurons that write most: length of the term, the mean over images as a bar and the largest as a marker."""
    frame = result.to_frame().nlargest(SHOWN, "length").iloc[::-1]
    names = [f"neurons[{row.layer}, {row.neuron}]" for row in frame.itertuples()]
    plot = figure(height=110 + 16 * len(names))
    plot.add_trace(
        go.Bar(
            x=frame["length"],
            y=names,
            orientation="h",
            marker_color=RULES[0].colour,
            name="mean over images",
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    plot.add_trace(
        go.Scatter(
            x=frame["largest"],
            y=names,
            mode="markers",
            marker=RULES[1].marker(size=6),
            name="largest",
            hovertemplate="%{y}: at most %{x:.4f}<extra></extra>",
        )
    )
    plot.update_xaxes(title="length of the term", rangemode="tozero")
    plot.update_yaxes(type="category", automargin=True)
    return plot
