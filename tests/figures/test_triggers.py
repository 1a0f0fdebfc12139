"""The gallery of triggers: one row each, and the pixels are those of the previews."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from decompclip.attacks.patch import BadNet
from decompclip.attacks.preview import Preview, gallery, preview, save_gallery
from decompclip.attacks.whole_image import SIG
from decompclip.figures.gallery import TILE, TRIGGER_COLUMNS


@pytest.fixture
def previews() -> list[Preview]:
    images = (torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return [preview(BadNet(place="centre"), images), preview(SIG(frequency=2), images)]


def test_a_row_a_trigger_a_tile_a_column(previews: list[Preview]) -> None:
    figure = gallery(previews)
    traces: Any = figure.data
    assert len(traces) == 2 * len(TRIGGER_COLUMNS)
    source = traces[0].source.partition(",")[2]
    tile = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    expected = (previews[0].clean[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(tile, expected)
    layout: Any = figure.layout
    texts = " ".join(note.text for note in layout.annotations)
    for word in (
        "badnet",
        "local, structured",
        "sig",
        "global",
        "PSNR",
        "SSIM",
        "% of pixels",
        *TRIGGER_COLUMNS,
    ):
        assert word in texts


def test_the_file_is_a_picture_of_all_rows(previews: list[Preview], tmp_path: Path) -> None:
    one, two = save_gallery(previews[:1], tmp_path / "one.png"), previews[0].save(tmp_path / "same.png")
    assert one.read_bytes() == two.read_bytes()
    with Image.open(one) as single, Image.open(save_gallery(previews, tmp_path / "two.png")) as both:
        assert both.height - single.height >= TILE
        assert both.width == single.width > 3 * TILE
        assert len(single.getcolors(1 << 20) or []) > 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "same.png", "two.png"]


def test_a_previews_own_figure_is_its_row(previews: list[Preview]) -> None:
    assert previews[0].figure() == gallery(previews[:1])


def test_bad_input_is_told(previews: list[Preview], tmp_path: Path) -> None:
    for draw in (gallery, lambda p: save_gallery(p, tmp_path / "x.png")):
        with pytest.raises(ValueError, match="expected at least one preview; received none"):
            draw([])
