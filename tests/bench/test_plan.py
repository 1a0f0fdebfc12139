"""Plans are checked before anything is measured; images to fit on and to measure on are different ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decompclip.attacks.whole_image import Blended
from decompclip.bench.plan import (
    EVALUATION,
    FIT,
    FRESH,
    MOST_SEEDS,
    NEEDED,
    Plan,
    Samples,
    base_of,
    default_models,
    draw_samples,
)
from decompclip.bench.run import attack_of
from decompclip.data.pairs import SubsetPairs
from decompclip.data.shapes import Shapes, ShapesPairs
from decompclip.defenses.detectors.detector import learnt
from decompclip.zoo.recipes import WORLDS, Cifar10World


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("shapes", "nobody")}, "expected a model among .*shapes-sig.*; received 'nobody'"),
        ({"detectors": ("SLOFF",)}, "expected a detector among STRIP, .*; received 'SLOFF'"),
        ({"repairs": ("all",)}, "expected a repair among none, .*; received 'all'"),
        ({"models": ()}, "expected models, seeds, and detectors or repairs to measure; received none"),
        ({"detectors": (), "repairs": ()}, "expected models, seeds, and detectors or repairs"),
        ({"seeds": ()}, "expected models, seeds"),
        ({"models": ("shapes", "shapes")}, "expected each model once; received 'shapes' 2 times"),
        ({"seeds": (1, 1)}, "expected each seed once; received 1, 1"),
        ({"seeds": (100,)}, r"expected a seed in 0\.\.99; received 100"),
        ({"images": 39}, "expected at least 40 images of each kind; received 39"),
        ({"draws": 1}, "expected at least 2 draws of the images to fit on, .*; received 1"),
        ({"slow_images": 0}, "expected at least 40 slow images of each kind; received 0"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"models": ("shapes",), **options})


@pytest.mark.parametrize(("detector", "needed"), NEEDED.items())
def test_images_that_do_not_do_for_a_detector_are_refused_before_it_runs(detector: str, needed: int) -> None:
    options: dict[str, Any] = {"models": ("shapes",), "detectors": (detector,), "slow_images": needed}
    with pytest.raises(
        ValueError, match=rf"at least {needed} images to fit {detector} on.*received {needed - 1}"
    ):
        Plan(images=needed - 1, **options).check_enough()
    Plan(images=needed, **options).check_enough()
    half = torch.arange(needed)
    learning = int(learnt(half).sum())
    assert learning == needed // 2 == {"STRIP": 64, "token": 50}.get(detector, 33)


def test_every_model_with_every_seed() -> None:
    plan = Plan(models=("shapes", "shapes-sig"), seeds=(0, 2))
    assert plan.jobs == [("shapes", 0), ("shapes", 2), ("shapes-sig", 0), ("shapes-sig", 2)]


def test_slow_detectors_never_see_more_images_than_the_others() -> None:
    plan = Plan(models=("shapes",), images=100)
    assert plan.images_of("STRIP") == plan.images_of("LID") == 100
    assert Plan(models=("shapes",)).images_of("TeCo") == 200


def test_the_zoo_of_shapes_by_default() -> None:
    models = default_models()
    assert "shapes" in models and "shapes-wanet" in models and "cifar10" not in models
    assert {base_of(name) for name in models} == {"shapes"}


@pytest.mark.parametrize(
    ("model", "attack"),
    [("shapes", None), ("shapes-blended", "shapes-blended"), ("shapes-blended-2", "shapes-blended")],
)
def test_twins_of_several_seeds_share_an_attack(model: str, attack: str | None) -> None:
    assert attack_of(model) == attack


WORLD = WORLDS["shapes"]


def rows(*parts: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for part in parts for image in part]


def test_no_image_serves_twice() -> None:
    drawn = [draw_samples(WORLD, images=20, seed=seed) for seed in (0, 1)]
    every = rows(*(part for s in drawn for part in (s.fit, s.clean, s.other)))
    assert len(set(every)) == len(every) == 2 * 3 * 20


def test_streams_are_those_that_were_fixed() -> None:
    found = draw_samples(WORLD, images=6, seed=3)
    evaluation = Shapes(12, seed=EVALUATION + 3).draw(range(12))
    assert torch.equal(found.fit, Shapes(6, seed=FIT + 3).draw(range(6)).images)
    assert torch.equal(torch.cat([found.clean, found.other]), evaluation.images)
    assert torch.equal(torch.cat([found.labels, found.other_labels]), evaluation.labels)


def test_the_first_images_do_not_depend_on_their_number() -> None:
    few, many = (draw_samples(WORLD, images=n, seed=0) for n in (5, 9))
    assert torch.equal(many.first(5).fit, few.fit)
    assert torch.equal(many.first(5).clean, few.clean)


def test_triggered_images_are_of_other_classes_and_their_draws_fresh() -> None:
    samples = draw_samples(WORLD, images=40, seed=0)
    trigger, target = Blended(redraw=True), int(samples.labels[0])
    others = (samples.labels != target).nonzero()[:, 0]
    triggered = samples.triggered(trigger, target)
    assert 0 < len(triggered) == len(others) < 40
    assert torch.equal(triggered[2:3], trigger(samples.clean[others[2:3]], [FRESH + int(others[2])]))
    assert not torch.equal(triggered[2:3], trigger(samples.clean[others[2:3]], [int(others[2])]))


class SmallPhotographs(Cifar10World):
    """Shapes in the place of photographs."""

    def _part(self, places: range) -> SubsetPairs:
        return SubsetPairs(ShapesPairs(60, seed=5), places)

    def validation(self) -> SubsetPairs:
        return self._part(range(20))

    def report(self) -> SubsetPairs:
        return self._part(range(20, 60))


def test_photographs_to_fit_on_are_validation_and_to_measure_on_the_test_part() -> None:
    world = SmallPhotographs()
    found = draw_samples(world, images=20, seed=1)
    fit, evaluation = (part.read(range(len(part))) for part in (world.validation(), world.report()))
    assert set(rows(found.fit)) == set(rows(evaluation.images[:0], fit.images))
    assert set(rows(found.clean, found.other)) == set(rows(evaluation.images))
    labels = dict(zip(rows(evaluation.images), evaluation.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert [labels[row] for row in rows(found.clean)] == found.labels.tolist()
    again, other = (draw_samples(world, images=20, seed=seed) for seed in (1, 2))
    assert torch.equal(again.clean, found.clean) and not torch.equal(other.clean, found.clean)


def test_draws_share_no_image_and_begin_with_the_one_that_detectors_see() -> None:
    for world, images in ((WORLD, 12), (SmallPhotographs(), 10)):
        found = draw_samples(world, images=images, seed=1, draws=4)
        every = rows(*found.fits, found.clean, found.other)
        assert len(set(every)) == len(every) == 6 * images
        assert torch.equal(found.fit, draw_samples(world, images=images, seed=1).fit)


@pytest.mark.parametrize(("images", "draws"), [(21, 1), (15, 3)])
def test_more_photographs_than_there_are(images: int, draws: int) -> None:
    with pytest.raises(
        ValueError, match=rf"expected at most 20 images .* {images} were asked for; lower --count"
    ):
        draw_samples(SmallPhotographs(), images=images, seed=0, draws=draws)


@pytest.mark.parametrize("seed", [-1, MOST_SEEDS])
def test_a_seed_whose_streams_are_another_ones(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a seed in 0\.\.99; received {seed}"):
        draw_samples(WORLD, images=5, seed=seed)


def test_a_world_without_a_rule() -> None:
    world: Any = type("Other", (), {"base": "other"})()
    with pytest.raises(ValueError, match="expected a world among shapes, cifar10, photos; received 'other'"):
        draw_samples(world, images=5, seed=0)


def test_first_keeps_labels_with_images() -> None:
    labels = torch.arange(4)
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = Samples((images,), images, images, labels, labels).first(2)
    assert len(found.fit) == 2
    assert found.labels.tolist() == found.other_labels.tolist() == [0, 1]
