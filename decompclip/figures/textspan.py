"""What components write, in words: one component's texts, and a map of all components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from decompclip.figures.theme import RULES, SEQUENTIAL, TEMPLATE, figure

if TYPE_CHECKING:
    from decompclip.operators.textspan_result import ReconstructionAccuracy


def span_bars(texts: Sequence[str], explained: Float[Tensor, " pick"], *, name: str) -> go.Figure:
    """The texts of one component from the top, each with the variance that it adds to those before it."""
    shares, texts = explained.numpy(), [_escaped(text) for text in texts]
    added = np.diff(shares, prepend=0.0)
    plot = figure(
        height=max(220, 24 * len(texts) + 90), showlegend=False, title={"text": _escaped(name), "x": 0}
    )
    plot.add_trace(
        go.Bar(
            x=added,
            y=list(range(len(texts))),
            orientation="h",
            marker={"color": RULES[0].colour},
            customdata=np.stack([np.asarray(texts, dtype=object), shares], axis=1) if texts else None,
            text=[f"{share:.0%}" for share in shares],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{customdata[0]}<br>adds %{x:.1%}, with those above %{customdata[1]:.1%}<extra></extra>",
        )
    )
    top = float(added.max()) if texts else 1.0
    plot.update_xaxes(
        title="share of the variance added (beside the bars: cumulative)",
        tickformat=".0%",
        range=[0, 1.15 * top],
    )
    plot.update_yaxes(
        tickvals=list(range(len(texts))),
        ticktext=texts,
        autorange="reversed",
        ticks="",
        showgrid=False,
        automargin=True,
    )
    return plot


def span_map(
    cells: Sequence[tuple[int, int | None, float, Sequence[str]]],
    *,
    n_layers: int,
    n_heads: int,
    n_texts: int,
) -> go.Figure:
    """The share of variance that each component's first texts explain, layers upward; the texts on hovering.

    Args:
        cells: layer, head (None: the layer's MLP), share and texts of each component.
        n_texts: how many first texts the shares are of.
    """
    values = np.full((n_layers, n_heads + 1), np.nan)
    words = np.full((n_layers, n_heads + 1), "", dtype=object)
    for layer, head, share, texts in cells:
        column = n_heads if head is None else head
        values[layer, column] = share
        words[layer, column] = "<br>".join(_escaped(text) for text in texts)
    used = [column for column in range(n_heads + 1) if not np.isnan(values[:, column]).all()]
    rows = [layer for layer in range(n_layers) if not np.isnan(values[layer]).all()]
    names = [*map(str, range(n_heads)), "MLP"]
    plot = go.Figure(
        go.Heatmap(
            z=values[np.ix_(rows, used)],
            x=[names[column] for column in used],
            y=[str(row) for row in rows],
            customdata=words[np.ix_(rows, used)],
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=float(np.nanmax(values)) if cells else 1.0,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            colorbar={
                "title": {"text": f"variance in {n_texts} texts", "side": "right"},
                "tickformat": ".0%",
            },
            hovertemplate="layer %{y}, head %{x}: %{z:.1%}<br>%{customdata}<extra></extra>",
        )
    )
    plot.update_layout(
        template=TEMPLATE, height=max(260, 34 * len(rows) + 110), margin={"l": 52, "r": 8, "t": 12, "b": 48}
    )
    plot.update_xaxes(title="head", type="category", ticks="", showgrid=False)
    plot.update_yaxes(title="layer", type="category", ticks="", showgrid=False)
    return plot


def accuracy_bars(result: ReconstructionAccuracy) -> go.Figure:
    """Accuracy of the features as they are, of the text reconstructions, and of the means."""
    frame = result.to_frame()
    plot = figure(height=220, showlegend=False)
    plot.add_trace(
        go.Bar(
            x=frame["accuracy"],
            y=frame["components"],
            orientation="h",
            marker={"color": RULES[0].colour},
            text=[f"{share:.1%}" for share in frame["accuracy"]],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2%}<extra></extra>",
        )
    )
    plot.update_xaxes(title="zero-shot accuracy", tickformat=".0%", range=[0, 1.1])
    plot.update_yaxes(autorange="reversed", ticks="", showgrid=False, automargin=True)
    return plot


def _escaped(text: str) -> str:
    """Plotly reads a few tags in its labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
