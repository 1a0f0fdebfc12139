"""Bars: one row a name with what it amounts to, and histograms of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.theme import INK, RULES, bars as bar_look, escaped, figure, framed, whisker

CLEAN, SUSPECT = "#0072B2", "#D55E00"


def bar_rows(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    unit: str,
    notes: Sequence[str] | None = None,
    errors: Sequence[float] | None = None,
    bars: str = "",
    texts: Sequence[str] | None = None,
    largest: Mapping[str, Sequence[float]] | None = None,
    colours: Sequence[str] | None = None,
    filled: int = 1,
    percent: bool = False,
    ends: tuple[float, float] | None = None,
    row_height: int = 24,
    title: str = "",
) -> go.Figure:
    """Rows downward, bars to the right.

    Args:
        rows: their names, shown as they are.
        series: by name, a length for each row; None where a series has no bar.
        unit: title of the axis.
        notes: more of each row, shown on hovering.
        errors: half-widths of the rows' intervals.
        bars: what the intervals are, for the legend; needed with `errors`.
        texts: written behind each bar.
        largest: by name, a marker in each row beside its bars.
        colours: of the series; by default the theme's.
        filled: how many of the first series are filled; the others are drawn in outline.
        percent: whether lengths are shares.
        ends: of the axis; by default those of the values.
        row_height: pixels.
        title: above the bars.

    Raises:
        ValueError: intervals that nothing explains.
    """
    names = [escaped(name) for name in rows]
    beside = len(series) > 1 and all(None not in values for values in series.values())
    plot = figure(
        height=max(200, row_height * len(rows) + 90 + 20 * bool(title)),
        barmode="group" if beside else "overlay",
        showlegend=len(series) + len(largest or {}) > 1 or errors is not None,
        margin={"l": 10, "r": 16, "t": 30 + 30 * bool(title), "b": 46},
    )
    if title:
        plot.update_layout(title={"text": escaped(title), "x": 0})
    form = ".1%" if percent else ".4f"
    for number, (name, values) in enumerate(series.items()):
        shown = [place for place, value in enumerate(values) if value is not None]
        if not shown and len(series) > 1:
            continue
        colour = colours[number] if colours else RULES[number].colour
        plot.add_trace(
            go.Bar(
                x=[values[place] for place in shown],
                y=shown,
                orientation="h",
                name=name,
                marker=bar_look(colour, filled=number < filled),
                error_x=None
                if errors is None
                else {"array": [errors[p] for p in shown], "thickness": 1.2, "width": 3, "color": "#7a8690"},
                text=None if texts is None else [texts[place] for place in shown],
                textposition="outside",
                cliponaxis=False,
                customdata=[[names[p], escaped(notes[p]) if notes else ""] for p in shown],
                hovertemplate=f"%{{customdata[0]}}: %{{x:{form}}} %{{customdata[1]}}<extra>{name if len(series) > 1 else ''}</extra>",
            )
        )
    if errors is not None:
        plot.add_trace(whisker(bars))
    for style, (name, values) in zip(RULES[1:], (largest or {}).items(), strict=False):
        plot.add_trace(
            go.Scatter(
                x=list(values),
                y=list(range(len(rows))),
                mode="markers",
                marker=style.marker(size=6),
                name=name,
                customdata=names,
                hovertemplate=f"%{{customdata}}: %{{x:{form}}}<extra>{name}</extra>",
            )
        )
    plot.update_xaxes(title=unit, zeroline=True, tickformat=".0%" if percent else None, range=ends)
    plot.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=names,
        range=[len(rows) - 0.5, -0.5],
        automargin=True,
        showgrid=False,
        ticks="",
    )
    return plot


def class_scores(names: Sequence[str], scores: Sequence[float]) -> go.Figure:
    """A bar a class: how much two checkpoints differ along it, over the median class."""
    unit = "change along the class, 1 at the median class"
    return bar_rows(names, {"score": scores}, unit=unit, texts=[f"{score:.2f}" for score in scores])


@dataclass(frozen=True)
class Histogram:
    """Shares of clean and of suspect images by score.

    Attributes:
        title: above it.
        places: the middle of each bin.
        clean: images in each bin.
        suspect: likewise.
        line: the score above which an image is flagged.
        line_text: what the line says.
    """

    title: str
    places: Sequence[float]
    clean: Sequence[int]
    suspect: Sequence[int]
    line: float
    line_text: str = ""


def histograms(panels: Sequence[Histogram], *, x: str, overlay: bool = False, height: int = 190) -> go.Figure:
    """Shares of images a bin, clean ones filled and suspect ones in outline, with the threshold as a dotted line.

    Args:
        panels: row by row, two in a line.
        x: title of the axis.
        overlay: bars of both sets in one place, for many bins; else side by side.
        height: pixels of a line of panels.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=[panel.title for panel in panels],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.14 if rows > 1 else 0,
    )
    for place, panel in enumerate(panels):
        row, column = place // columns + 1, place % columns + 1
        for label, counts, colour, filled in (
            ("clean", panel.clean, CLEAN, True),
            ("suspect", panel.suspect, SUSPECT, False),
        ):
            total = sum(counts) or 1
            plot.add_trace(
                go.Bar(
                    x=list(panel.places),
                    y=[100 * count / total for count in counts],
                    width=panel.places[1] - panel.places[0] if overlay and len(panel.places) > 1 else None,
                    name=label,
                    marker=bar_look(colour, filled=filled),
                    legendgroup=label,
                    showlegend=place == 0,
                    hovertemplate="%{x:.3g}: %{y:.1f} % of " + label + " images<extra></extra>",
                ),
                row=row,
                col=column,
            )
        said: dict[str, Any] = {}  # plotly writes "new text" where any of these is there, None too
        if panel.line_text:
            said["annotation"] = {"text": panel.line_text, "xanchor": "left", "font": {"size": 11}}
            said["annotation_position"] = "top right"
        plot.add_vline(
            panel.line,
            row=row,  # pyright: ignore[reportArgumentType]
            col=column,  # pyright: ignore[reportArgumentType]
            line={"dash": "dot", "width": 1.5, "color": INK},  # pyright: ignore[reportArgumentType]
            **said,
        )
    if not overlay:
        plot.update_xaxes(dtick=1 if len(panels[0].places) <= 13 else 2)
        plot.update_yaxes(range=[0, 103])
    plot.update_xaxes(title=x, row=rows)
    plot.update_yaxes(title="images, %", col=1)
    plot.update_annotations(font_size=12)
    framed(
        plot,
        height=height * rows,
        barmode="overlay" if overlay else "group",
        bargap=0 if overlay else 0.25,
        margin={"l": 56, "r": 12, "t": 62 if any(p.title for p in panels) else 40, "b": 48},
        legend={"y": 1.1} if rows > 1 else {"x": 1, "xanchor": "right", "y": 1.02},
    )
    return plot
