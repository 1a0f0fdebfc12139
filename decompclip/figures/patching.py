"""Patching: heat maps of what each place's activation does, layers upward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.components import component_map
from decompclip.figures.theme import DIVERGING, TEMPLATE

if TYPE_CHECKING:
    from decompclip.operators.patching import Patching
    from decompclip.operators.paths import PathPatching

NAMES = {
    "resid_pre": "stream before the block",
    "resid_mid": "stream between attention and MLP",
    "resid_post": "stream after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "heads (z)",
}


def patching_maps(result: Patching, *, shares: bool = True) -> go.Figure:
    """One map for each site on common colours; a share of 1 does what patching everything does.

    Args:
        shares: of the gap between the two runs; else changes of the score.
    """
    columns = min(3, len(result.effects))
    rows = -(-len(result.effects) // columns)
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=[NAMES[site] for site in result.effects],
        horizontal_spacing=0.06,
        vertical_spacing=0.28 / max(1, rows - 1),
    )
    scale = 1 / result.gap if shares and result.gap else 1.0
    top = max((float(effects.abs().max()) * abs(scale) for effects in result.effects.values()), default=1.0)
    for place, (site, effects) in enumerate(result.effects.items()):
        grid, axis, names = _grid(site, effects, by_token=result.by_token)
        row, column = place // columns + 1, place % columns + 1
        plot.add_trace(
            go.Heatmap(
                z=(grid * scale).numpy(),
                x=names,
                y=list(range(len(grid))),
                coloraxis="coloraxis",
                hovertemplate=f"layer %{{y}}, {axis or 'all tokens'} %{{x}}: %{{z:.3f}}<extra>{NAMES[site]}</extra>",
            ),
            row=row,
            col=column,
        )
        plot.update_xaxes(title=axis, showticklabels=bool(axis), row=row, col=column)
    plot.update_xaxes(ticks="", showgrid=False, zeroline=False, type="category", nticks=10)
    plot.update_yaxes(dtick=1, ticks="", showgrid=False, zeroline=False)
    plot.update_yaxes(title="layer", col=1)
    plot.update_annotations(font_size=12)
    n_layers = max(len(effects) for effects in result.effects.values())
    plot.update_layout(
        template=TEMPLATE,
        height=rows * max(220, 24 * n_layers + 110),
        autosize=True,
        margin={"l": 52, "r": 8, "t": 40, "b": 48},
        coloraxis={
            "colorscale": DIVERGING,
            "cmin": -(top or 1.0),
            "cmax": top or 1.0,
            "colorbar": {
                "title": {"text": "share of the gap" if shares else "change of the score", "side": "right"},
                "thickness": 12,
            },
        },
    )
    return plot


def path_map(result: PathPatching) -> go.Figure:
    """The receivers of a head's message: heads by layer, and the MLP of each layer beside them."""
    known = [grid[~grid.isnan()] for grid in (result.heads, result.mlps)]
    top = max((float(values.abs().max()) for values in known if values.numel()), default=0.0)
    plot = component_map(
        result.heads, result.mlps, unit="change of the score", scale="diverging", top=top or 1.0
    )
    return plot.update_layout(
        title={"text": f"what {result.sender!r} tells each of them", "font": {"size": 13}}, margin_t=64
    )


def _grid(site: str, effects: Tensor, *, by_token: bool) -> tuple[Tensor, str, list[str]]:
    """Layers by what the site is taken apart into; heads token by token stand side by side."""
    grid = effects.reshape(len(effects), -1)
    if site == "z" and by_token:
        n_heads, n_tokens = effects.shape[1:]
        return grid, "head.token", [f"{h}.{t}" for h in range(n_heads) for t in range(n_tokens)]
    axis = "head" if site == "z" else "token" if by_token else ""
    return grid, axis, [str(i) for i in range(grid.shape[1])] if axis else [""]
