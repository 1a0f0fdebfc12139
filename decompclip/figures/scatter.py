"""Points against points, panel beside panel, with the line on which both are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.panels import STYLES
from decompclip.figures.theme import TEMPLATE

Pairs = Sequence[tuple[float, float]]


def scatter_panels(panels: Mapping[str, Mapping[str, Pairs]], *, x: str, y: str) -> go.Figure:
    """`panels[title][series]` are (x, y); series look the same in every panel."""
    plot = make_subplots(
        1,
        len(panels),
        subplot_titles=[f"({chr(97 + i)}) {title}" for i, title in enumerate(panels)],
        horizontal_spacing=0.1,
    )
    series = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for column, panel in enumerate(panels.values(), 1):
        values = [v for pairs in panel.values() for pair in pairs for v in pair]
        ends = [min(values, default=0.0), max(values, default=1.0)]
        plot.add_trace(
            go.Scatter(
                x=ends,
                y=ends,
                mode="lines",
                line={"width": 1, "dash": "dot", "color": "#808a94"},
                name="equal",
                legendgroup="equal",
                showlegend=column == 1,
                hoverinfo="skip",
            ),
            row=1,
            col=column,
        )
        for name, pairs in panel.items():
            style = STYLES[series.index(name)]
            plot.add_trace(
                go.Scatter(
                    x=[pair[0] for pair in pairs],
                    y=[pair[1] for pair in pairs],
                    mode="markers",
                    marker=style.marker(size=6, opacity=0.7),
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
    plot.update_layout(
        template=TEMPLATE,
        height=height,
        autosize=True,
        margin={"l": 10, "r": 16, "t": 64, "b": 48},
        legend={"y": 1 + 26 / (height - 112)},
    )
    plot.update_annotations(font_size=12)
    return plot
