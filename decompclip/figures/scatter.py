"""Points against points, with the line on which both are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.theme import INK, TEMPLATE, figure, lettered, styled

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
    plot.update_layout(
        template=TEMPLATE,
        height=height,
        autosize=True,
        margin={"l": 10, "r": 16, "t": 64, "b": 48},
        legend={"y": 1 + 26 / (height - 112)},
    )
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
    return go.Scatter(
        x=list(ends),
        y=list(ends),
        mode="lines",
        line={"width": 1, "dash": "dot", "color": INK},
        name=name,
        legendgroup=name,
        showlegend=legend,
        hoverinfo="skip",
    )


def _whiskers(errors: object) -> dict[str, object]:
    return {"array": errors, "thickness": 1, "width": 0, "color": "rgba(128, 138, 148, 0.5)"}
