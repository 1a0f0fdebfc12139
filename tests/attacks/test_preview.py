"""A preview holds twins, the card and the fidelity."""

from __future__ import annotations

import torch

from decompclip.attacks.patch import BadNet
from decompclip.attacks.preview import preview
from decompclip.attacks.whole_image import SIG


def test_a_preview_is_what_the_trigger_does() -> None:
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    trigger = BadNet(seed=2)
    shown = preview(trigger, images, [7, 8, 9])
    assert torch.equal(shown.triggered, trigger(images, [7, 8, 9]))
    assert torch.equal(shown.clean, images)
    assert shown.card == trigger.card()
    assert shown.quality.summary()["changed"] == trigger.mask(24, 24).float().mean().round(decimals=4)


def test_the_difference_is_ten_times_around_grey() -> None:
    grey = torch.full((1, 3, 16, 16), 0.5)
    shown = preview(SIG(amplitude=0.04), grey)
    torch.testing.assert_close(shown.difference(), 0.5 + 10 * (shown.triggered - grey))
    assert shown.difference().max() <= 0.9 + 1e-6
    assert shown.difference(gain=1000).max() == 1
