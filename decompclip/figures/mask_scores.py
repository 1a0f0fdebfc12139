"""How well maps point to a mask: share inside and pointing game, beside chance and a control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.evaluation.intervals import Rate, Z
from decompclip.figures.theme import Style, figure

if TYPE_CHECKING:
    from decompclip.operators.mask_scores import MaskScores

SHARE = Style("share of what is positive, inside the mask", "#D55E00", "solid", "circle")
HITS = Style("strongest patch inside the mask", "#0072B2", "dash", "diamond")
MAX_ROWS = 24


def scores(
    found: MaskScores,
    *,
    control: MaskScores | None = None,
    control_name: str = "clean twins",
    count: int = MAX_ROWS,
) -> go.Figure:
    """One row a map, the highest share first; 95 % intervals over images; the dotted line is chance.

    Args:
        control: of the same maps where there is nothing to find (hollow markers), such as the clean twins'.
        count: rows; the maps with the lowest shares are left out, and counted below.

    Raises:
        ValueError: the control is of other maps.
    """
    if control is not None and control.labels != found.labels:
        raise ValueError(
            "expected a control of the same maps; received one of others; score both for the same heads"
        )
    order = found.order[:count]
    plot = figure(height=96 + 22 * len(order), margin={"l": 10, "r": 16, "t": 52, "b": 48})
    for scored, suffix, hollow in ((found, "", False), (control, f" ({control_name})", True)):
        for style, offset in ((SHARE, -0.16), (HITS, 0.16)):
            if scored is not None:
                plot.add_trace(_markers(scored, style, order, offset, suffix, hollow))
    chance = 100 * float(found.chance.mean())
    plot.add_vline(chance, line={"dash": "dot", "width": 1.5, "color": "#888"})  # pyright: ignore[reportArgumentType]
    more = len(found.labels) - len(order)
    title = "%" + (f" (not shown: {more} maps of lower share)" if more else "")
    plot.update_xaxes(title=f"{title}; dotted: chance, {chance:.1f} %", range=[-2, 102], dtick=20)
    plot.update_yaxes(
        tickvals=list(range(len(order))), ticktext=[found.labels[i] for i in order],
        range=[len(order) - 0.5, -0.5], automargin=True, zeroline=False, ticks="",
    )  # fmt: skip
    return plot


def _markers(
    scored: MaskScores, style: Style, order: list[int], offset: float, suffix: str, hollow: bool
) -> go.Scatter:
    if style is HITS:
        rates = [Rate.of(scored.hit[i]) for i in order]
        ends = [(rate.value, rate.low, rate.high) for rate in rates]
    else:
        frame = scored.to_frame().iloc[order]
        half = (Z * frame["share_error"]).fillna(0.0)
        low, high = (frame["share"] - half).clip(lower=0), (frame["share"] + half).clip(upper=1)
        ends = list(zip(frame["share"], low, high, strict=True))
    return go.Scatter(
        x=[100 * value for value, *_ in ends],
        y=[row + offset for row in range(len(order))],
        error_x={
            "array": [100 * (high - value) for value, _, high in ends],
            "arrayminus": [100 * (value - low) for value, low, _ in ends],
            "thickness": 1.2,
            "width": 3,
        },
        mode="markers",
        marker=style.marker(size=7, symbol=style.symbol + ("-open" if hollow else "")),
        name=style.label + suffix,
        customdata=[scored.labels[i] for i in order],
        hovertemplate="%{customdata}: %{x:.1f} %<extra>" + style.label + suffix + "</extra>",
    )
