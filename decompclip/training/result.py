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
        from decompclip.figures.training import training_curves

        return training_curves(self.history)

    def __repr__(self) -> str:
        last = self.history[-1]
        rates = "".join(f", {key} {last[key]:.3f}" for key in ("cacc", "asr", "control") if key in last)
        return f"FineTuned({self.model.name!r}, {int(last['step'])} steps, loss {last['loss']:.3f}{rates})"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)
