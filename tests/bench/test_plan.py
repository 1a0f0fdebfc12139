"""A plan that cannot be carried out is refused before anything is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decompclip.bench.plan import NEEDED, Plan, base_of, default_models
from decompclip.bench.run import attack_of
from decompclip.defenses.detectors.detector import learnt


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
    assert learning == needed // 2 == (64 if detector == "STRIP" else 33)


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
