"""The gallery shows each map over its picture, in its place and on the scale that it says."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from decompclip.figures.gallery import (
    MAX_COLUMNS,
    MAX_ROWS,
    SIDE,
    PictureRow,
    gallery as draw_gallery,
    picture_rows,
)
from decompclip.operators.mask_scores import score_masks
from decompclip.operators.tokens import TokenMaps

GRID, PATCH, SIZE = (2, 3), (4, 6), (8, 18)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(n_maps: int = 2, n_images: int = 3) -> TokenMaps:
    pictures = (255 * draw(n_images, *SIZE, 3, seed=1).sigmoid()).to(torch.uint8)
    return TokenMaps(
        patches=draw(n_maps, n_images, *GRID),
        prefix=draw(n_maps, n_images, 1),
        kind="contribution",
        heads=tuple((3, head) for head in range(n_maps)),
        image_size=SIZE,
        patch_size=PATCH,
        names=tuple(f"image {i}" for i in range(n_images)),
        toward="a star",
        pictures=pictures,
    )


def weights(maps: TokenMaps) -> TokenMaps:
    return replace(
        maps, patches=maps.patches[:1].abs(), prefix=maps.prefix[:1], kind="rollout", heads=(), toward=""
    )


def traces(plot: go.Figure) -> Sequence[Any]:
    return plot.data  # type: ignore[return-value] - plotly's own annotation is of the figure


def gallery(*maps: TokenMaps, **options: Any) -> go.Figure:
    return draw_gallery(*(of.overlays() for of in maps), **options)


def heats(plot: go.Figure) -> list[Any]:
    return [trace for trace in traces(plot) if isinstance(trace, go.Heatmap)]


def bars(plot: go.Figure) -> list[Any]:
    return [t.marker for t in traces(plot) if t.type == "scatter" and t.marker.showscale]


def layout(plot: go.Figure) -> Any:
    return plot.layout


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_every_map_stands_over_its_picture() -> None:
    maps = make()
    plot = gallery(maps)
    found = heats(plot)
    assert len(found) == 2 * 3
    for place, trace in enumerate(found):
        row, column = divmod(place, 3)
        np.testing.assert_array_equal(trace.z, maps.patches[row, column].numpy())
        assert trace.xaxis == f"x{3 * (row + 1) + column + 1}"  # under the row of pictures
        assert (trace.x0, trace.dx, trace.y0, trace.dy) == (3, 6, 2, 4)
    images = layout(plot).images
    assert len(images) == 3 * 3
    assert maps.pictures is not None
    shown = decode(images[1].source)
    times = 2 * SIDE // 18
    np.testing.assert_array_equal(shown[::times, ::times], maps.pictures[1].numpy())
    under = decode(images[4].source)[::times, ::times]
    assert (under[..., 0] == under[..., 1]).all() and (under[..., 1] == under[..., 2]).all()
    assert (images[4].xref, images[4].sizex, images[4].sizey) == ("x5", 18, 8)
    texts = [note.text for note in layout(plot).annotations]
    assert {"<b>head 3.0</b>", "<b>head 3.1</b>", "image", "image 2"} <= set(texts)


def test_panels_have_the_images_shape_and_run_downward() -> None:
    plot = gallery(make())
    x, y = layout(plot).xaxis, layout(plot).yaxis
    inner = layout(plot).width - layout(plot).margin.l - layout(plot).margin.r
    tall = layout(plot).height - layout(plot).margin.t - layout(plot).margin.b
    assert np.ptp(x.domain) * inner / (np.ptp(y.domain) * tall) == pytest.approx(18 / 8, rel=0.02)
    assert (tuple(x.range), tuple(y.range)) == ((0, 18), (8, 0))


def test_scales_end_where_they_say() -> None:
    maps = make()
    own = [float(maps.patches[row].abs().max()) for row in range(2)]
    ends = [(trace.zmin, trace.zmax) for trace in heats(gallery(maps))]
    assert ends == [(-own[row], own[row]) for row in (0, 0, 0, 1, 1, 1)]
    shared = gallery(maps, weights(maps), scale="shared")
    assert {trace.zmax for trace in heats(shared)[:6]} == {max(own)}
    assert {trace.zmin for trace in heats(shared)[6:]} == {0}
    signed, unsigned = bars(shared)
    assert (signed.cmin, signed.cmax, unsigned.cmin) == (-max(own), max(own), 0)
    assert "toward a star" in signed.colorbar.title.text and unsigned.colorbar.title.text == "weight"


def test_zero_is_clear_where_signs_matter() -> None:
    scale = heats(gallery(make()))[0].colorscale
    assert scale[len(scale) // 2][0] == 0.5 and scale[len(scale) // 2][1].endswith(", 0.000)")
    assert scale[0][1].endswith(", 0.780)") and scale[-1][1].endswith(", 0.780)")


def test_a_mask_is_outlined() -> None:
    masks = torch.zeros(3, *SIZE, dtype=torch.bool)
    masks[1, 2:5, 4:9] = True
    plot = gallery(make(1), masks=masks)
    lines = [trace for trace in traces(plot) if trace.name == "mask"]
    assert len(lines) == 2 * 3 * 2  # a rim and a border in each panel, pictures too
    border = next(line for line in lines if line.xaxis == "x2")
    x, y = ([value for value in values if value is not None] for values in (border.x, border.y))
    assert (min(x), max(x), min(y), max(y)) == (4, 9, 2, 5)
    length = sum(abs(x[i + 1] - x[i]) + abs(y[i + 1] - y[i]) for i in range(0, len(x), 2))
    assert length == 2 * (3 + 5)
    assert all(len(line.x) == 0 for line in lines if line.xaxis == "x1")


def test_without_pictures_the_maps_stand_alone() -> None:
    plot = gallery(replace(make(), pictures=None))
    assert len(heats(plot)) == 6 and not layout(plot).images
    assert {"image"}.isdisjoint(note.text for note in layout(plot).annotations)


def test_what_is_left_out_is_said() -> None:
    plot = gallery(make(MAX_ROWS + 2, MAX_COLUMNS + 1))
    assert len(heats(plot)) == MAX_ROWS * MAX_COLUMNS
    (text,) = [note.text for note in layout(plot).annotations if "not shown" in note.text]
    assert text.startswith("not shown: 2 more maps, 1 more images")
    assert not [note for note in layout(gallery(make())).annotations if "not shown" in note.text]


def test_names_are_no_markup() -> None:
    plot = gallery(replace(make(1, 1), names=("<b>%{z}",)), notes=["share 0.5"])
    assert (
        "&lt;b&gt;" in heats(plot)[0].hovertemplate
        and "%{z}" not in heats(plot)[0].hovertemplate.split(":")[0]
    )
    assert "<b>head 3.0</b><br>share 0.5" in [note.text for note in layout(plot).annotations]


def test_large_pictures_are_sent_small() -> None:
    maps = make(1, 1)
    large = replace(
        maps, image_size=(800, 1800), patch_size=(400, 600), pictures=torch.full((1, 800, 1800, 3), 7).byte()
    )
    shown = decode(layout(gallery(large)).images[0].source)
    assert shown.shape == (round(2 * SIDE * 8 / 18), 2 * SIDE, 3) and (shown == 7).all()


def test_errors_say_what_to_do() -> None:
    maps = make()
    cases: Sequence[tuple[tuple[TokenMaps, ...], dict[str, Any], str]] = [
        ((), {}, "expected maps to show; received none"),
        ((maps, make(1, 2)), {}, "expected maps of the same images; received 3 and 2"),
        ((maps,), {"masks": torch.zeros(3, 8, 8, dtype=torch.bool)}, r"= \[3, 8, 18\]; received \[3, 8, 8\]"),
        ((maps,), {"notes": ["a"]}, "expected a note for each of 2 maps; received 1"),
        ((maps,), {"scale": "own"}, r"expected scale of \('map', 'shared'\); received 'own'"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            gallery(*given, **options)


def test_results_make_their_own_figures() -> None:
    maps = make()
    assert len(heats(maps.figure(scale="shared"))) == 6
    assert maps.figure(weights(maps)) == gallery(maps, weights(maps))
    masks = torch.zeros(3, *SIZE, dtype=torch.bool)
    masks[:, :4, :6] = True
    found = score_masks(maps, masks)
    share, hits, *control, _ = (t for t in traces(found.figure(control=found)) if t.mode == "markers")
    order = found.order
    assert list(share.x) == pytest.approx([100 * float(found.mean_share[i]) for i in order])
    assert list(hits.x) == pytest.approx([100 * float(found.hit_rate[i]) for i in order])
    assert all(trace.marker.symbol.endswith("-open") for trace in control) and len(control) == 2
    assert (np.array(share.x) + share.error_x.array <= 100.001).all()
    assert [row[0] for row in traces(found.figure(count=1))[0].customdata] == [found.labels[order[0]]]
    assert "not shown: 1 maps" in layout(found.figure(count=1)).xaxis.title.text
    with pytest.raises(ValueError, match="expected a control of the same maps"):
        found.figure(control=score_masks(make(1), masks))


def test_rows_of_pictures_say_what_does_not_fit() -> None:
    tile = torch.zeros(6, 6, 3, dtype=torch.uint8)

    def notes(rows: int, pictures: int) -> list[str]:
        captions = [f"number {i}" for i in range(pictures)]
        made = [PictureRow(f"row {i}", tile, [tile] * pictures, captions) for i in range(rows)]
        return [n.text for n in layout(picture_rows(made, title="")).annotations if "not shown" in n.text]

    assert notes(14, 11) == ["not shown: 2 more rows, 1 more pictures of each"]
    assert notes(2, 13) == ["not shown: 0 more rows, 3 more pictures of each"]
    assert notes(12, 10) == []
