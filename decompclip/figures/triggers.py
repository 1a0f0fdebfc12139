"""The gallery of triggers: clean, triggered, and the difference ten times as strong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.figures.maps import picture
from decompclip.figures.theme import INK, TEMPLATE
from decompclip.files import atomic_write

if TYPE_CHECKING:
    from decompclip.attacks.preview import Preview

COLUMNS = ("clean", "triggered", "difference x 10, around grey")
TILE = 192
_GAP = 8
_LABEL = 190
_HEAD = 26


def trigger_gallery(previews: Sequence[Preview], *, image: int = 0) -> go.Figure:
    """One row a trigger, its name and fidelity beside it.

    Args:
        image: which of each preview's images to show.

    Raises:
        ValueError: no previews, or an image that one of them lacks.
    """
    rows = [_tiles(preview, image) for preview in _checked(previews, image)]
    figure = make_subplots(
        rows=len(rows),
        cols=len(COLUMNS),
        column_titles=COLUMNS,
        row_titles=["<br>".join(_label(preview)) for preview in previews],
        horizontal_spacing=0.02,
        vertical_spacing=0.02 if len(rows) < 2 else min(0.02, 0.3 / (len(rows) - 1)),
    )
    for row, tiles in enumerate(rows, start=1):
        for column, tile in enumerate(tiles, start=1):
            figure.add_trace(go.Image(source=picture(tile), hoverinfo="skip"), row=row, col=column)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.for_each_annotation(lambda note: note.update(textangle=0, font_size=12))
    margin = {"l": 8, "r": 190, "t": 36, "b": 8}
    return figure.update_layout(template=TEMPLATE, height=(TILE + _GAP) * len(rows) + 44, margin=margin)


def save_gallery(previews: Sequence[Preview], path: str | Path, *, image: int = 0) -> Path:
    """The same gallery as a PNG file, without a browser; written to a temporary name and renamed.

    Raises:
        ValueError: as `trigger_gallery`.
    """
    rows = [_tiles(preview, image) for preview in _checked(previews, image)]
    width = _LABEL + len(COLUMNS) * (TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEAD + len(rows) * (TILE + _GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, title in enumerate(COLUMNS):
        pen.text((_LABEL + column * (TILE + _GAP), 5), title.split(",")[0], fill=INK, font=font)
    for row, (preview, tiles) in enumerate(zip(previews, rows, strict=True)):
        top = _HEAD + row * (TILE + _GAP)
        pen.multiline_text((_GAP, top + 8), "\n".join(_label(preview)), fill=INK, font=font, spacing=5)
        for column, tile in enumerate(tiles):
            sheet.paste(_fitted(Image.fromarray(tile.numpy())), (_LABEL + column * (TILE + _GAP), top))
    path = Path(path)
    with atomic_write(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)
    return path


def _checked(previews: Sequence[Preview], image: int) -> Sequence[Preview]:
    if not previews:
        raise ValueError("expected at least one preview; received none")
    fewest = min(len(preview.clean) for preview in previews)
    if not 0 <= image < fewest:
        raise ValueError(f"expected an image among the first {fewest} of each preview; received {image}")
    return previews


def _label(preview: Preview) -> list[str]:
    quality = preview.quality.summary()
    return [
        preview.card["name"],
        f"{preview.card['extent']}, {preview.card['structure']}",
        f"PSNR {quality['psnr']:.1f} dB",
        f"SSIM {quality['ssim']:.3f}",
        f"{100 * quality['changed']:.1f} % of pixels",
    ]


def _tiles(preview: Preview, image: int) -> list[UInt8[Tensor, "h w 3"]]:
    return [_bytes(x[image]) for x in (preview.clean, preview.triggered, preview.difference())]


def _fitted(tile: Image.Image) -> Image.Image:
    """At most a tile wide and high; enlarged pixels stay squares."""
    larger = max(tile.size) > TILE
    size = tuple(max(1, round(TILE * n / max(tile.size))) for n in tile.size)
    return tile.resize((size[0], size[1]), Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST)


def _bytes(pixels: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "h w 3"]:
    return (pixels.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
