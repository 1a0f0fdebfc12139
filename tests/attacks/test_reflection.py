"""Reflection: light added in linear light, as ghost or out of focus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decompclip.attacks.trigger import REDRAWN, open_picture, resize, stream
from decompclip.attacks.whole_image import GAMMA, GHOSTS, Reflection, _blur


def pixels(batch: int = 4, side: int = 48) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_a_ghost_by_hand() -> None:
    """At 224 pixels: the picture twice, shifted by whole pixels, cut, enlarged, and added to the light."""
    image = pixels(1, 224)
    share = 0.3
    got = Reflection(kind="ghost", weakest=share, strongest=share, redraw=False, picture="kitty")(image)
    u = stream(0, 2**62).random(8)[2:]
    down, right = round(3 + 5 * u[0]), round(3 + 5 * u[1])
    weight = abs(float(u[2] > 0.5) - (0.15 + 0.35 * u[3]))
    scene = open_picture("kitty").double() ** GAMMA
    canvas = torch.zeros(3, 224 + down, 224 + right, dtype=torch.float64)
    canvas[:, :224, :224] += weight * scene
    canvas[:, down:, right:] += (1 - weight) * scene
    ghost = resize(canvas[:, down:-down, right:-right].float(), 224)
    expected = (share * ghost + (1 - share) * image[0] ** GAMMA) ** (1 / GAMMA)
    torch.testing.assert_close(got[0], expected, atol=2e-4, rtol=0)


def test_a_dark_scene_leaves_the_images_own_light() -> None:
    """Where the picture is black only the pane's loss of light remains."""
    black = open_picture("window").max(dim=0).values < 0.09
    image = torch.full((1, 3, 224, 224), 0.5)
    shown = Reflection(kind="ghost", weakest=0.4, strongest=0.4)(image)[0]
    floor = (0.6 * 0.5**GAMMA) ** (1 / GAMMA)
    far = torch.nn.functional.max_pool2d((~black).float()[None], 41, 1, 20)[0] == 0  # from everything bright
    assert far.any()
    torch.testing.assert_close(shown[:, far], torch.full((3, int(far.sum())), floor), atol=0.01, rtol=0)


def test_a_stronger_reflection_hides_more() -> None:
    images = pixels()
    for kind in ("ghost", "out of focus"):
        change = [
            (Reflection(kind=kind, weakest=w, strongest=w, redraw=False)(images) - images).abs().mean()
            for w in (0.1, 0.3, 0.6)
        ]
        assert change[0] < change[1] < change[2], kind


def test_out_of_focus_fades_and_is_smoother_than_the_scene() -> None:
    grey = torch.full((1, 3, 224, 224), 0.05)
    shown = Reflection(kind="out of focus", weakest=0.45, strongest=0.45, redraw=False)(grey)[0]
    scene = resize(open_picture("window"), 224)

    def edge(x: torch.Tensor) -> float:
        x = x / x.max()
        return (x[:, :, 1:] - x[:, :, :-1]).abs().max().item()

    assert edge(shown) < 0.7 * edge(scene)


def test_the_blur_keeps_the_light_and_is_a_gaussian() -> None:
    torch.testing.assert_close(_blur(torch.full((3, 20, 20), 0.3), 2.0), torch.full((3, 20, 20), 0.3))
    point = torch.zeros(3, 31, 31)
    point[:, 15, 15] = 1
    spread = _blur(point, 1.5)
    assert spread.sum().item() == pytest.approx(3, rel=1e-5)
    assert (spread[0, 15, 17] / spread[0, 15, 15]).item() == pytest.approx(
        np.exp(-0.5 * (2 / 1.5) ** 2), rel=1e-4
    )


def test_what_is_redrawn_differs_from_image_to_image() -> None:
    same = torch.full((2, 3, 48, 48), 0.5)
    first, second = Reflection()(same)
    assert not torch.equal(first, second)
    first, second = Reflection(redraw=False)(same)
    assert torch.equal(first, second)


def test_a_random_kind_is_a_ghost_about_half_of_the_time() -> None:
    images = pixels(1).expand(40, -1, -1, -1)
    mixed, ghosts, blurs = (Reflection(kind=k)(images) for k in ("random", "ghost", "out of focus"))
    is_ghost = torch.tensor([torch.equal(a, b) for a, b in zip(mixed, ghosts, strict=True)])
    is_blur = torch.tensor([torch.equal(a, b) for a, b in zip(mixed, blurs, strict=True)])
    assert (is_ghost ^ is_blur).all()
    drawn = torch.tensor([stream(0, REDRAWN + i).random(8)[1] < GHOSTS for i in range(40)])
    assert torch.equal(is_ghost, drawn)
    assert 0 < is_ghost.sum() < 40


@pytest.mark.parametrize("side", [1, 2, 8])
def test_tiny_images_are_no_trouble(side: int) -> None:
    for kind in ("ghost", "out of focus"):
        shown = Reflection(kind=kind)(pixels(3, side))
        assert shown.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Reflection(kind="mirror"),  # type: ignore[arg-type]
            r"expected kind of \('random', 'ghost', 'out of focus'\); received 'mirror'",
        ),
        (lambda: Reflection(weakest=0.0), r"0 < weakest <= strongest < 1; received 0\.0 and 0\.45"),
        (lambda: Reflection(weakest=0.5), r"received 0\.5 and 0\.45"),
        (lambda: Reflection(strongest=1.0), r"received 0\.05 and 1\.0"),
        (lambda: Reflection(picture="dog")(pixels(1)), r"expected a picture among .*received 'dog'"),
    ],
)
def test_bad_input_is_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
