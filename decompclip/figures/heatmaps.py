"""Heat maps: one number a component, a setting or a pair of things, as a coloured cell.

Pictures, and maps of patches to lay over them, as PNG data that a page can hold.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from plotly.colors import hex_to_rgb, sample_colorscale, unlabel_rgb
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.scatter import Point, whiskers
from decompclip.figures.theme import DIVERGING, INK, RULES, SEQUENTIAL, escaped, figure, framed

Scale = Literal["diverging", "sequential"]

LABELLED = 96
"""Cells up to which each carries its number."""

LONGEST = 36
"""Letters of a text that an axis shows; the whole stands in the hover."""


def component_map(
    heads: Float[Tensor, "layer head"],
    mlps: Float[Tensor, " layer"],
    *,
    unit: str,
    scale: Scale,
    heads_note: Float[Tensor, "layer head"] | None = None,
    mlps_note: Float[Tensor, " layer"] | None = None,
    note: str = "±",
    top: float | None = None,
    dots: tuple[Bool[Tensor, "layer head"], Bool[Tensor, " layer"]] | None = None,
    dots_name: str = "",
    title: str = "",
) -> go.Figure:
    """One number a component: layers upward, heads to the right, the MLPs in a column of their own on the same colours.

    Args:
        heads: numbers of the heads; nan where there is none.
        mlps: numbers of the MLPs.
        unit: of the numbers, beside the colours.
        scale: "diverging" around zero, or "sequential" from zero.
        heads_note: a second number of each head, shown beside the first on hovering.
        mlps_note: likewise of the MLPs.
        note: the words between the two.
        top: end of the colour scale, for figures that are to be compared; by default the largest size in this one.
        dots: cells that carry a dot, of heads and of MLPs.
        dots_name: what a dot says.
        title: above the map.
    """
    n_layers, n_heads = heads.shape
    values = np.concatenate([heads.numpy().ravel(), mlps.numpy()])
    top = top or _largest(values)
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
    above = 22 * (dots is not None) + 52 * bool(title)
    if dots is not None:
        for column, (where, (_, _, names, _)) in enumerate(
            zip((dots[0], dots[1][:, None]), grids, strict=True), 1
        ):
            layers, columns = where.nonzero(as_tuple=True)
            x = [names[place] for place in columns.tolist()]
            plot.add_trace(_dots(x, layers.tolist(), dots_name, legend=column == 1), row=1, col=column)
    plot.update_xaxes(type="category", ticks="", showgrid=False)
    plot.update_xaxes(title="head", row=1, col=1)
    ends = [-0.5, n_layers - 0.5]  # plotly's own leave room for the dots, and count a layer -1
    plot.update_yaxes(dtick=1, range=ends, ticks="", showgrid=False, zeroline=False)
    plot.update_yaxes(title="layer", row=1, col=1)
    return framed(
        plot,
        height=max(260, 34 * n_layers + 110) + above,
        margin={"l": 52, "r": 8, "t": 12 + above, "b": 48},
        coloraxis=_colours(scale, top, unit),
        title={"text": escaped(title), "font": {"size": 13}} if title else None,
    )


@dataclass(frozen=True)
class Grid:
    """One map among several on the same colours.

    Attributes:
        title: above it.
        values: rows upward.
        columns: names along its horizontal axis; none are shown where `axis` is empty.
        axis: title of that axis.
    """

    title: str
    values: Float[Tensor, "row column"]
    columns: Sequence[str]
    axis: str = ""


def grid_maps(grids: Sequence[Grid], *, unit: str, top: float) -> go.Figure:
    """Layers upward in each, three maps in a line, all on the same colours around zero."""
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=[grid.title for grid in grids],
        horizontal_spacing=0.06,
        vertical_spacing=0.28 / max(1, rows - 1),
    )
    for place, grid in enumerate(grids):
        row, column = place // columns + 1, place % columns + 1
        plot.add_trace(
            go.Heatmap(
                z=grid.values.numpy(),
                x=list(grid.columns),
                y=list(range(len(grid.values))),
                coloraxis="coloraxis",
                hovertemplate=f"layer %{{y}}, {grid.axis or 'all tokens'} %{{x}}: %{{z:.3f}}<extra>{grid.title}</extra>",
            ),
            row=row,
            col=column,
        )
        plot.update_xaxes(title=grid.axis, showticklabels=bool(grid.axis), row=row, col=column)
    few = max(len(grid.columns) for grid in grids) <= 36 // columns
    plot.update_xaxes(ticks="", showgrid=False, zeroline=False, type="category", nticks=36 if few else 10)
    plot.update_yaxes(dtick=1, ticks="", showgrid=False, zeroline=False)
    plot.update_yaxes(title="layer", col=1)
    plot.update_annotations(font_size=12)
    return framed(
        plot,
        height=rows * max(220, 24 * max(len(grid.values) for grid in grids) + 110),
        margin={"l": 52, "r": 8, "t": 40, "b": 48},
        coloraxis=_colours("diverging", top or 1.0, unit),
    )


def matrix(
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    hover: str,
    scale: Scale = "sequential",
    top: float | None = None,
    notes: np.ndarray | None = None,
    row_height: int = 34,
    x: str = "",
    y: str = "",
    upward: bool = False,
    x_above: bool = False,
    numbers: bool = False,
    percent: bool = False,
) -> go.Figure:
    """Any table of numbers as cells.

    Args:
        values: rows by columns; nan where there is none.
        rows: their names.
        columns: their names.
        unit: of the numbers, beside the colours.
        hover: plotly's template for what a cell shows.
        scale: "diverging" around zero, or "sequential" from zero.
        top: end of the colours; by default the largest size.
        notes: more of each cell, for `hover`.
        row_height: pixels.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        upward: the first row at the bottom, as for layers.
        x_above: the columns' names above the cells.
        numbers: whether cells carry their number.
        percent: whether the colours' ends are shares.
    """
    top = top or _largest(values)
    plot = figure(
        height=max(220 if upward else 0, row_height * len(rows) + 110) + (30 if x and not upward else 0),
        margin={"l": 52 if upward else 90, "r": 8, "t": 34 if x_above else 14, "b": 16 if x_above else 52},
    )
    plot.add_trace(
        go.Heatmap(
            z=values,
            x=[*map(escaped, columns)],
            y=[*map(escaped, rows)],
            customdata=notes,
            coloraxis="coloraxis",
            xgap=2,
            ygap=2 if row_height > 20 else 1,
            hoverongaps=False,
            texttemplate="%{z}" if numbers else None,
            hovertemplate=hover + "<extra></extra>",
        )
    )
    colours = _colours(scale, top, unit)
    if percent:
        colours["colorbar"] |= {"tickformat": ".0%"}
    plot.update_layout(coloraxis=colours)
    plot.update_xaxes(
        title=x or None, type="category", ticks="", showgrid=False, side="top" if x_above else "bottom"
    )
    plot.update_yaxes(
        title=y or None,
        type="category",
        ticks="",
        showgrid=False,
        automargin=True,
        autorange=True if upward else "reversed",
        tickfont={"size": 10} if row_height < 20 else None,
        dtick=1,
    )
    return plot


def text_cosines(
    measures: Mapping[str, Point],
    chance: Mapping[str, float],
    cosines: Float[Tensor, "before after"],
    before: Sequence[str],
    after: Sequence[str],
) -> go.Figure:
    """How alike two sets of texts are: measures with their intervals above, cosines text by text below.

    Args:
        measures: by name.
        chance: of some of them, where random texts would be: a diamond.
        cosines: of each text before to each text after.
        before: texts, downward.
        after: texts, to the right.
    """
    high, low = 30 * len(measures), 22 * len(before)
    plot = make_subplots(2, 1, row_heights=[high, low], vertical_spacing=80 / (high + low + 330))
    points = list(measures.values())
    plot.add_trace(
        go.Scatter(
            x=[p.value for p in points],
            y=list(measures),
            error_x=whiskers(points, 4),
            mode="markers",
            marker=RULES[0].marker(),
            name="measured, 95 % interval",
            customdata=[p.note for p in points],
            hovertemplate="%{y}: %{customdata}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    if chance:
        plot.add_trace(
            go.Scatter(
                x=list(chance.values()),
                y=list(chance),
                mode="markers",
                marker=RULES[2].marker(symbol="diamond-open", line={"width": 2}),
                name="random texts of the pool",
                hovertemplate="%{y}: %{x:.3f} by chance<extra></extra>",
            ),
            row=1,
            col=1,
        )
    plot.add_trace(
        go.Heatmap(
            z=cosines.numpy(),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            customdata=[[f"{escaped(a)}<br>{escaped(b)}" for b in after] for a in before],
            hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    least = min(0.0, *(p.value if p.low is None else p.low for p in points))
    plot.update_xaxes(range=[least, 1.02], row=1, col=1)
    plot.update_yaxes(autorange="reversed", automargin=True, ticks="", row=1, col=1)
    for update, side in ((plot.update_yaxes, before), (plot.update_xaxes, after)):
        labels = {"tickvals": list(range(len(side))), "ticktext": [_short(text) for text in side]}
        update(automargin=True, ticks="", showgrid=False, row=2, col=1, **labels)
    plot.update_xaxes(title="texts after; texts before downward", tickangle=-50, row=2, col=1)
    plot.update_yaxes(autorange="reversed", row=2, col=1)
    colours = _colours("diverging", 1.0, "cosine")
    colours["colorbar"] |= {"len": 0.5, "y": 0.25}
    return framed(plot, height=high + low + 330, font={"color": INK}, coloraxis=colours)


def _largest(values: np.ndarray) -> float:
    """The largest size, which is the end of the colours; 1 where there is none."""
    known = np.abs(values[~np.isnan(values)])
    return (float(known.max()) if known.size else 0.0) or 1.0


def _colours(scale: Scale, top: float, unit: str) -> dict[str, Any]:
    bar = {"colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 12}}
    if scale == "diverging":
        return {"colorscale": DIVERGING, "cmin": -top, "cmax": top} | bar
    return {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": top} | bar


def _dots(x: list[str], y: list[int], name: str, *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=[layer - 0.34 for layer in y],  # under the cell's number
        mode="markers",
        marker={"symbol": "circle", "size": 6, "color": "#ffffff", "line": {"width": 1, "color": INK}},
        name=name,
        hoverinfo="skip",
        showlegend=legend,
    )


def _digits(top: float, scale: Scale) -> str:
    """Two digits of each number, for sizes of many orders; of those with a sign, two of the largest."""
    if scale == "sequential":
        return "%{z:.2~r}"
    return "%{z:." + str(max(0, 1 - int(np.floor(np.log10(top))))) + "f}"


def _short(text: str) -> str:
    return escaped(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


OPACITY, FAINT = 0.78, 0.25
"""Of the strongest colour, and of attention that is zero: the picture's dark parts stay apart from it."""


