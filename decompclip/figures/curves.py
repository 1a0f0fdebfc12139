"""Mean-ablation layer by layer: attack success, its control and clean accuracy (He et al., Figures 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.evaluation.intervals import Rate
from decompclip.figures.rates import short
from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS, TEMPLATE, Style, band

if TYPE_CHECKING:
    from decompclip.audit.result import Ablations
    from decompclip.audit.scoring import Setting

KINDS = {"heads": "heads", "mlps": "MLPs"}
AXES = {"forward": "layers 0 to x", "backward": "layers x to {last}", "separate": "layer x alone"}


def ablation_curves(ablations: Ablations, before: Setting, *, wide: bool = True) -> go.Figure:
    """One panel for each kind of component and scheme; thin lines are the model as it is.

    Args:
        wide: two rows of three panels, for a whole page's width; else three rows of two.
    """
    n_layers = len(ablations.sweeps["heads"]["forward"])
    panels = [(k, s) for k in KINDS for s in AXES] if wide else [(k, s) for s in AXES for k in KINDS]
    rows, columns = (2, 3) if wide else (3, 2)
    titles = [f"{KINDS[k]}, {AXES[s].format(last=n_layers - 1)}" for k, s in panels]
    plot = make_subplots(
        rows,
        columns,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.17 if wide else 0.12,
    )
    for place, (kind, scheme) in enumerate(panels):
        for trace in _panel(ablations.sweeps[kind][scheme], before, legend=place == 0):
            plot.add_trace(trace, row=place // columns + 1, col=place % columns + 1)
    rate_axes(plot, n_layers, rows, columns)
    plot.update_layout(
        template=TEMPLATE,
        height=500 if wide else 660,
        autosize=True,
        margin={"l": 56, "r": 12, "t": 66, "b": 48},
        legend={"y": 1.1 if wide else 1.06},
    )
    return plot


def _panel(settings: Sequence[Setting], before: Setting, *, legend: bool) -> list[go.Scatter]:
    traces = []
    for style, values, start in (
        (ACCURACY, [setting.report.cacc for setting in settings], before.report.cacc),
        (CONTROL, [setting.control for setting in settings], before.control),
        (SUCCESS, [setting.success for setting in settings], before.success),
    ):
        known = [(layer, rate) for layer, rate in enumerate(values) if rate is not None and rate.total]
        if known and start is not None:
            traces += rate_series(style, known, start, len(settings), legend=legend)
    return traces


def rate_axes(plot: go.Figure, n_layers: int, rows: int, columns: int) -> None:
    """Layers to the right and percents upward, titled at the edges of the panels alone."""
    plot.update_xaxes(dtick=1 if n_layers <= 12 else 2 if n_layers <= 24 else 4, range=[-0.3, n_layers - 0.7])
    plot.update_yaxes(range=[-3, 103], dtick=25)
    for column in range(1, columns + 1):
        plot.update_xaxes(title="x, counted from 0", row=rows, col=column)
    for row in range(1, rows + 1):
        plot.update_yaxes(title="images, %", row=row, col=1)
    plot.update_annotations(font_size=12)


def rate_series(
    style: Style, known: Sequence[tuple[int, Rate]], start: Rate, n_layers: int, *, legend: bool
) -> list[go.Scatter]:
    """A rate layer by layer with its band, and a line where it started."""
    layers = [layer for layer, _ in known]
    ends = ([100 * rate.low for _, rate in known], [100 * rate.high for _, rate in known])
    return [
        band(layers, *ends, style, legendgroup=style.label),
        go.Scatter(
            x=[-0.3, n_layers - 0.7],
            y=[100 * start.value] * 2,
            mode="lines",
            line={"color": style.colour, "width": 1, "dash": style.dash},
            opacity=0.55,
            hoverinfo="skip",
            showlegend=False,
            legendgroup=style.label,
        ),
        go.Scatter(
            x=layers,
            y=[100 * rate.value for _, rate in known],
            mode="lines+markers",
            line=style.line(),
            marker=style.marker(size=6),
            name=short(style),
            legendgroup=style.label,
            showlegend=legend,
            customdata=[str(rate) for _, rate in known],
            hovertemplate="x = %{x}: %{customdata}<extra>" + short(style) + "</extra>",
        ),
    ]
