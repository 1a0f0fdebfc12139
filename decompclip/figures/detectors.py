"""Decomp-Det's scores: ROC curves of its rules, and how many heads it flags on clean and suspect images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from jaxtyping import Int
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.theme import GRID, RULES, TEMPLATE, bars

if TYPE_CHECKING:
    from decompclip.audit.result import Detector


def roc(detectors: Sequence[Detector], names: Sequence[str]) -> go.Figure:
    """One curve a rule; the point on it is the detector's own threshold."""
    plot = go.Figure(layout={"template": TEMPLATE, "height": 380, "autosize": True})
    plot.add_trace(
        go.Scatter(
            x=[0, 100],
            y=[0, 100],
            mode="lines",
            line={"color": GRID, "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for detector, name, style in zip(detectors, names, RULES, strict=False):
        false, true = _rates(detector.clean_counts), _rates(detector.suspect_counts)
        cut = min(detector.zeta + 1, len(false) - 1)
        plot.add_trace(
            go.Scatter(
                x=false,
                y=true,
                mode="lines+markers",
                line=style.line(),
                marker=style.marker(size=[13 if i == cut else 5 for i in range(len(false))]),
                name=name,
                customdata=list(range(len(false))),
                hovertemplate="%{customdata} or more flagged: %{y:.1f} % of suspect, %{x:.1f} % of clean<extra>"
                + name
                + "</extra>",
            )
        )
    plot.update_xaxes(title="clean images called suspicious, %", range=[-2, 102], dtick=25)
    plot.update_yaxes(title="suspect images called suspicious, %", range=[-2, 102], dtick=25)
    plot.update_layout(
        margin={"l": 60, "r": 12, "t": 12, "b": 48},
        legend={"orientation": "v", "x": 0.99, "xanchor": "right", "y": 0.02, "yanchor": "bottom"},
    )
    return plot


def counts(detectors: Sequence[Detector], names: Sequence[str]) -> go.Figure:
    """Share of images by number of flagged heads, a panel a rule; suspicious is right of the line."""
    plot = make_subplots(
        2,
        2,
        subplot_titles=list(names),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.14,
    )
    for place, detector in enumerate(detectors):
        row, column = place // 2 + 1, place % 2 + 1
        for label, found, colour, filled in (
            ("clean", detector.clean_counts, "#0072B2", True),
            ("suspect", detector.suspect_counts, "#D55E00", False),
        ):
            plot.add_trace(
                go.Bar(
                    x=list(range(len(found))),
                    y=(100 * found.double() / found.sum()).tolist(),
                    name=label,
                    marker=bars(colour, filled=filled),
                    legendgroup=label,
                    showlegend=place == 0,
                    hovertemplate="%{x} heads: %{y:.1f} % of " + label + " images<extra></extra>",
                ),
                row=row,
                col=column,
            )
        threshold = {"dash": "dot", "width": 1, "color": "#888"}
        plot.add_vline(detector.zeta + 0.5, row=row, col=column, line=threshold)  # pyright: ignore[reportArgumentType]
    plot.update_xaxes(dtick=1 if len(detectors[0].clean_counts) <= 13 else 2)
    plot.update_xaxes(title="flagged heads", row=2)
    plot.update_yaxes(title="images, %", col=1)
    plot.update_yaxes(range=[0, 103])
    plot.update_annotations(font_size=12)
    plot.update_layout(
        template=TEMPLATE,
        height=380,
        autosize=True,
        bargap=0.25,
        margin={"l": 56, "r": 12, "t": 62, "b": 48},
        legend={"y": 1.1},
    )
    return plot


def _rates(counts: Int[Tensor, " count"]) -> list[float]:
    """Share of images with at least 0, 1, ... flagged heads, and with more than all: 100 to 0."""
    at_least = counts.flip(0).cumsum(0).flip(0).double() / counts.sum()
    return [*(100 * at_least).tolist(), 0.0]
