# pyright: reportAttributeAccessIssue=false
"""Panels of points, curves, scatter and heads, and figures as files."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from decompclip.figures.curves import Curve, LinePanel, line_panels
from decompclip.figures.gallery import HeadPair, head_pairs
from decompclip.figures.heatmaps import component_map, matrix, text_cosines
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels, scatter_panels
from decompclip.figures.theme import on_white, plotly_script, write_figure

RATE = {"value": 0.5, "low": 0.4, "high": 0.7}


def test_points_keep_their_row_interval_and_style() -> None:
    panel = Panel(
        "a", "images, %", {"x": [Point.of(RATE), None], "y": [Point(1.0), Point(2.0)]}, PERCENT, line=50.0
    )
    other = Panel("b", "%", {"y": [Point(3.0), Point(4.0)]})
    plot = point_panels(["one", "two"], [panel, other], bars="95 % interval")
    x, y, line, again, bars = plot.data
    assert bars.name == "95 % interval" and bars.showlegend and list(bars.x) == [None]
    assert list(x.x) == [50.0] and list(x.error_x.array) == pytest.approx([20.0])
    assert list(x.error_x.arrayminus) == pytest.approx([10.0])
    assert list(y.x) == [1.0, 2.0] and y.marker.symbol != x.marker.symbol
    assert list(line.x) == [50.0, 50.0]
    assert again.marker.symbol == y.marker.symbol and not again.showlegend and y.showlegend
    assert [a.text for a in plot.layout.annotations] == ["(a) a", "(b) b"]
    with pytest.raises(
        ValueError,
        match=r"expected 2 points of 'x'; received|expected 2 points of 'x', one a row; received 1",
    ):
        point_panels(["one", "two"], [Panel("a", "%", {"x": [Point(1.0)]})])
    with pytest.raises(ValueError, match=r"expected bars='...', what the intervals are"):
        point_panels(["one", "two"], [panel])
    assert "95 % interval" not in [
        trace.name for trace in point_panels(["one", "two"], [other], bars="95 % interval").data
    ]
    with pytest.raises(ValueError, match=r"expected at most 7 series; received 9"):
        point_panels(["one"], [Panel("a", "%", {str(i): [Point(1.0)] for i in range(9)})])


def test_names_are_shown_as_they_are() -> None:
    """Plotly reads tags in texts, and places for numbers in hovers."""
    name, shown = "a <b>dog</b> & %{x}", "a &lt;b&gt;dog&lt;/b&gt; &amp; %&#123;x}"
    points = point_panels([f"{name}<br>below"], [Panel("", "%", {"x": [Point(1.0, 0.5, 2.0)]})], bars="b")
    assert points.layout.yaxis.ticktext == (f"{shown}<br>below",)
    assert points.data[0].customdata[0][0] == f"{shown} below"
    curves = line_panels(
        [LinePanel("", "x", "y", {name: Curve([0], [1.0])}, levels={name: 2.0})], columns=1
    ).data
    assert curves[0].name == shown and all(shown in trace.hovertemplate for trace in curves[:2])
    cells = matrix(np.ones((1, 1)), rows=[name], columns=[name], unit="", hover="").data[0]
    assert (cells.x, cells.y) == ((shown,), (shown,))
    title = component_map(torch.ones(1, 1), torch.ones(1), unit="", scale="diverging", title=name)
    assert title.layout.title.text == shown
    texts = text_cosines({"cosine": Point(0.5)}, {}, torch.ones(1, 1), [name], ["b"])
    assert texts.layout.yaxis2.ticktext == (shown,) and texts.data[-1].customdata[0][0] == f"{shown}<br>b"


def test_curves_have_bands_and_thin_companions() -> None:
    curve = Curve([0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5], thin=[0.0, 0.1])
    panels = [
        LinePanel("a", "layer", "%", {"x": curve}, whole=True),
        LinePanel("b", "e", "%", {"x": curve}, log_x=True, marks={0.5: "here"}),
    ]
    plot = line_panels(panels, columns=2, bands="range", marks="the paper's")
    band, thin, main = plot.data[:3]
    assert list(band.y) == [1.5, 2.5, 1.5, 0.5] and list(thin.y) == [0.0, 0.1] and list(main.y) == [1.0, 2.0]
    assert (plot.layout.xaxis.type, plot.layout.xaxis2.type) == ("linear", "log")
    assert [trace.text[0] for trace in plot.data if trace.text] == ["here"]
    assert [trace.name for trace in plot.data if trace.showlegend] == ["range", "control", "the paper's"]
    assert plot.layout.yaxis.title.text == "%" and plot.layout.yaxis2.title.text is None


def test_scatter_has_the_line_of_equals() -> None:
    plot = scatter_panels({"heads": {"early": [(0.0, 1.0), (2.0, -1.0)]}}, x="direct", y="causal")
    equal, points = plot.data
    assert list(equal.x) == list(equal.y) == [-1.0, 2.0]
    assert list(points.x) == [0.0, 2.0] and list(points.y) == [1.0, -1.0]


def test_heads_share_one_scale_and_outline_the_trigger() -> None:
    pairs = [HeadPair(f"head {i}", [[0.0, float(i)]], [[-3.0, 0.0]]) for i in range(2)]
    plot = head_pairs(pairs, unit="toward star", marked=[(0, 1)])
    heat = [t for t in plot.data if isinstance(t, go.Heatmap)]
    assert {(t.zmin, t.zmax) for t in heat} == {(-3.0, 3.0)} and sum(bool(t.showscale) for t in heat) == 1
    assert sum(isinstance(t, go.Scatter) for t in plot.data) == 2


def test_html_needs_nothing_and_unknown_endings_are_refused(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1], y=[2]))
    page = write_figure(figure, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page and 'src="http' not in page
    beside = [write_figure(figure, tmp_path / name, script="beside") for name in ("b.html", "c.html")]
    assert all(
        path.stat().st_size < 50_000 and 'src="plotly.min.js"' in path.read_text(encoding="utf-8")
        for path in beside
    )
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
    with pytest.raises(
        ValueError, match=r"expected a file that ends in \.html, \.png, \.svg, \.pdf; received a\.bmp"
    ):
        write_figure(figure, tmp_path / "a.bmp")
    assert on_white(figure).layout.paper_bgcolor == "#ffffff" and figure.layout.paper_bgcolor is None
    assert "</script" not in plotly_script().lower()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            ValueError("Image export requires the kaleido package, which can be installed using pip"),
            "pip install",
        ),
        (
            RuntimeError("Kaleido requires Google Chrome to be installed."),
            "pip install|apt-get install chromium",
        ),
        (RuntimeError("The browser seemed to close immediately"), "apt-get install chromium"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> bytes:
        raise error

    monkeypatch.setattr(go.Figure, "to_image", fail)
    with pytest.raises(RuntimeError, match=rf"expected kaleido and a Chrome to write a\.png; .*({remedy})"):
        write_figure(go.Figure(), tmp_path / "a.png")


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> bytes:
        raise builtins.ZeroDivisionError("no")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    with pytest.raises(ZeroDivisionError):
        write_figure(go.Figure(), tmp_path / "a.png")


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no Chromium on this machine to draw images with"
)
def test_images_are_drawn(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[2, 3]), layout={"height": 200})
    assert write_figure(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert write_figure(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    # a point without an interval has no whisker, not one of no width
    points = point_panels(["a", "b"], [Panel("", "%", {"x": [Point(1, 0.5, 2), Point(2)]})], bars="95 %")
    drawn = write_figure(points, tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn and drawn.count('class="xerror"') == 1


def test_committed_figures_are_on_white() -> None:
    """`write_figure` puts them there: on a page that is dark, a transparent one cannot be read."""
    pictures = sorted((Path(__file__).parents[2] / "analyses" / "results").rglob("*.png"))
    assert len(pictures) > 70
    corners = {path.name: Image.open(path).convert("RGBA").getpixel((0, 0)) for path in pictures}
    assert {name: colour for name, colour in corners.items() if colour != (255, 255, 255, 255)} == {}
