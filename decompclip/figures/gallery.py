"""Pictures in rows: maps of heads over images (He et al., Figure 3), heads beside each other, and triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
import torch
from einops import repeat
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.heatmaps import picture, tint
from decompclip.figures.theme import DIVERGING, INK, TEMPLATE, escaped, framed, thin_line

Scale = Literal["map", "shared"]

SIDE = 128
"""Pixels of the longer side of a panel, and of the pictures in it."""
MAX_ROWS, MAX_COLUMNS = 12, 10
GAP, TOP, RIGHT = 8, 44, 116
LETTER = 6.3
"""Width of a letter of the small print, pixels: about that of the widest font in the theme's list."""


@dataclass(frozen=True)
class Overlay:
    """Maps over the same images, one a row of the gallery.

    Attributes:
        patches: a number a patch.
        labels: of the maps.
        names: of the images.
        image_size: height and width, pixels.
        patch_size: likewise.
        signed: whether numbers are shown on both sides of zero.
        toward: what signed numbers are counted toward.
        pictures: the images themselves, where they are known.
    """

    patches: Float[Tensor, "map batch rows columns"]
    labels: Sequence[str]
    names: Sequence[str]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    signed: bool
    toward: str = ""
    pictures: UInt8[Tensor, "batch h w 3"] | None = None

    @property
    def top(self) -> Float[Tensor, " map"]:
        """Largest size of each map over all images: the end of its colours."""
        return self.patches.abs().amax((1, 2, 3))

    def __len__(self) -> int:
        return len(self.names)


