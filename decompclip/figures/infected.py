"""The components that pull suspect images toward the target, the strongest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.figures.theme import bars, figure

if TYPE_CHECKING:
    from decompclip.audit.infected import InfectedPart

ROW, FRAME, SHOWN = 24, 76, 16


def pulls(parts: Sequence[InfectedPart], names: Sequence[str]) -> go.Figure:
    """One bar a component with its simultaneous 95 % interval; filled where it is infected."""
    parts, names = parts[:SHOWN], names[:SHOWN]
    plot = figure(height=FRAME + ROW * len(parts), margin={"l": 10, "r": 12, "t": 30, "b": 46})
    for label, wanted, colour in (
        ("infected", True, "#D55E00"),
        ("within chance, or less than an equal share", False, "#7a8690"),
    ):
        rows = [i for i, part in enumerate(parts) if part.infected is wanted]
        if not rows:
            continue
        plot.add_trace(
            go.Bar(
                x=[parts[i].push for i in rows],
                y=rows,
                orientation="h",
                name=label,
                error_x={
                    "array": [parts[i].error for i in rows],
                    "thickness": 1.2,
                    "width": 3,
                    "color": "#7a8690",
                },
                marker=bars(colour, filled=wanted),
                customdata=[[names[i], 100 * parts[i].share] for i in rows],
                hovertemplate="%{customdata[0]}: %{x:.4f}, %{customdata[1]:.1f} % of all that pulls<extra></extra>",
            )
        )
    plot.update_xaxes(title="pull toward the target, share of the feature's norm", zeroline=True)
    plot.update_yaxes(
        tickvals=list(range(len(parts))),
        ticktext=list(names),
        range=[len(parts) - 0.5, -0.5],
        automargin=True,
        showgrid=False,
        ticks="",
    )
    return plot
