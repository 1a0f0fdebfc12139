"""What components encode: probes by property, and how they go with what texts name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from decompclip.figures.theme import RULES, SEQUENTIAL, figure

if TYPE_CHECKING:
    from decompclip.operators.naming import Agreement, Naming
    from decompclip.operators.probes import Probes

ROW, FRAME = 18, 120
"""Pixels of height a part, and around them."""


def probe_map(result: Probes) -> go.Figure:
    """Parts downward, properties to the right: gain over chance, the rest on hovering."""
    facts = np.stack([result.accuracy.numpy(), result.explained.numpy()], axis=-1)
    plot = figure(height=FRAME + ROW * len(result.parts), margin={"l": 90, "r": 8, "t": 34, "b": 16})
    plot.add_trace(
        go.Heatmap(
            z=result.gain.clamp_min(0).numpy(),
            x=result.properties,
            y=[str(part) for part in result.parts],
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=1,
            customdata=facts,
            colorbar={
                "title": {"text": "accuracy, from chance (0) to all (1)", "side": "right"},
                "thickness": 12,
            },
            hovertemplate="%{y}, %{x}: %{customdata[0]:.1%} of images held out, %{customdata[1]:.1%} of variance"
            "<extra></extra>",
        )
    )
    plot.update_xaxes(side="top", ticks="", showgrid=False)
    plot.update_yaxes(autorange="reversed", ticks="", showgrid=False, dtick=1, tickfont={"size": 10})
    return plot


def naming_bars(result: Naming) -> go.Figure:
    """How much texts speak of each property, beside how much their pool does."""
    frame = result.to_frame()
    plot = figure(height=FRAME + 44 * len(frame), barmode="group")
    for rule, column, name in zip(RULES[:2], ("share", "usual"), ("these texts", "their pool"), strict=True):
        plot.add_trace(
            go.Bar(
                x=frame[column],
                y=frame["property"],
                orientation="h",
                name=name,
                marker={"color": rule.colour},
                customdata=frame["values"],
                hovertemplate="%{y}: %{x:.0%}; %{customdata}<extra>" + name + "</extra>",
            )
        )
    plot.update_xaxes(title="share of texts that name a value", tickformat=".0%", rangemode="tozero")
    plot.update_yaxes(autorange="reversed", ticks="", showgrid=False, automargin=True)
    return plot


def agreement_map(result: Agreement) -> go.Figure:
    """Counts of parts, by the property that the probe finds (down) and the one that the texts name (right)."""
    rows = sorted(set(result.probed))
    columns = [*rows, *sorted(set(result.named) - set(rows))]
    counts = np.zeros((len(rows), len(columns)), dtype=int)
    for probed, named in zip(result.probed, result.named, strict=True):
        counts[rows.index(probed), columns.index(named)] += 1
    plot = figure(height=140 + 36 * len(rows), margin={"l": 110, "r": 8, "t": 16, "b": 56})
    plot.add_trace(
        go.Heatmap(
            z=counts,
            x=columns,
            y=rows,
            colorscale=SEQUENTIAL,
            xgap=2,
            ygap=2,
            texttemplate="%{z}",
            colorbar={"title": {"text": "parts", "side": "right"}, "thickness": 12},
            hovertemplate="probe: %{y}, texts: %{x}: %{z} parts<extra></extra>",
        )
    )
    plot.update_xaxes(title="named by the texts", ticks="", showgrid=False)
    plot.update_yaxes(title="found by the probe", autorange="reversed", ticks="", showgrid=False)
    return plot
