"""One number a component, as a heat map: heads by layer, the MLP of each layer beside them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.theme import DIVERGING, SEQUENTIAL, TEMPLATE

LABELLED = 96
"""Cells up to which each carries its number."""


def component_map(
    heads: Float[Tensor, "layer head"],
    mlps: Float[Tensor, " layer"],
    *,
    unit: str,
    scale: Literal["diverging", "sequential"],
    heads_note: Float[Tensor, "layer head"] | None = None,
    mlps_note: Float[Tensor, " layer"] | None = None,
    note: str = "±",
    top: float | None = None,
) -> go.Figure:
    """Layers upward, heads to the right, the MLPs in a column of their own on the same colours.

    Args:
        heads_note, mlps_note: a second number of each component, told beside the first on hovering.
        note: the words between the two.
        top: end of the colour scale, for figures that are to be compared; by default the largest size in this one.
    """
    n_layers, n_heads = heads.shape
    values = np.concatenate([heads.numpy().ravel(), mlps.numpy()])
    top = top or float(np.abs(values).max()) or 1.0
    colours = (
        {"colorscale": DIVERGING, "cmin": -top, "cmax": top}
        if scale == "diverging"
        else {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": top}
    )
    plot = make_subplots(
        1,
        2,
        column_widths=[n_heads / (n_heads + 1.3), 1.3 / (n_heads + 1.3)],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    grids = (
        (heads, heads_note, [str(h) for h in range(n_heads)], "head"),
        (mlps[:, None], None if mlps_note is None else mlps_note[:, None], ["MLP"], "MLP"),
    )
    for column, (grid, second, names, what) in enumerate(grids, start=1):
        plot.add_trace(
            go.Heatmap(
                z=grid.numpy(),
                x=names,
                y=list(range(n_layers)),
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
                customdata=None if second is None else second.numpy(),
                texttemplate=_digits(top, scale) if values.size <= LABELLED else None,
                textfont={"size": 10},
                hovertemplate=f"layer %{{y}}, {what} %{{x}}: %{{z:.4f}}"
                + ("" if second is None else f" {note} %{{customdata:.4f}}")
                + "<extra></extra>",
            ),
            row=1,
            col=column,
        )
    plot.update_xaxes(title="head", row=1, col=1, type="category", ticks="", showgrid=False)
    plot.update_xaxes(type="category", ticks="", showgrid=False, row=1, col=2)
    plot.update_yaxes(dtick=1, ticks="", showgrid=False, zeroline=False)
    plot.update_yaxes(title="layer", row=1, col=1)
    plot.update_layout(
        template=TEMPLATE,
        height=max(260, 34 * n_layers + 110),
        autosize=True,
        margin={"l": 52, "r": 8, "t": 12, "b": 48},
        coloraxis=colours | {"colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 12}},
    )
    return plot


def _digits(top: float, scale: str) -> str:
    """Two digits of each number, for sizes of many orders; of those with a sign, two of the largest."""
    if scale == "sequential":
        return "%{z:.2~r}"
    return "%{z:." + str(max(0, 1 - int(np.floor(np.log10(top))))) + "f}"