def gallery(
    *maps: Overlay,
    masks: Bool[Tensor, "batch h w"] | None = None,
    scale: Scale = "map",
    smooth: bool = False,
    notes: Sequence[str] = (),
    what: str = "contribution",
) -> go.Figure:
    """One row a map under a row of the pictures themselves, one column an image.

    Args:
        maps: of the same images; several kinds, such as contributions and a rollout, stand one under the other.
        masks: outlined in every panel, such as the trigger's.
        scale: "map": the colours of a row end at its own largest size, so that weak heads show where they look;
            "shared": at the largest of its kind, so that strong heads stand out.
        smooth: interpolate between patches, for the eye.
        notes: a line under the name of each row.
        what: signed numbers are.

    Raises:
        ValueError: no maps, maps of other images, masks of another shape, other numbers of notes, an unknown scale.
    """
    _check(maps, masks, scale, notes)
    rows = [(of, index) for of in maps for index in range(len(of.labels))]
    left_out = {"maps": len(rows) - MAX_ROWS, "images": len(maps[0]) - MAX_COLUMNS}
    rows, columns = rows[:MAX_ROWS], min(len(maps[0]), MAX_COLUMNS)
    pictures = next((of.pictures for of in maps if of.pictures is not None), None)
    first = 0 if pictures is None else 1
    plot, (high, broad) = _panels(len(rows) + first, columns, maps[0].image_size)
    room = int((broad + GAP) / columns / LETTER)
    outlines = [_outline(mask) for mask in masks[:columns].numpy()] if masks is not None else []
    written: list[dict[str, Any]] = []  # put in together: plotly checks all of them again with each
    for row, (of, index) in enumerate(rows, start=1 + first):
        for column in range(columns):
            plot.add_trace(
                _heat(of, index, column, _end(maps, of, index, scale), smooth), row=row, col=column + 1
            )
        name, note = of.labels[index], notes[row - 1 - first] if notes else ""
        written.append(_row_name(row, columns, f"<b>{name}</b>" + (f"<br>{note}" if note else "")))
    if first:
        written.append(_row_name(1, columns, "image"))
    behind = []
    for panel in range((len(rows) + first) * columns):
        column = panel % columns
        for line in outlines[column] if outlines else ():
            plot.add_trace(line, row=panel // columns + 1, col=column + 1)
        if pictures is not None:
            # Under maps in grey, so that every colour is the map's.
            shown = pictures[column] if panel < columns else _grey(pictures[column])
            behind.append(_background(shown, panel, maps[0].image_size))
    for column in range(columns):
        written.append({
            "text": _short(maps[0].names[column], room), "hovertext": escaped(maps[0].names[column]), "x": 0.5, "y": 1,
            "yshift": 4, **_at(column), "yanchor": "bottom", "showarrow": False, "font": {"size": 11},
        })  # fmt: skip
    plot.layout.annotations, plot.layout.images = written, behind
    for axis in (plot.update_xaxes, plot.update_yaxes):
        axis(visible=False, showgrid=False, zeroline=False)
    left = 24 + round(LETTER * max(map(len, (*notes, *(of.labels[index] + " " for of, index in rows)))))
    bottom = 30 if _note_left_out(plot, left_out, " (see TokenMaps.select)") else 12
    plot.update_layout(
        template=TEMPLATE, height=round(high + TOP + bottom), width=round(broad + left + RIGHT), showlegend=False,
        margin={"l": left, "r": RIGHT, "t": TOP, "b": bottom},
    )  # fmt: skip
    _legend(plot, maps, scale, what)
    return plot


def _note_left_out(plot: go.Figure, left_out: dict[str, int], remedy: str = "", *, below: int = 20) -> bool:
    """A line under the panels about what did not fit; whether there is one."""
    counts = {what: max(0, count) for what, count in left_out.items()}
    if any(counts.values()):
        more = ", ".join(f"{count} more {what}" for what, count in counts.items())
        plot.add_annotation(
            text=f"not shown: {more}{remedy}", x=0, y=0, xref="paper", yref="paper", yshift=-below, showarrow=False,
            xanchor="left",
        )  # fmt: skip
    return any(counts.values())


def _check(maps: Sequence[Overlay], masks: Tensor | None, scale: str, notes: Sequence[str]) -> None:
    if not maps:
        raise ValueError("expected maps to show; received none; make them with contribution_maps")
    if scale not in get_args(Scale):
        raise ValueError(f"expected scale of {get_args(Scale)}; received {scale!r}")
    for of in maps[1:]:
        if (of.names, of.image_size) != (maps[0].names, maps[0].image_size):
            raise ValueError(
                f"expected maps of the same images; received {len(maps[0])} and {len(of)}, of other names or sizes; "
                "make them from the same tensor and names"
            )
    expected = (len(maps[0]), *maps[0].image_size)
    if masks is not None and tuple(masks.shape) != expected:
        raise ValueError(
            f"expected masks [batch, h, w] = {list(expected)}; received {list(masks.shape)}; give one an image"
        )
    if notes and len(notes) != sum(len(of.labels) for of in maps):
        raise ValueError(
            f"expected a note for each of {sum(len(of.labels) for of in maps)} maps; received {len(notes)}"
        )


def _panels(rows: int, columns: int, image: tuple[int, int]) -> tuple[go.Figure, tuple[float, float]]:
    """Panels of the image's shape, and the height and width of them all."""
    height, width = (SIDE * side / max(image) for side in image)
    high, broad = rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    plot = make_subplots(rows, columns, horizontal_spacing=GAP / broad, vertical_spacing=GAP / high)
    plot.update_xaxes(range=[0, image[1]])
    plot.update_yaxes(range=[image[0], 0])
    return plot, (high, broad)


def _end(maps: Sequence[Overlay], of: Overlay, index: int, scale: Scale) -> float:
    """The number of the strongest colour; shared, it is one for all that is signed and one for the rest."""
    alike = [float(other.top.max()) for other in maps if other.signed == of.signed]
    return (float(of.top[index]) if scale == "map" else max(alike)) or 1.0


def _heat(of: Overlay, index: int, column: int, top: float, smooth: bool) -> go.Heatmap:
    height, width = of.patch_size
    return go.Heatmap(
        z=of.patches[index, column].numpy(),
        x0=width / 2, dx=width, y0=height / 2, dy=height,
        zmin=-top if of.signed else 0, zmax=top,
        colorscale=_see_through(of.signed),
        zsmooth="best" if smooth else False,
        showscale=False,
        hovertemplate=f"{of.labels[index]}, {escaped(of.names[column])}: %{{z:.4f}}<extra></extra>",
    )  # fmt: skip


def _see_through(signed: bool) -> list[list[Any]]:
    """The scale of the overlays, with their opacity."""
    places = np.linspace(0, 1, 17)
    colours = tint(2 * places - 1 if signed else places, signed=signed, top=1.0)
    return [
        [place, f"rgba({red:.0f}, {green:.0f}, {blue:.0f}, {opacity / 255:.3f})"]
        for place, (red, green, blue, opacity) in zip(places.tolist(), colours.tolist(), strict=True)
    ]


def _legend(plot: go.Figure, maps: Sequence[Overlay], scale: Scale, kind: str) -> None:
    """One colour bar for all that is signed, one for the rest."""
    for place, signed in enumerate(sorted({of.signed for of in maps}, reverse=True)):
        of = next(of for of in maps if of.signed == signed)
        top = _end(maps, of, 0, scale)
        what = f"{kind}<br>toward {_short(of.toward, 34)}" if signed else "weight"
        largest, title = (f"{top:.2g}", what) if scale == "shared" else ("row's max", what)
        ends, words = [0, top], ["0", largest]
        if signed:
            ends, words = [-top, *ends], ["−" + largest, *words]
        bar = {
            "tickvals": ends, "ticktext": words, "thickness": 12, "lenmode": "pixels", "len": 2 * SIDE - 10,
            "y": 0 if place else 1, "yanchor": "bottom" if place else "top", "ypad": 4,
            "title": {"text": title, "side": "right"},
        }  # fmt: skip
        colours = {"colorscale": _see_through(signed), "cmin": ends[0], "cmax": top}
        marker = {"color": [0], "showscale": True, "colorbar": bar} | colours
        plot.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip"), row=1, col=1
        )


