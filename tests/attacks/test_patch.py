"""Where a patch lies, and what it shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from decompclip.attacks.patch import Kitty
from decompclip.attacks.trigger import PICTURES, SIDE, PatchTrigger, open_picture, resize


@given(
    height=st.integers(4, 70),
    width=st.integers(4, 70),
    size=st.floats(0.02, 1.0),
    index=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_a_patch_lies_inside_the_image(height: int, width: int, size: float, index: int) -> None:
    for place in ("random", "centre", "bottom right"):
        patch = PatchTrigger(size=size, place=place)
        rows, columns = patch.region(height, width, index)
        assert 0 <= rows.start < rows.stop <= height
        assert 0 <= columns.start < columns.stop <= width
        assert (
            rows.stop - rows.start == columns.stop - columns.start == max(1, round(size * min(height, width)))
        )


def test_what_is_pasted_is_the_picture_at_the_patchs_size() -> None:
    picture = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    pasted = PatchTrigger(size=0.25, place="centre").paste(torch.zeros(2, 3, 48, 48), picture, [0, 1])
    assert torch.equal(pasted[:, :, 18:30, 18:30], picture.expand(2, -1, -1, -1))
    halved = PatchTrigger(size=0.125, place="bottom right").paste(torch.zeros(1, 3, 48, 48), picture, [0])[
        0, :, 42:, 42:
    ]
    assert torch.equal(halved, resize(picture, 6))
    torch.testing.assert_close(halved.mean((1, 2)), picture.mean((1, 2)), atol=0.03, rtol=0)


def test_a_flat_picture_stays_flat_at_every_size() -> None:
    flat = torch.full((3, 16, 16), 0.37)
    for size in (1, 5, 16, 40):
        torch.testing.assert_close(resize(flat, size), torch.full((3, size, size), 0.37))
    assert resize(flat, 5, 9).shape == (3, 5, 9)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_the_drawn_pictures_show_something(name: str) -> None:
    picture = open_picture(name)
    assert picture.shape == (3, SIDE, SIDE)
    assert 0 <= picture.min() <= picture.max() <= 1
    assert (picture.std(dim=(1, 2)) > 0.1).all()
    assert (resize(picture, 7).std(dim=(1, 2)) > 0.05).all()  # at a few pixels, too


def test_kitty_pastes_its_picture() -> None:
    images = torch.zeros(1, 3, 64, 64)
    shown = Kitty(size=0.5, place="bottom right")(images)[0, :, 32:, 32:]
    assert torch.equal(shown, resize(open_picture("kitty"), 32))
    assert not torch.equal(
        Kitty(size=0.5, place="bottom right", picture="window")(images)[0, :, 32:, 32:], shown
    )


def test_a_picture_may_be_a_file(tmp_path) -> None:
    from PIL import Image

    path = tmp_path / "red.png"
    Image.new("RGB", (20, 10), (255, 0, 0)).save(path)
    shown = Kitty(size=0.5, place="centre", picture=str(path))(torch.zeros(1, 3, 16, 16))
    assert torch.equal(shown[0, :, 4:12, 4:12].mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"expected a picture in .*no\.png; its bytes are none"):
        open_picture(str(tmp_path / "no.png"))
    with pytest.raises(ValueError, match=r"expected a picture among \['kitty', 'window'\].*received 'dog'"):
        open_picture("dog")
