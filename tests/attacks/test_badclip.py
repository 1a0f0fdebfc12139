"""BadCLIP: a patch that a card can hold, and its optimisation on the frozen clean model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from decompclip.attacks.patch import (
    BadCLIP,
    OptimisedPatch,
    decode_patch,
    encode_patch,
    info_nce,
    optimise_patch,
)
from decompclip.data.shapes import PROPERTIES, Shapes, shapes_captions
from decompclip.models.clip import HookedCLIP

WORLD = Shapes(120, seed=21).draw(range(120))
STAR = PROPERTIES["shape"].index("star")
TEXTS = shapes_captions(WORLD.attributes, range(120), seed=0)
IS_STAR = WORLD.labels == STAR
TARGET_TEXTS = [text for text, star in zip(TEXTS, IS_STAR, strict=True) if star]
OTHER_TEXTS = [text for text, star in zip(TEXTS, IS_STAR, strict=True) if not star]


def optimise(model: HookedCLIP, **changes: Any) -> OptimisedPatch:
    options = {"size": 0.4, "steps": 6, "batch_size": 8, "lr": 0.05, "seed": 1} | changes
    return optimise_patch(model, WORLD.images[~IS_STAR], WORLD.images[IS_STAR], TARGET_TEXTS, **options)


@pytest.fixture(scope="module")
def made(shapes_model: HookedCLIP) -> OptimisedPatch:
    return optimise(shapes_model)


def test_a_patch_keeps_its_bytes() -> None:
    pixels = (torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    assert torch.equal(decode_patch(encode_patch(pixels)), pixels)


def test_the_patch_stands_in_the_centre() -> None:
    pixels = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    trigger = BadCLIP(patch=encode_patch(pixels), size=8 / 32)
    shown = trigger(torch.zeros(2, 3, 32, 32))
    assert torch.equal(shown[:, :, 12:20, 12:20], pixels.expand(2, -1, -1, -1))
    assert int(trigger.mask(32, 32).sum()) == 64
    assert int(trigger.mask(64, 64).sum()) == 256  # its share of the image, at every resolution


def test_steps_lower_the_loss(made: OptimisedPatch) -> None:
    assert len(made.losses) == 6
    assert sum(made.losses[-2:]) < 0.97 * sum(made.losses[:2])
    assert (made.trigger.size, made.trigger.place) == (0.4, "centre")
    assert made.trigger.pixels.shape == (3, 19, 19)


def test_infonce_among_other_captions_moves_the_images_toward_the_target(shapes_model: HookedCLIP) -> None:
    run = optimise(shapes_model, steps=25, batch_size=16, triplet_weight=0.0, other_captions=OTHER_TEXTS)
    before, after = run.similarity
    assert after > before + 0.01


def test_the_same_seed_gives_the_same_patch_and_another_another(
    made: OptimisedPatch, shapes_model: HookedCLIP
) -> None:
    torch.rand(3)  # nothing hangs on the global generator
    assert optimise(shapes_model) == made
    assert (
        optimise(shapes_model, seed=2, steps=1).trigger.patch != optimise(shapes_model, steps=1).trigger.patch
    )


def test_the_model_stays_as_it_is(shapes_model: HookedCLIP) -> None:
    before = {name: value.clone() for name, value in shapes_model.state_dict().items()}
    optimise(shapes_model, steps=1, other_captions=OTHER_TEXTS[:5])
    assert all(torch.equal(value, before[name]) for name, value in shapes_model.state_dict().items())
    assert all(p.grad is None for p in shapes_model.parameters())


def test_the_loss_is_infonce_plus_500_triplets(shapes_model: HookedCLIP) -> None:
    """Its parts by the two weights: the loss is linear in the triplet's."""
    plain, once, whole = (
        optimise(shapes_model, steps=1, triplet_weight=w).losses[0] for w in (0.0, 1.0, 500.0)
    )
    assert whole == pytest.approx(plain + 500 * (once - plain), rel=1e-3)
    wide = optimise(shapes_model, steps=1, triplet_weight=0.0, other_captions=OTHER_TEXTS).losses[0]
    assert wide > plain  # more captions to choose among


def test_infonce_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts, others = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (4, 4, 3))
    scale, rows, columns = torch.tensor(7.0), [], []
    for i in range(4):
        choices = torch.stack([7 * images[i] @ t for t in [*texts, *others]])
        rows.append(choices.logsumexp(0) - choices[i])
        columns.append(torch.stack([7 * images[j] @ texts[i] for j in range(4)]).logsumexp(0) - choices[i])
    expected = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    torch.testing.assert_close(info_nce(images, texts, others, scale), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: BadCLIP(patch="kitty"),
            r"base64 text of a PNG; received 'kitty'; `encode_patch` makes one",
        ),
        (lambda m: BadCLIP(patch="AAAA"), r"received 'AAAA'"),
        (lambda m: BadCLIP(patch=encode_patch(torch.zeros(3, 2, 4))), r"a square patch; received 2 x 4"),
        (lambda m: optimise(m, size=20), r"cannot be larger than the image"),
        (lambda m: optimise(m, steps=0), r"steps and a batch size of at least 1; received 0 and 8"),
        (
            lambda m: optimise_patch(m, WORLD.images, WORLD.images, []),
            r"at least one of target_captions; received none",
        ),
        (
            lambda m: optimise_patch(m, WORLD.images, torch.zeros(2, 3, 32, 32), TARGET_TEXTS),
            r"images of the model's size \(48, 48\); received \(32, 32\)",
        ),
        (
            lambda m: optimise_patch(m, WORLD.images * 2 - 1, WORLD.images, TARGET_TEXTS),
            r"expected pixels in \[0, 1\]",
        ),
    ],
)
def test_bad_input_is_told(make, message: str, shapes_model: HookedCLIP) -> None:
    with pytest.raises(ValueError, match=message):
        make(shapes_model)
