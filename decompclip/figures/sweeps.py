"""Sweeps and greedy sets: shares of the images under ablation of ever more, or ever other, components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Int
from plotly.subplots import make_subplots
from torch import Tensor

from decompclip.evaluation.intervals import Rate
from decompclip.figures.curves import AXES, KINDS, rate_axes, rate_series
from decompclip.figures.theme import ACCURACY, DIVERGING, SEQUENTIAL, SUCCESS, TEMPLATE, Style, figure

if TYPE_CHECKING:
    from decompclip.operators.greedy import GreedySet
    from decompclip.operators.sweep_results import HeadSweep, SweepTable

LABELS = Style("Taken for their own class", ACCURACY.colour, ACCURACY.dash, ACCURACY.symbol)
TARGET = Style("Taken for the target", SUCCESS.colour, SUCCESS.dash, SUCCESS.symbol)
CHANGED = Style("Taken for another class than before", "#0072B2", "dash", "square")


def sweep_curves(
    table: SweepTable, labels: Int[Tensor, " batch"] | None = None, target: int | None = None
) -> go.Figure:
    """One panel for each sweep, with 95 % Wilson intervals; thin lines are the model as it is.

    Args:
        labels: the images' classes; without them (and without a target) the share of changed answers is drawn.
        target: a class whose share is drawn.
    """
    panels = list(table.sweeps)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    last = max(len(sweep) for sweep in table.sweeps.values()) - 1
    titles = [f"{KINDS[kind]}, {AXES[scheme].format(last=last)}" for kind, scheme in panels]
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.17,
    )
    for place, key in enumerate(panels):
        sweep = table[key]
        for style, before in _series(table, table.before, labels, target).items():
            rates = [_series(table, sweep[layer], labels, target)[style] for layer in range(len(sweep))]
            for trace in rate_series(style, list(enumerate(rates)), before, len(rates), legend=place == 0):
                plot.add_trace(trace, row=place // columns + 1, col=place % columns + 1)
    rate_axes(plot, last + 1, rows, columns)
    plot.update_layout(
        template=TEMPLATE,
        height=60 + 220 * rows,
        autosize=True,
        margin={"l": 56, "r": 12, "t": 66, "b": 48},
        legend={"y": 1.1 if rows > 1 else 1.2},
    )
    return plot


def head_map(
    sweep: HeadSweep, labels: Int[Tensor, " batch"] | None = None, target: int | None = None
) -> go.Figure:
    """Heads by layer: the share of images that ablating the head changes, or by how much it lowers another share."""
    frame = sweep.to_frame(labels, target)
    column = "accuracy" if labels is not None else "changed" if target is None else "target"
    values = torch.tensor(frame[column].to_numpy()).view(sweep.predictions.shape[:2])
    name, falls = CHANGED, column != "changed"
    if falls:
        right = sweep.before == (target if labels is None else labels.to(sweep.before))
        values = float(right.double().mean()) - values
        name = LABELS if column == "accuracy" else TARGET
    unit = f"{'fall of: t' if falls else 'T'}{name.label[1:]}, %"
    top = 100 * float(values.abs().max()) or 1.0
    plot = figure(height=max(260, 34 * len(values) + 110))
    plot.add_trace(
        go.Heatmap(
            z=100 * values.numpy(),
            x=[str(head) for head in range(values.shape[1])],
            y=list(range(len(values))),
            colorscale=DIVERGING if falls else SEQUENTIAL,
            zmin=-top if falls else 0,
            zmax=top,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
            xgap=2,
            ygap=2,
            hovertemplate="layer %{y}, head %{x}: %{z:.1f} %<extra></extra>",
        )
    )
    plot.update_xaxes(title="head", type="category", ticks="", showgrid=False)
    plot.update_yaxes(title="layer", dtick=1, ticks="", showgrid=False, zeroline=False)
    return plot


def greedy_curve(found: GreedySet) -> go.Figure:
    """The share of images with their answer after each step; the components stand along the axis."""
    rates = [Rate(hits, found.total) for hits in found.hits]
    plot = figure(height=320)
    for trace in rate_series(LABELS, list(enumerate(rates)), rates[0], len(rates), legend=False):
        plot.add_trace(trace)
    names = ["none", *(f"+ {step!r}" for step in found.steps)]
    plot.update_xaxes(tickvals=list(range(len(names))), ticktext=names, tickangle=-30, automargin=True)
    plot.update_yaxes(range=[-3, 103], dtick=25, title="images with their answer, %")
    return plot


def _series(
    table: SweepTable, predictions: Tensor, labels: Tensor | None, target: int | None
) -> Mapping[Style, Rate]:
    found = {}
    if labels is not None:
        found[LABELS] = Rate.of(predictions == labels)
    if target is not None:
        found[TARGET] = Rate.of(predictions == target)
    return found or {CHANGED: Rate.of(predictions != table.before)}
