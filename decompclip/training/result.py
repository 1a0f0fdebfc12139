"""What a fine-tuning leaves: the model, and how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from decompclip.models.clip import HookedCLIP
from decompclip.training.recipes import FineTuning

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model and its history.

    Attributes:
        history: one entry for each logged step: `step`, `samples`, `loss` (mean since the entry before), `lr`,
            `seconds`, and with a monitor `cacc`, `asr`, `control`.
    """

    model: HookedCLIP
    recipe: FineTuning
    history: tuple[dict[str, float], ...]
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """The history, one row an entry."""
        import pandas as pd

        return pd.DataFrame(list(self.history))

    def figure(self) -> go.Figure:
        """The loss above, the measured rates below."""
        from decompclip.figures.curves import Curve, LinePanel, line_panels
        from decompclip.figures.points import PERCENT
        from decompclip.figures.theme import ACCURACY, CONTROL, STYLES, SUCCESS

        def curve(name: str, factor: float = 1) -> Curve:
            entries = [entry for entry in self.history if name in entry]
            return Curve([e["step"] for e in entries], [factor * e[name] for e in entries])

        loss = "Loss"
        panels = [LinePanel("", "steps", "loss", {loss: curve("loss")})]
        rates = {"cacc": ACCURACY, "asr": SUCCESS, "control": CONTROL}
        measured = {name: style for name, style in rates.items() if any(name in e for e in self.history)}
        if measured:
            curves = {style.short: curve(name, 100) for name, style in measured.items()}
            panels.append(LinePanel("", "steps", "images, %", curves, ends=PERCENT))
        styles = {loss: STYLES[-1]} | {style.short: style for style in measured.values()}
        return line_panels(panels, columns=1, shared_y=False, styles=styles)

    def __repr__(self) -> str:
        last = self.history[-1]
        rates = "".join(f", {key} {last[key]:.3f}" for key in ("cacc", "asr", "control") if key in last)
        return f"FineTuned({self.model.name!r}, {int(last['step'])} steps, loss {last['loss']:.3f}{rates})"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)
