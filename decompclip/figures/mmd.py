"""MMD of components: a heat map of heads and MLPs, and curves over layers (paper, figures 3 and 8d)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from decompclip.figures.components import component_map
from decompclip.figures.theme import INK, RULES, figure

if TYPE_CHECKING:
    from decompclip.operators.mmd import MMD

RATE = 0.05
"""False discovery rate at which a part is marked."""


def mmd_map(result: MMD) -> go.Figure:
    """Layers upward, heads to the right, MLPs beside; a dot marks a difference beyond chance."""
    from decompclip.operators.parts import grid

    shape = result.n_layers, result.n_heads
    heads_p = mlps_p = None
    if result.adjusted is not None:
        heads_p, mlps_p = grid(result.parts, result.adjusted, *shape)
    values = result.values.numpy()
    plot = component_map(
        result.heads,
        result.mlps,
        unit=_unit(result),
        scale="sequential",
        heads_note=heads_p,
        mlps_note=mlps_p,
        note="adjusted p",
        top=float(np.abs(values).max()) or 1.0,
    )
    if heads_p is not None and mlps_p is not None:
        for column, p in ((1, heads_p), (2, mlps_p[:, None])):
            layers, heads = (p <= RATE).nonzero(as_tuple=True)
            x = [str(head) for head in heads.tolist()] if column == 1 else ["MLP"] * len(layers)
            plot.add_trace(_dots(x, layers.tolist(), legend=column == 1), row=1, col=column)
        plot.update_layout(margin={"t": 34}, height=plot.layout.height + 22)  # pyright: ignore[reportAttributeAccessIssue]
    return plot


def mmd_curves(result: MMD) -> go.Figure:
    """Of whole layers: heads and MLPs over depth; filled where the difference is beyond chance."""
    plot = figure(height=320, margin={"l": 64, "r": 16, "t": 34, "b": 48})
    names = ("all heads of the layer", "MLP")
    for kind, name, style in zip(("heads", "mlps"), names, RULES, strict=False):
        rows = [i for i, part in enumerate(result.parts) if part.kind == kind]
        p = None if result.adjusted is None else result.adjusted[rows]
        symbols = [
            style.symbol + ("" if p is None or q <= RATE else "-open") for q in (rows if p is None else p)
        ]
        plot.add_trace(
            go.Scatter(
                x=[result.parts[i].layer for i in rows],
                y=result.values[rows].numpy(),
                mode="lines+markers",
                line=style.line(),
                marker=style.marker(symbol=symbols),
                name=name,
                customdata=["" if p is None else f", adjusted p {q:.3g}" for q in (rows if p is None else p)],
                hovertemplate="layer %{x}: %{y:.4f}%{customdata}<extra>" + name + "</extra>",
            )
        )
    plot.update_xaxes(title="layer", dtick=1)
    plot.update_yaxes(title=_unit(result), rangemode="tozero")
    return plot


def _unit(result: MMD) -> str:
    return "MMD² × 1000 (paper's kernel)" if result.kernel == "paper" else "MMD² (unbiased)"


def _dots(x: list[str], y: list[int], *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=[layer - 0.34 for layer in y],  # under the cell's number
        mode="markers",
        marker={"symbol": "circle", "size": 6, "color": "#ffffff", "line": {"width": 1, "color": INK}},
        name=f"beyond chance (false discovery rate {RATE:.0%})",
        hoverinfo="skip",
        showlegend=legend,
    )