def picture(pixels: UInt8[Tensor, "h w 3"]) -> str:
    """A data URI of a picture."""
    return picture_uri(pixels.numpy())


def attention_overlay(weights: Float[Tensor, "rows columns"], top: float) -> str:
    """A data URI, one pixel a patch: dark and faint at zero, Cividis' yellow and opaque at `top`."""
    return picture_uri(tint(weights.numpy(), signed=False, top=top))


def contribution_overlay(values: Float[Tensor, "rows columns"], top: float) -> str:
    """A data URI, one pixel a patch: clear at zero, vermillion at `top`, blue at `-top`."""
    return picture_uri(tint(values.numpy(), signed=True, top=top))


def tint(values: np.ndarray, *, signed: bool, top: float) -> np.ndarray:
    """Red, green, blue and opacity, 0..255, of each number."""
    share = (values / (top or 1.0)).clip(-1 if signed else 0, 1)
    colours = _colour_image("diverging" if signed else "sequential")
    place = (share + 1) / 2 if signed else share
    opacity = OPACITY * np.abs(share) if signed else FAINT + share * (OPACITY - FAINT)
    rgb = colours[(place * (len(colours) - 1)).round().astype(int)]
    return np.concatenate([rgb, 255 * opacity[..., None]], axis=-1)


@lru_cache(maxsize=2)
def _colour_image(which: Literal["diverging", "sequential"]) -> np.ndarray:
    """The scale in 513 steps, an odd number: zero has its own."""
    scale: Any = DIVERGING if which == "diverging" else SEQUENTIAL
    found: Any = sample_colorscale(scale, np.linspace(0, 1, 513).tolist())
    return np.array(
        [unlabel_rgb(colour) if colour.startswith("rgb") else hex_to_rgb(colour) for colour in found]
    )


def picture_uri(pixels: np.ndarray, *, small: int | None = None, exact: int = 0) -> str:
    """A picture as a data URI, without loss.

    Args:
        pixels: 0..255, [h, w, channel].
        small: of pictures that are sent to somebody: longest side that is kept; larger ones are scaled down.
        exact: with `small`, longest side of those that stay without loss; larger ones are written as JPEG.
    """
    image, buffer = Image.fromarray(pixels.round().astype(np.uint8)), io.BytesIO()
    kind: dict[str, Any] = {"format": "PNG", "optimize": True}
    if small is not None and max(image.size) > exact:
        image.thumbnail((small, small))
        kind = {"format": "JPEG", "quality": 88}
    image.save(buffer, **kind)
    return f"data:image/{kind['format'].lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