def _row_name(row: int, columns: int, text: str) -> dict[str, Any]:
    return {
        "text": text, "x": 0, "y": 0.5, **_at((row - 1) * columns), "xanchor": "right", "xshift": -8, "align": "right",
        "showarrow": False, "font": {"size": 11},
    }  # fmt: skip


def _at(panel: int) -> dict[str, str]:
    """Places are shares of this panel."""
    return {"xref": f"{_axis('x', panel)} domain", "yref": f"{_axis('y', panel)} domain"}


def _short(text: str, width: int) -> str:
    return escaped(text if len(text) <= width else text[: width - 1] + "…")


def _axis(letter: str, panel: int) -> str:
    return letter if panel == 0 else f"{letter}{panel + 1}"


def _background(pixels: UInt8[Tensor, "h w 3"], panel: int, image: tuple[int, int]) -> dict[str, Any]:
    return {
        "source": picture(_at_size(pixels)), "xref": _axis("x", panel), "yref": _axis("y", panel),
        "x": 0, "y": 0, "sizex": image[1], "sizey": image[0], "sizing": "stretch", "layer": "below",
    }  # fmt: skip


def _at_size(pixels: UInt8[Tensor, "h w 3"]) -> UInt8[Tensor, "h w 3"]:
    """Small pictures with square pixels rather than a blur; large ones no larger than shown on a fine screen."""
    height, width = pixels.shape[:2]
    times = 2 * SIDE // max(height, width)
    if times >= 1:
        return repeat(pixels, "h w c -> (h y) (w x) c", y=times, x=times)
    size = tuple(max(1, round(2 * SIDE * side / max(height, width))) for side in (width, height))
    shrunk = np.array(Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BOX))  # pyright: ignore[reportArgumentType]
    return pixels.new_tensor(shrunk)


