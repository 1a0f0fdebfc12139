from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from decompclip.audit.checks import Scorer, Setting
from decompclip.audit.result import Ablations, Detection
from decompclip.figures.heatmaps import attention_overlay, component_map, contribution_overlay, picture
from decompclip.figures.theme import ACCURACY, CONTROL, RULES, SUCCESS
from decompclip.intervals import Rate
from decompclip.report.view import ablation_curves, flag_counts, rates, roc

LAYERS = 4


def traces(plot: go.Figure) -> Sequence[Any]:
    return plot.data  # type: ignore[return-value] - plotly's own annotation is of the figure


def axis(plot: go.Figure) -> Any:
    return plot.layout.coloraxis  # type: ignore[union-attr]


def setting(share: float, *, labelled: bool = True) -> Setting:
    labels = torch.arange(100) % 2
    answers = torch.where(torch.arange(100) < round(100 * share), torch.full_like(labels, 2), labels)
    known = labels if labelled else None
    return Scorer(known, known, 2, 3)(f"share {share}", labels, answers)


@pytest.fixture
def ablations() -> Ablations:
    sweep = tuple(setting(1 - layer / LAYERS) for layer in range(LAYERS))
    schemes: dict[str, tuple[Setting, ...]] = {name: sweep for name in ("forward", "backward", "separate")}
    return Ablations({}, {"heads": schemes, "mlps": schemes})


@pytest.mark.parametrize("wide", [True, False])
def test_curves_show_what_was_measured_with_its_bands(ablations: Ablations, wide: bool) -> None:
    plot = ablation_curves(ablations, setting(1.0), wide=wide)
    series = [trace for trace in traces(plot) if trace.mode == "lines+markers"]
    bands = [trace for trace in traces(plot) if trace.fill == "toself"]
    assert len(series) == len(bands) == 6 * 3
    success = [trace for trace in series if trace.name == "Attack success"]
    assert [list(trace.y) for trace in success] == [[100, 75, 50, 25]] * 6
    before = [trace for trace in traces(plot) if trace.line.dash == "longdash" and trace.legendgroup]
    assert {(trace.legendgroup, tuple(trace.y)) for trace in before} == {
        (SUCCESS.short, (100, 100)), (CONTROL.short, (0, 0)), (ACCURACY.short, (100, 100))
    }  # fmt: skip
    rate = ablations.sweeps["heads"]["forward"][1].success
    band = next(trace for trace in bands if trace.legendgroup == SUCCESS.short)
    assert 100 * rate.high in band.y and 100 * rate.low in band.y
    named = [trace.name for trace in traces(plot) if trace.showlegend]
    assert named == [SUCCESS.short, CONTROL.short, ACCURACY.short, "95 % interval", "as it is"]
    assert all(a.title.text for a in plot.select_yaxes(col=1))  # pyright: ignore[reportAttributeAccessIssue]


def test_accuracy_is_left_out_where_there_are_no_labels() -> None:
    plot = rates([setting(0.5, labelled=False)])
    assert [trace.name for trace in traces(plot)] == ["Attack success", "Control", "95 % interval"]


def test_rates_have_whiskers_of_their_intervals() -> None:
    found = setting(0.5)
    success, control, accuracy, _ = traces(rates([found, setting(0.2)]))
    assert success.x[0] + success.error_x.array[0] == pytest.approx(100 * found.success.high)
    assert success.x[0] - success.error_x.arrayminus[0] == pytest.approx(100 * found.success.low)
    assert len(control.x) == len(accuracy.x) == 2


def test_series_differ_by_more_than_colour() -> None:
    for styles in ((SUCCESS, CONTROL, ACCURACY), RULES):
        for name in ("colour", "dash", "symbol"):
            assert len({getattr(style, name) for style in styles}) == len(styles)


def test_a_component_map_has_zero_in_the_middle_of_its_colours() -> None:
    plot = component_map(
        torch.tensor([[0.5, -2.0]]),
        torch.tensor([1.0]),
        unit="x",
        scale="diverging",
        heads_note=torch.ones(1, 2),
    )
    assert (axis(plot).cmin, axis(plot).cmax) == (-2, 2)
    heads, mlps = traces(plot)
    assert np.array_equal(heads.z, [[0.5, -2.0]]) and np.array_equal(mlps.z, [[1.0]])


def test_maps_that_are_compared_share_their_colours() -> None:
    plot = component_map(torch.ones(2, 2), torch.ones(2), unit="x", scale="sequential", top=5.0)
    assert (axis(plot).cmin, axis(plot).cmax) == (0, 5)


@dataclass(frozen=True)
class Area:
    """A plain reference of a ROC curve's area: the share of pairs in order."""

    clean: torch.Tensor
    suspect: torch.Tensor

    def value(self) -> float:
        scores = [torch.repeat_interleave(torch.arange(len(c)), c) for c in (self.clean, self.suspect)]
        difference = scores[1][:, None] - scores[0][None]
        return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def test_the_roc_curve_holds_the_area_that_it_should() -> None:
    clean, suspect = torch.tensor([6, 3, 1, 0]), torch.tensor([1, 2, 3, 4])
    detector = Detection("dot", "epsilon", 1, 0.8, 0.7, 0.9, Rate(1, 10), Rate(7, 10), clean, suspect)
    curve, diagonal = traces(roc([detector], ["rule"]))
    assert list(diagonal.x) == list(diagonal.y)
    area = np.trapezoid(np.array(curve.y)[::-1], np.array(curve.x)[::-1]) / 1e4
    assert area == pytest.approx(Area(clean, suspect).value())
    own = int(np.argmax(curve.marker.size))
    assert (curve.x[own], curve.y[own]) == pytest.approx((10, 70))
    counts: Any = flag_counts([detector] * 4, ["a", "b", "c", "d"])
    assert [note.text for note in counts.layout.annotations] == ["a", "b", "c", "d"]
    bars = traces(counts)
    assert len(bars) == 8 and list(bars[0].y) == pytest.approx([60, 30, 10, 0])


def decode(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_overlays_are_clear_where_there_is_nothing() -> None:
    pixels = decode(contribution_overlay(torch.tensor([[0.0, 1.0], [-1.0, 0.5]]), 1.0))
    assert pixels.shape == (2, 2, 4)
    assert pixels[0, 0, 3] == 0
    assert pixels[0, 1, 0] > pixels[0, 1, 2] and pixels[1, 0, 2] > pixels[1, 0, 0]  # vermillion, blue
    assert pixels[0, 1, 3] > pixels[1, 1, 3]
    attention = decode(attention_overlay(torch.tensor([[0.0, 1.0]]), 1.0))
    assert attention[0, 1, 3] > attention[0, 0, 3]
    assert decode(contribution_overlay(torch.zeros(1, 1), 0.0))[0, 0, 3] == 0


def test_a_picture_is_itself() -> None:
    pixels = torch.randint(256, (5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(decode(picture(pixels)), pixels.numpy())
