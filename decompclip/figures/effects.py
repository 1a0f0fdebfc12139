"""Direct against causal effects: one marker a component, or a heat map of either or of their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import plotly.graph_objects as go

from decompclip.figures.components import component_map
from decompclip.figures.theme import INK, RULES, figure
from decompclip.operators.effects import Mode

if TYPE_CHECKING:
    from decompclip.operators.effects import Effects

NAMES = {"heads": "heads", "mlps": "MLPs", "embed": "embedding", "pool": "MLP of the pool"}
LABELLED = 5
"""Markers that carry their name: so many of those farthest off the diagonal, and of the largest effects."""


def effect_scatter(result: Effects) -> go.Figure:
    """Causal over direct with their intervals; on the diagonal, later layers add nothing."""
    direct, causal = result.direct.numpy(), result.causal.numpy()
    ends = [float(min(direct.min(), 0)), float(max(direct.max(), 0))]
    plot = figure(height=460, margin={"l": 64, "r": 64, "t": 34, "b": 52})
    plot.add_trace(
        go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            line={"color": INK, "width": 1, "dash": "dot"},
            name="causal = direct",
            hoverinfo="skip",
        )
    )
    size = result.direct.square() + result.causal.square()
    ranks = [x.argsort(descending=True)[:LABELLED].tolist() for x in (result.difference.abs(), size)]
    far = list(dict.fromkeys(ranks[0] + ranks[1]))
    sides = {i: "middle left" if rank % 2 == 0 else "middle right" for rank, i in enumerate(far)}
    for style, (kind, name) in zip(RULES, NAMES.items(), strict=True):
        rows = [i for i, part in enumerate(result.parts) if part.kind == kind]
        if rows:
            plot.add_trace(
                go.Scatter(
                    x=direct[rows],
                    y=causal[rows],
                    error_x=_whiskers(result.direct_error[rows].numpy()),
                    error_y=_whiskers(result.causal_error[rows].numpy()),
                    mode="markers+text",
                    marker=style.marker(),
                    text=[f" {result.parts[i]} " if i in sides else "" for i in rows],
                    textposition=[sides.get(i, "top center") for i in rows],
                    cliponaxis=False,
                    textfont={"size": 10},
                    name=name,
                    customdata=[str(result.parts[i]) for i in rows],
                    hovertemplate="%{customdata}: direct %{x:.4f}, causal %{y:.4f}<extra></extra>",
                )
            )
    what = result.metric.replace("_", " ")
    plot.update_xaxes(title=f"direct effect on the {what}")
    plot.update_yaxes(title="causal effect")
    return plot


def effect_map(result: Effects, mode: Mode) -> go.Figure:
    """One of the three, layers by heads with the MLPs beside."""
    shown = [x.abs().nan_to_num().max() for m in get_args(Mode) for x in (result.heads(m), result.mlps(m))]
    return component_map(
        result.heads(mode),
        result.mlps(mode),
        unit=f"{mode}{'' if mode == 'difference' else ' effect'} ({result.metric.replace('_', ' ')})",
        scale="diverging",
        top=float(max(shown)) or 1.0,  # of all three, which are to be compared
    )


def _whiskers(errors: object) -> dict[str, object]:
    return {"array": errors, "thickness": 1, "width": 0, "color": "rgba(128, 138, 148, 0.5)"}
