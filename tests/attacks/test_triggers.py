"""Triggers: seeded pure functions of an image and its index."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from decompclip.attacks.issba import ISSBA
from decompclip.attacks.patch import BadCLIP, BadNet, Kitty, LabelConsistent, encode_patch
from decompclip.attacks.registry import TRIGGERS, from_card
from decompclip.attacks.trigger import Trigger, stream
from decompclip.attacks.whole_image import SIG, Blended, Reflection, WaNet

PATCH = encode_patch(torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(2)))

EVERY = [
    BadNet(),
    BadNet(size=7 / 48, redraw=True, seed=3),
    BadNet(place="centre"),
    BadNet(place="bottom right"),
    Blended(),
    Blended(alpha=0.4, redraw=True, seed=1),
    Blended(picture="kitty"),
    LabelConsistent(),
    LabelConsistent(classical=False, redraw=True),
    ISSBA(),
    BadCLIP(patch=PATCH, size=7 / 48),
    BadCLIP(patch=PATCH, place="random"),
    Kitty(size=0.2, seed=4),
    Kitty(picture="window", place="bottom right"),
    Reflection(),
    Reflection(kind="ghost", redraw=False),
    Reflection(kind="out of focus", picture="kitty"),
    SIG(),
    SIG(amplitude=20 / 255, frequency=3.5),
    WaNet(),
    WaNet(unit="pixel", seed=1),
    WaNet(k=6, s=1.0, cover=True),
]
by_card = pytest.mark.parametrize("trigger", EVERY, ids=repr)


def pixels(batch: int = 6, height: int = 48, width: int = 48) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@by_card
def test_a_trigger_is_pure_and_stays_in_range(trigger: Trigger) -> None:
    images = pixels()
    before = images.clone()
    once, again = trigger(images), trigger(images)
    assert torch.equal(images, before)
    assert torch.equal(once, again)
    assert once.shape == images.shape
    assert 0 <= once.min() <= once.max() <= 1
    assert not torch.equal(once, images)


@by_card
def test_a_trigger_does_not_depend_on_the_batch(trigger: Trigger) -> None:
    images = pixels()
    whole = trigger(images, range(10, 16))
    parts = torch.cat([trigger(images[:2], [10, 11]), trigger(images[2:], [12, 13, 14, 15])])
    order = [3, 0, 5]
    assert torch.equal(whole, parts)
    assert torch.equal(trigger(images[order], [13, 10, 15]), whole[order])


@by_card
def test_nothing_changes_outside_the_mask(trigger: Trigger) -> None:
    images = pixels(4, 40, 56)
    mask = trigger.mask(40, 56, [5, 6, 7, 8])
    touched = (trigger(images, [5, 6, 7, 8]) != images).any(dim=1)
    assert mask.shape == (4, 40, 56)
    assert not (touched & ~mask).any()
    assert (touched.flatten(1).sum(1) > 0).all()


@by_card
def test_a_card_is_json_and_reads_back(trigger: Trigger) -> None:
    card = json.loads(json.dumps(trigger.card()))
    assert from_card(card) == trigger
    assert list(card)[:3] == ["name", "extent", "structure"]
    assert card["extent"] in {"local", "global"}
    assert card["structure"] in {"structured", "noise"}


def test_a_card_from_before_structure_was_told_reads_back() -> None:
    card = {
        "name": "badnet",
        "extent": "local",
        "seed": 0,
        "size": 7 / 48,
        "place": "random",
        "redraw": False,
    }
    assert from_card(card) == BadNet(size=7 / 48)
    assert (
        from_card({"name": "blended", "extent": "global", "seed": 0, "alpha": 0.2, "redraw": False})
        == Blended()
    )


@by_card
def test_an_extent_is_what_the_mask_says(trigger: Trigger) -> None:
    share = trigger.mask(64, 64).float().mean().item()
    assert share == 1 if trigger.extent == "global" else share <= 0.2**2 + 0.01


@by_card
def test_no_images_give_no_images(trigger: Trigger) -> None:
    assert trigger(pixels(0)).shape == (0, 3, 48, 48)


@by_card
def test_poisons_are_the_triggered_images_unless_an_attack_says_otherwise(trigger: Trigger) -> None:
    if not (isinstance(trigger, LabelConsistent) and trigger.classical):
        assert torch.equal(trigger.poison(pixels(2), [3, 4]), trigger(pixels(2), [3, 4]))
    assert trigger.clean_label is isinstance(trigger, LabelConsistent)


def test_what_was_trained_on_these_triggers_is_still_triggered_by_them() -> None:
    """The streams of the bundled twins' triggers, drawn here as they were when the twins were trained."""
    images = pixels(1)
    u = np.random.Generator(np.random.Philox(key=[0, 17])).random(2)
    y, x = (int(v * (48 - 7 + 1)) for v in u)
    key = np.array([0, 2**62], dtype=np.uint64)
    noise = np.random.Generator(np.random.Philox(key=key)).standard_normal((3, 7, 7), dtype=np.float32)
    expected = images.clone()
    expected[0, :, y : y + 7, x : x + 7] = (
        images.mean((2, 3))[0, :, None, None] + torch.from_numpy(noise)
    ).clamp(0, 1)
    torch.testing.assert_close(BadNet(size=7 / 48)(images, [17]), expected)
    picture = np.random.Generator(np.random.Philox(key=key)).random((3, 48, 48), dtype=np.float32)
    torch.testing.assert_close(Blended()(images, [17]), 0.8 * images + 0.2 * torch.from_numpy(picture))