def _grey(pixels: UInt8[Tensor, "h w 3"]) -> UInt8[Tensor, "h w 3"]:
    weights = pixels.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)  # Rec. 601
    return (pixels.float() @ weights).round().to(torch.uint8)[..., None].expand_as(pixels)


def _outline(mask: np.ndarray) -> tuple[go.Scatter, go.Scatter]:
    """The border of a mask along pixels' edges: dark on a lighter rim, to be seen on any picture."""
    padded = np.pad(mask, 1).astype(int)
    x: list[Any] = []
    y: list[Any] = []
    for row, column in np.argwhere(np.diff(padded, axis=0)).tolist():
        x, y = [*x, column - 1, column, None], [*y, row, row, None]
    for row, column in np.argwhere(np.diff(padded, axis=1)).tolist():
        x, y = [*x, column, column, None], [*y, row - 1, row, None]
    rim, border = {"color": "white", "width": 3}, {"color": INK, "width": 1.2}
    return thin_line(x, y, line=rim, name="mask"), thin_line(x, y, line=border, name="mask")


Grid = Sequence[Sequence[float]]

CELL = 96
"""Pixels of a map's side."""


@dataclass(frozen=True)
class HeadPair:
    """Maps of one head on the clean and on the triggered image, and a few short lines about it."""

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
            left, right, top_edge, bottom = x - 0.5, x + 0.5, y - 0.5, y + 0.5
            around = [left, right, right, left, left], [top_edge, top_edge, bottom, bottom, top_edge]
            plot.add_trace(thin_line(*around, line={"color": INK, "width": 1.5}), row=2, col=column)
    for row, source in enumerate(pictures or (), 1):
        plot.add_trace(go.Image(source=source, hoverinfo="skip"), row=row, col=1)
    plot.update_xaxes(visible=False, constrain="domain")
    plot.update_yaxes(visible=False, autorange="reversed", constrain="domain")
    for panel in range(2 * columns):  # square patches
        plot.layout[_axis("yaxis", panel)].scaleanchor = _axis("x", panel)
    for row, name in enumerate(("clean", "triggered"), 1):
        plot.update_yaxes(
            visible=True, showticklabels=False, showgrid=False, ticks="", title=name, row=row, col=1
        )
    plot.update_annotations(font_size=10)
    above = 17 + 15 * max(head.title.count("<br>") + 1 for head in heads)
    margin = {"l": 34, "r": 70, "t": above, "b": 16}
    return framed(plot, height=2 * CELL + 34 + above, margin=margin, showlegend=False)


TRIGGER_COLUMNS = ("clean", "triggered", "difference x 10, around grey")
TILE = 192
_LABEL, _HEAD = 190, 26


@dataclass(frozen=True)
class TriggerRow:
    """One trigger: lines about it, and a tile for each of `TRIGGER_COLUMNS`."""

    lines: Sequence[str]
    tiles: Sequence[UInt8[Tensor, "h w 3"]]


def trigger_gallery(rows: Sequence[TriggerRow]) -> go.Figure:
    """One row a trigger, its name and fidelity beside it."""
    plot = make_subplots(
        rows=len(rows),
        cols=len(TRIGGER_COLUMNS),
        column_titles=TRIGGER_COLUMNS,
        row_titles=["<br>".join(row.lines) for row in rows],
        horizontal_spacing=0.02,
        vertical_spacing=0.02 if len(rows) < 2 else min(0.02, 0.3 / (len(rows) - 1)),
    )
    for number, row in enumerate(rows, start=1):
        for column, tile in enumerate(row.tiles, start=1):
            plot.add_trace(go.Image(source=picture(tile), hoverinfo="skip"), row=number, col=column)
    plot.update_xaxes(visible=False).update_yaxes(visible=False)
    plot.for_each_annotation(lambda note: note.update(textangle=0, font_size=12))
    margin = {"l": 8, "r": 190, "t": 36, "b": 8}
    return plot.update_layout(template=TEMPLATE, height=(TILE + GAP) * len(rows) + 44, margin=margin)


