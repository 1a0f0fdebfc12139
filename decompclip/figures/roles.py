"""Change of role: the measures with their intervals, above the cosines of texts before to texts after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.theme import DIVERGING, INK, RULES, TEMPLATE

if TYPE_CHECKING:
    from decompclip.operators.roles import RoleChange

LONGEST = 36
"""Letters of a text that an axis shows; the whole stands in the hover."""

MEASURE, TEXT, FRAME = 30, 22, 330
"""Pixels of height a measure, a text, and around them."""


def role_figure(result: RoleChange) -> go.Figure:
    """Measures above, a diamond where random texts of the pool would be; cosines text by text below."""
    names = list(result.measures)
    values = list(result.measures.values())
    measures, texts = MEASURE * len(names), TEXT * len(result.before)
    plot = make_subplots(
        2, 1, row_heights=[measures, texts], vertical_spacing=80 / (measures + texts + FRAME)
    )
    plot.add_trace(
        go.Scatter(
            x=[e.value for e in values],
            y=names,
            error_x={
                # Percentiles need not enclose the estimate.
                "array": [max(0.0, e.high - e.value) for e in values],
                "arrayminus": [max(0.0, e.value - e.low) for e in values],
                "thickness": 1.5,
                "width": 4,
            },
            mode="markers",
            marker=RULES[0].marker(),
            name="measured, 95 % bootstrap interval",
            customdata=[str(e) for e in values],
            hovertemplate="%{y}: %{customdata}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    known = [(name, e.chance) for name, e in result.measures.items() if e.chance is not None]
    if known:
        plot.add_trace(
            go.Scatter(
                x=[chance for _, chance in known],
                y=[name for name, _ in known],
                mode="markers",
                marker=RULES[2].marker(symbol="diamond-open", line={"width": 2}),
                name="random texts of the pool",
                hovertemplate="%{y}: %{x:.3f} by chance<extra></extra>",
            ),
            row=1,
            col=1,
        )
    plot.add_trace(
        go.Heatmap(
            z=result.cosines.numpy(),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            customdata=[[f"{a}<br>{b}" for b in result.after] for a in result.before],
            hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    plot.update_xaxes(range=[min(0.0, *(e.low for e in values)), 1.02], row=1, col=1)
    plot.update_yaxes(autorange="reversed", automargin=True, ticks="", row=1, col=1)
    for update, side in ((plot.update_yaxes, result.before), (plot.update_xaxes, result.after)):
        labels = {"tickvals": list(range(len(side))), "ticktext": _short(side)}
        update(automargin=True, ticks="", showgrid=False, row=2, col=1, **labels)
    plot.update_xaxes(title="texts after; texts before downward", tickangle=-50, row=2, col=1)
    plot.update_yaxes(autorange="reversed", row=2, col=1)
    plot.update_layout(
        template=TEMPLATE,
        height=measures + texts + FRAME,
        autosize=True,
        font={"color": INK},
        coloraxis={
            "colorscale": DIVERGING,
            "cmin": -1,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "cosine", "side": "right"},
                "thickness": 12,
                "len": 0.5,
                "y": 0.25,
            },
        },
    )
    return plot


def _short(texts: Sequence[str]) -> list[str]:
    return [text if len(text) <= LONGEST else text[: LONGEST - 1] + "…" for text in texts]
