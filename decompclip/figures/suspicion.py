"""Scores of detection without a hint: how they lie in clean and in suspect images, and where the threshold is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.figures.theme import INK, bars, figure

if TYPE_CHECKING:
    from decompclip.audit.result import Suspicion


def score_histogram(found: Suspicion) -> go.Figure:
    """Share of images a bin; right of the line an image is flagged. The last bin holds all that lies beyond."""
    edges = found.edges
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    plot = figure(height=320, margin={"l": 56, "r": 12, "t": 40, "b": 48}, barmode="overlay", bargap=0)
    for label, counts, colour, filled in (
        ("clean", found.clean_counts, "#0072B2", True),
        ("suspect", found.suspect_counts, "#D55E00", False),
    ):
        plot.add_trace(
            go.Bar(
                x=middles,
                y=(100 * counts.double() / counts.sum().clamp_min(1)).tolist(),
                width=float(edges[1] - edges[0]),
                name=label,
                marker=bars(colour, filled=filled),
                hovertemplate="score %{x:.2f}: %{y:.1f} % of " + label + " images<extra></extra>",
            )
        )
    plot.add_vline(
        found.threshold,
        line={"dash": "dot", "width": 1.5, "color": INK},  # pyright: ignore[reportArgumentType]
        annotation={
            "text": f"flagged from here (set to {100 * found.stated:g} % of clean images)",
            "xanchor": "left",
            "font": {"size": 11},
        },
        annotation_position="top right",
    )
    plot.update_xaxes(title="score: higher is more suspicious", range=[0, float(edges[-1])])
    plot.update_yaxes(title="images, %")
    plot.update_layout(legend={"x": 1, "xanchor": "right", "y": 1.02})
    return plot
