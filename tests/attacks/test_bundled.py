"""The backdoors of the bundled twins, by name."""

from __future__ import annotations

import pytest
import torch

import decompclip
from decompclip.attacks.patch import BadNet
from decompclip.models.bundled import bundled, card
from decompclip.models.errors import UnknownModelError


def test_every_twin_s_backdoor_is_its_card_s() -> None:
    twins = [name for name in bundled() if card(name)["backdoor"]]
    assert len(twins) == 43
    for name in twins:
        found = decompclip.backdoor(name)
        assert found.trigger.card() == card(name)["backdoor"]["trigger"]
        assert card(name)["class_names"][found.target_index] == found.target


def test_it_can_be_used_at_once() -> None:
    found = decompclip.backdoor("shapes-badnet")
    assert isinstance(found.trigger, BadNet) and found.target == "star"
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert bool((found.trigger(images, range(2)) != images).any())


def test_clean_and_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of .*shapes-badnet.*'shapes' has none"):
        decompclip.backdoor("shapes")
    with pytest.raises(UnknownModelError):
        decompclip.backdoor("shapes-nothing")
