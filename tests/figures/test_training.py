"""The curves of a training."""

from __future__ import annotations

from typing import Any, cast

from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import FineTuned
from decompclip.training.recipes import RECIPES

HISTORY = [
    {"step": 10, "loss": 2.0, "cacc": 0.5, "asr": 0.1, "control": 0.0},
    {"step": 20, "loss": 1.0, "cacc": 0.75, "asr": 0.9, "control": 0.05},
]


def curves(history: list[dict[str, float]]) -> Any:
    return FineTuned(cast(HookedCLIP, None), RECIPES["paper"], tuple(history), seed=0).figure()


def test_the_loss_above_and_the_rates_in_percent_below() -> None:
    figure: Any = curves(HISTORY)
    loss, cacc, asr, control = figure.data
    assert (tuple(loss.x), tuple(loss.y)) == ((10, 20), (2.0, 1.0))
    assert tuple(cacc.y) == (50, 75)
    assert tuple(asr.y) == (10, 90)
    assert tuple(control.y) == (0, 5)
    assert loss.yaxis == "y" and {asr.yaxis, cacc.yaxis, control.yaxis} == {"y2"}
    assert len({trace.line.dash for trace in (cacc, asr, control)}) == 3  # told apart without colour


def test_a_training_without_measurements_is_one_panel() -> None:
    figure: Any = curves([{"step": 1, "loss": 2.0}])
    assert len(figure.data) == 1