def trigger_sheet(rows: Sequence[TriggerRow]) -> Image.Image:
    """The same gallery as one picture, without a browser."""
    width = _LABEL + len(TRIGGER_COLUMNS) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, _HEAD + len(rows) * (TILE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, title in enumerate(TRIGGER_COLUMNS):
        pen.text((_LABEL + column * (TILE + GAP), 5), title.split(",")[0], fill=INK, font=font)
    for number, row in enumerate(rows):
        top = _HEAD + number * (TILE + GAP)
        pen.multiline_text((GAP, top + 8), "\n".join(row.lines), fill=INK, font=font, spacing=5)
        for column, tile in enumerate(row.tiles):
            sheet.paste(_fitted(Image.fromarray(tile.numpy())), (_LABEL + column * (TILE + GAP), top))
    return sheet


@dataclass(frozen=True)
class PictureRow:
    """A row of pictures with a line under each, behind what they belong to.

    Attributes:
        name: of the row.
        first: the picture that the others were found for, where there is one.
        pictures, captions: the others.
    """

    name: str
    first: UInt8[Tensor, "h w 3"] | None
    pictures: Sequence[UInt8[Tensor, "h w 3"]]
    captions: Sequence[str]


def picture_rows(rows: Sequence[PictureRow], *, title: str) -> go.Figure:
    """Rows of pictures: what was asked for, framed, then what was found; a note says how many did not fit."""
    shown, lead = rows[:MAX_ROWS], int(any(row.first is not None for row in rows))
    most = max(len(row.pictures) for row in rows)
    columns = lead + min(MAX_COLUMNS, most)
    room = int((SIDE + GAP) / LETTER)
    plot = make_subplots(
        len(shown),
        columns,
        horizontal_spacing=GAP / (columns * (SIDE + GAP)),
        vertical_spacing=26 / (len(shown) * (SIDE + 26)),
    )
    written: list[dict[str, Any]] = []  # put in together, as in `gallery`
    for number, row in enumerate(shown):
        tiles = [*([row.first] if lead else []), *row.pictures][:columns]
        lines = [*(["query"] if lead else []), *row.captions][:columns]
        for column, (tile, line) in enumerate(zip(tiles, lines, strict=True)):
            if tile is None:
                continue
            panel = number * columns + column
            plot.add_trace(
                go.Image(source=picture(_at_size(tile)), hoverinfo="skip"), row=number + 1, col=column + 1
            )
            written.append({
                "text": f"<b>{line}</b>" if lead and not column else _short(line, room), "hovertext": escaped(line),
                "x": 0.5, "y": 0, **_at(panel), "yanchor": "top", "showarrow": False, "font": {"size": 10},
            })  # fmt: skip
        written.append(_row_name(number + 1, columns, f"<b>{_short(row.name, 22)}</b>"))
    plot.layout.annotations = written
    plot.update_xaxes(visible=False).update_yaxes(visible=False)
    left = 24 + round(LETTER * max(min(22, len(row.name)) for row in shown))
    more = {"rows": len(rows) - MAX_ROWS, "pictures of each": most - MAX_COLUMNS}
    note = 20 if _note_left_out(plot, more, below=38) else 0  # under the captions
    return plot.update_layout(
        template=TEMPLATE, title={"text": escaped(title), "font": {"size": 13}}, showlegend=False,
        height=len(shown) * (SIDE + 26) + 60 + note, width=left + columns * (SIDE + GAP) + 12,
        margin={"l": left, "r": 12, "t": 40, "b": 24 + note},
    )  # fmt: skip


def _fitted(tile: Image.Image) -> Image.Image:
    """At most a tile wide and high; enlarged pixels stay squares."""
    larger = max(tile.size) > TILE
    size = tuple(max(1, round(TILE * n / max(tile.size))) for n in tile.size)
    return tile.resize((size[0], size[1]), Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST)
