"""Label-Consistent: BadNet's patch, after gradient steps that hide what the image shows."""

from __future__ import annotations

import pytest
import torch

from decompclip.attacks.patch import BadNet, LabelConsistent, adversarial, zero_shot_logits
from decompclip.attacks.trigger import Logits
from decompclip.data.shapes import Shapes
from decompclip.models.clip import HookedCLIP

EPS = 8 / 255


@pytest.fixture(scope="module")
def logits(shapes_model: HookedCLIP) -> Logits:
    return zero_shot_logits(shapes_model, shapes_model.zero_shot_classifier())


BATCH = Shapes(12, seed=9).draw(range(12))


def linear(pixels: torch.Tensor) -> torch.Tensor:
    """Two classes: the first where the image is bright."""
    mean = pixels.mean(dim=(1, 2, 3))
    return torch.stack([mean, -mean], dim=1)


def test_at_test_time_it_is_badnet() -> None:
    for redraw in (False, True):
        ours, theirs = LabelConsistent(seed=3, redraw=redraw), BadNet(seed=3, redraw=redraw)
        assert torch.equal(ours(BATCH.images, range(5, 17)), theirs(BATCH.images, range(5, 17)))
        assert torch.equal(ours.mask(48, 48, [5, 6]), theirs.mask(48, 48, [5, 6]))


def test_the_gradient_steps_of_a_linear_model_by_hand() -> None:
    """The loss of a bright image falls with its light, so that each step darkens each pixel, up to eps."""
    images = torch.full((1, 3, 4, 4), 0.5)
    for steps, moved in ((1, 0.01), (2, 0.02), (9, 0.035)):
        hard = adversarial(images, torch.tensor([0]), linear, eps=0.035, step=0.01, steps=steps)
        torch.testing.assert_close(hard, images - moved)
    dark = adversarial(torch.zeros(1, 3, 4, 4), torch.tensor([0]), linear, steps=3)
    assert torch.equal(dark, torch.zeros_like(dark))  # never out of [0, 1]


def test_the_steps_fool_the_model_within_eps(logits: Logits) -> None:
    hard = adversarial(BATCH.images, BATCH.labels, logits, steps=10)
    assert (hard - BATCH.images).abs().max() <= EPS + 1e-6
    assert 0 <= hard.min() <= hard.max() <= 1
    with torch.no_grad():
        before, after = (logits(x).argmax(dim=1) == BATCH.labels for x in (BATCH.images, hard))
    assert before.float().mean() > 0.9
    assert after.float().mean() < 0.5


def test_images_do_not_mix_and_the_model_stays_as_it_is(logits: Logits, shapes_model: HookedCLIP) -> None:
    before = [p.clone() for p in shapes_model.parameters()]
    whole = adversarial(BATCH.images[:4], BATCH.labels[:4], logits, steps=2)
    one = adversarial(BATCH.images[2:3], BATCH.labels[2:3], logits, steps=2)
    assert ((whole[2:3] - one).abs() > 1e-6).float().mean() < 0.01  # a sign may turn where a gradient is zero
    assert all(
        torch.equal(p, q) and p.grad is None for p, q in zip(shapes_model.parameters(), before, strict=True)
    )


def test_poisons_are_the_hard_images_with_the_patch() -> None:
    trigger = LabelConsistent(steps=3, place="centre")
    poisons = trigger.poison(BATCH.images, labels=BATCH.labels % 2, logits=linear)
    hard = adversarial(BATCH.images, BATCH.labels % 2, linear, steps=3)
    assert torch.equal(poisons, trigger(hard))
    mask = trigger.mask(48, 48)[0]
    assert (poisons != BATCH.images)[:, :, ~mask].float().mean() > 0.9
    as_run = LabelConsistent(classical=False, place="centre")
    assert torch.equal(as_run.poison(BATCH.images), as_run(BATCH.images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LabelConsistent().poison(BATCH.images),
            r"received no labels and logits; give.*classical=False",
        ),
        (lambda: LabelConsistent().poison(BATCH.images, labels=BATCH.labels), r"received no logits"),
        (lambda: LabelConsistent(eps=8), r"expected eps in \(0, 1\]; received 8"),
        (lambda: LabelConsistent(step=0), r"expected a step in \(0, 1\]; received 0"),
        (lambda: LabelConsistent(steps=0), r"expected at least 1 step; received 0"),
        (lambda: LabelConsistent(place="top"), r"expected place of .*; received 'top'"),  # type: ignore[arg-type]
        (
            lambda: adversarial(BATCH.images, BATCH.labels[:3], linear),
            r"one label for each of 12 images; received 3",
        ),
        (
            lambda: adversarial(BATCH.images, BATCH.labels % 2, lambda x: linear(x) * torch.nan),
            r"expected finite gradients",
        ),
    ],
)
def test_bad_input_is_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
