"""Heads on one image with and without its trigger: maps side by side, with what is known of each head above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.theme import DIVERGING, TEMPLATE

Grid = Sequence[Sequence[float]]

CELL = 96
"""Pixels of a map's side."""


@dataclass(frozen=True)
class HeadPair:
    """Maps of one head on the clean and on the triggered image, and two short lines about it."""

    title: str
    clean: Grid
    triggered: Grid


def head_pairs(
    heads: Sequence[HeadPair],
    *,
    unit: str,
    pictures: tuple[str, str] | None = None,
    marked: Sequence[tuple[int, int]] = (),
) -> go.Figure:
    """Two rows, clean above triggered; a column a head, behind one of the pictures where they are known.

    Args:
        pictures: data URIs of the clean and the triggered image.
        marked: patches (row, column) that the trigger touches, outlined in the lower row.
    """
    first = 1 if pictures else 0
    columns = len(heads) + first
    titles = ["image"] * first + [head.title for head in heads] + [""] * columns
    plot = make_subplots(2, columns, subplot_titles=titles, horizontal_spacing=0.008, vertical_spacing=0.04)
    top = max(
        (abs(v) for h in heads for grid in (h.clean, h.triggered) for row in grid for v in row), default=1.0
    )
    for column, head in enumerate(heads, 1 + first):
        for row, grid in enumerate((head.clean, head.triggered), 1):
            plot.add_trace(
                go.Heatmap(
                    z=[list(line) for line in grid],
                    colorscale=DIVERGING,
                    zmin=-top,
                    zmax=top,
                    showscale=column == columns and row == 1,
                    colorbar={
                        "title": {"text": unit, "side": "right"},
                        "thickness": 10,
                        "len": 1.0,
                        "y": 0.5,
                    },
                    hovertemplate="row %{y}, column %{x}: %{z:.4f}<extra></extra>",
                ),
                row=row,
                col=column,
            )
        for y, x in marked:
            plot.add_trace(_outline(y, x), row=2, col=column)
    for row, picture in enumerate(pictures or (), 1):
        plot.add_trace(go.Image(source=picture, hoverinfo="skip"), row=row, col=1)
    plot.update_xaxes(visible=False, constrain="domain")
    plot.update_yaxes(visible=False, autorange="reversed", constrain="domain")
    for number in range(1, 2 * columns + 1):  # square patches
        plot.layout[f"yaxis{number if number > 1 else ''}"].scaleanchor = f"x{number if number > 1 else ''}"
    for row, name in enumerate(("clean", "triggered"), 1):
        plot.update_yaxes(
            visible=True, showticklabels=False, showgrid=False, ticks="", title=name, row=row, col=1
        )
    plot.update_layout(
        template=TEMPLATE,
        height=2 * CELL + 96,
        autosize=True,
        margin={"l": 34, "r": 70, "t": 62, "b": 16},
        showlegend=False,
    )
    plot.update_annotations(font_size=10)
    return plot


def _outline(y: int, x: int) -> go.Scatter:
    return go.Scatter(
        x=[x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5],
        y=[y - 0.5, y - 0.5, y + 0.5, y + 0.5, y - 0.5],
        mode="lines",
        line={"color": "#333d47", "width": 1.5},
        hoverinfo="skip",
    )