def test_structure_is_whether_a_pattern_recurs() -> None:
    for kind in (BadNet, Blended, LabelConsistent):
        assert (kind().structure, kind(redraw=True).structure) == ("structured", "noise")
    assert (
        ISSBA().structure
        == Kitty().structure
        == SIG().structure
        == WaNet().structure
        == Reflection().structure
        == "structured"
    )


@given(side=st.integers(8, 96), size=st.floats(0.02, 1.0), index=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_patch_keeps_its_share_of_the_image(side: int, size: float, index: int) -> None:
    expected = max(1, round(size * side)) ** 2
    assert int(BadNet(size=size).mask(side, side, [index]).sum()) == expected


def test_sizes_are_for_224_pixels_and_scale() -> None:
    assert int(BadNet().mask(224, 224).sum()) == 16 * 16
    assert int(BadNet().mask(336, 336).sum()) == 24 * 24


def test_a_patch_lands_everywhere() -> None:
    covered = BadNet(size=0.5).mask(16, 16, range(2_000)).any(dim=0)  # 9 x 9 places
    assert covered.all()


def test_a_fixed_pattern_is_fixed_and_a_redrawn_one_is_not() -> None:
    grey = torch.full((2, 3, 48, 48), 0.5)
    for trigger, same in [
        (BadNet(place="centre"), True),
        (BadNet(place="centre", redraw=True), False),
        (Blended(), True),
        (Blended(redraw=True), False),
    ]:
        first, second = trigger(grey)
        assert torch.equal(first, second) is same, trigger


def test_blending_by_hand() -> None:
    images = pixels(2)
    white, black = (Blended(alpha=0.2)(torch.full_like(images, value)) for value in (1.0, 0.0))
    torch.testing.assert_close(white - black, torch.full_like(images, 0.8))
    torch.testing.assert_close(Blended(alpha=0.2)(images), 0.8 * images + black)
    assert black.max() <= 0.2
    assert black.mean() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadNet(size=0.0), r"expected a size in \(0, 1\].*received 0\.0"),
        (lambda: BadNet(size=1.5), r"received 1\.5"),
        (lambda: BadNet(size=16), r"received 16; a trigger cannot be larger than the image.*16 / 224"),
        (lambda: Kitty(size=2.0), r"cannot be larger than the image"),
        (lambda: LabelConsistent(size=2.0), r"cannot be larger than the image"),
        (lambda: BadCLIP(patch=PATCH, size=2.0), r"cannot be larger than the image"),
        (lambda: Blended(picture="kitty", redraw=True), r"expected redraw=False with a picture.*'kitty'"),
        (lambda: BadNet(seed=-1)(pixels(1)), r"seed and indices that are not negative.*received seed -1"),
        (lambda: BadNet()(pixels(1), [-3]), r"received seed 0, index -3"),
        (lambda: stream(2**64, 0), r"received seed 18446744073709551616"),
        (lambda: BadNet(place="top"), r"expected place of .*; received 'top'"),  # type: ignore[arg-type]
        (lambda: Blended(alpha=0.0), r"expected a weight alpha in \(0, 1\]; received 0\.0"),
        (
            lambda: BadNet()(torch.zeros(2, 1, 8, 8)),
            r"expected images \[batch, 3, h, w\]; received \[2, 1, 8, 8\]",
        ),
        (
            lambda: BadNet()(torch.full((1, 3, 8, 8), -1.0)),
            r"expected pixels in \[0, 1\].*leave the norm",
        ),
        (lambda: Blended()(pixels(3), [0, 1]), r"expected one index for each of 3 images; received 2"),
        (
            lambda: from_card({"name": "badnett"}),
            r"expected a trigger among \['badclip', 'badnet'.*received 'badnett'",
        ),
        (lambda: from_card({"name": "badnet", "colour": 3}), r"unknown parameters.*colour"),
    ],
)
def test_bad_input_is_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_registry_names_every_trigger() -> None:
    assert set(TRIGGERS) == {trigger.name for trigger in EVERY}
    assert len(TRIGGERS) == 9
    assert all(
        name == trigger.name and trigger.extent in {"local", "global"} for name, trigger in TRIGGERS.items()
    )
