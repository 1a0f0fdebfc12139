"""WaNet: one smooth warp, whose size is told in pixels."""

from __future__ import annotations

import math

import pytest
import torch

from decompclip.attacks.whole_image import WaNet


def moves(trigger: WaNet, side: int) -> torch.Tensor:
    """Pixels by which each pixel is moved, [side, side, 2]."""
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    return (trigger._grid(side, side)[0] - identity) * (side - 1) / 2


def test_a_flat_image_stays_as_it_is() -> None:
    flat = torch.full((2, 3, 20, 30), 0.4)
    torch.testing.assert_close(WaNet(s=2.0)(flat), flat)
    torch.testing.assert_close(WaNet(cover=True)(flat), flat)


def test_a_ramp_shows_the_move() -> None:
    side, trigger = 48, WaNet(s=1.0)
    ramp = torch.linspace(0, 1, side).expand(1, 3, side, side)
    moved = (trigger(ramp) - ramp)[0, 0] * (side - 1)
    torch.testing.assert_close(moved, moves(trigger, side)[..., 0].float(), atol=1e-3, rtol=0)


def test_every_image_is_warped_alike_and_another_seed_warps_otherwise() -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    first, second = WaNet()(images, [3, 90])
    assert torch.equal(first, second)
    assert not torch.equal(WaNet(seed=1)(images[:1])[0], first)
    third, fourth = WaNet(cover=True)(images, [3, 90])
    assert not torch.equal(third, fourth)


def test_the_strength_at_the_control_points() -> None:
    """With one control point a pixel, nothing is enlarged: the mean move is s / 2 pixels of 32."""
    inner = moves(WaNet(k=32, s=0.5), 32)[1:-1, 1:-1]  # at the border moves are cut
    assert inner.abs().mean() == pytest.approx(0.25, rel=0.08)


def test_a_share_scales_with_the_image_and_a_pixel_does_not() -> None:
    def size(unit, side: int) -> float:
        return moves(WaNet(unit=unit), side)[2:-2, 2:-2].abs().mean().item()

    assert size("share", 224) / size("share", 32) == pytest.approx(223 / 31, rel=0.1)
    assert size("pixel", 224) / size("pixel", 32) == pytest.approx(1, rel=0.1)
    assert size("pixel", 32) == size("share", 32)


def test_the_warp_is_smooth() -> None:
    """From pixel to pixel it changes by little, the less the more pixels there are."""
    for side, share in ((64, 0.15), (224, 0.045)):
        field = moves(WaNet(), side)[4:-4, 4:-4]
        assert (field[1:] - field[:-1]).abs().max() < share * field.abs().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WaNet(k=1), r"expected k >= 2 control points.*received 1"),
        (lambda: WaNet(s=0), r"expected a strength s above 0; received 0"),
        (lambda: WaNet(s=math.inf), r"received inf"),
        (lambda: WaNet(unit="percent"), r"expected unit of \('share', 'pixel'\); received 'percent'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
