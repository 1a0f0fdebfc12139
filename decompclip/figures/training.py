"""How a training went: the loss, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS, TEMPLATE, Style

LOSS = Style("Loss (mean since the point before)", "#333d47", "solid", "circle")
RATES = {"cacc": ACCURACY, "asr": SUCCESS, "control": CONTROL}


def training_curves(history: Sequence[Mapping[str, float]]) -> go.Figure:
    """The loss above; below, where they were measured, clean accuracy, attack success and its control.

    Raises:
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("expected a history with entries; received none; log at least once in training")
    rates = {name: style for name, style in RATES.items() if any(name in entry for entry in history)}
    rows = 2 if rates else 1
    plot = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.08)
    plot.add_trace(_curve(history, "loss", LOSS), row=1, col=1)
    plot.update_yaxes(title="loss", row=1, col=1)
    for name, style in rates.items():
        plot.add_trace(_curve(history, name, style, factor=100), row=2, col=1)
    if rates:
        plot.update_yaxes(title="images, %", range=[-3, 103], dtick=25, row=2, col=1)
    plot.update_xaxes(title="steps", row=rows, col=1)
    plot.update_layout(
        template=TEMPLATE, height=240 * rows + 80, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return plot


def _curve(
    history: Sequence[Mapping[str, float]], name: str, style: Style, *, factor: float = 1
) -> go.Scatter:
    entries = [entry for entry in history if name in entry]
    return go.Scatter(
        x=[entry["step"] for entry in entries],
        y=[factor * entry[name] for entry in entries],
        name=style.label,
        mode="lines+markers",
        line=style.line(),
        marker=style.marker(),
    )
