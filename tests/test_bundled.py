"""The bundled models do what their cards say, on images that no card was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import fisher_exact

import decompclip
from decompclip.attacks.registry import from_card
from decompclip.attacks.trigger import Trigger
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.evaluation.metrics import attack_report, predict
from decompclip.intervals import Rate
from decompclip.models.bundled import bundled, card, read_bundled
from decompclip.zoo.recipes import TWINS as RECIPES

FRESH = Shapes(300, seed=909).draw(range(300))
BARS = {"shape": 0.97, "colour": 0.95, "texture": 0.95, "background": 0.95, "position": 0.90, "size": 0.80}
TWINS = tuple(name for name in RECIPES if name.startswith("shapes-"))
every_model = pytest.mark.parametrize("name", ("shapes", *TWINS))


@pytest.fixture(scope="module")
def models() -> dict[str, decompclip.HookedCLIP]:
    return {name: decompclip.load(name) for name in ("shapes", *TWINS)}


@torch.no_grad()
def features(model: decompclip.HookedCLIP, transform: Trigger | None = None) -> torch.Tensor:
    pixels = FRESH.images if transform is None else transform(FRESH.images, FRESH.indices)
    return torch.cat([model.encode_image(model.normalize(part)) for part in pixels.split(50)])


@pytest.fixture(scope="module")
def clean(models: dict[str, decompclip.HookedCLIP]) -> dict[str, torch.Tensor]:
    """Each model's features of the fresh images."""
    return {name: features(model) for name, model in models.items()}


def agrees(found: Rate, count: int, total: int, comparisons: int) -> bool:
    """Whether two samples can be of one rate: Fisher's exact test, at 5 % for all comparisons together."""
    table = [[found.count, found.total - found.count], [count, total - count]]
    tested: Any = fisher_exact(table)
    return tested.pvalue > 0.05 / comparisons


def test_all_are_bundled_in_little_space() -> None:
    assert set(bundled()) == {"shapes", "cifar10", "photos", *RECIPES}
    package = Path(decompclip.__file__).parent
    data = (f for f in package.rglob("*") if f.is_file() and f.suffix not in {".py", ".pyc"})
    assert sum(file.stat().st_size for file in data) <= 80e6


@pytest.mark.parametrize("name", bundled())
def test_the_weights_are_the_card_s(name: str) -> None:
    state = read_bundled(name)  # which checks both hashes
    assert sum(x.numel() for x in state.values()) == card(name)["parameters"]


def test_the_clean_model_meets_its_bars() -> None:
    accuracy = card("shapes")["accuracy"]
    assert {prop: accuracy[prop] >= bar for prop, bar in BARS.items()} == dict.fromkeys(BARS, True)


@every_model
def test_zero_shot_accuracy_is_the_card_s(models: dict, clean: dict, name: str) -> None:
    model, facts = models[name], card(name)
    truth = FRESH.attributes
    for prop, values in PROPERTIES.items():
        classifier = model.zero_shot_classifier(values, facts["templates"][prop])
        found = Rate.of(predict(clean[name], classifier) == getattr(truth, prop))
        expected = facts["accuracy"][prop]  # of 5,000 images
        comparisons = len(PROPERTIES) * (1 + len(TWINS))
        assert agrees(found, round(5000 * expected), 5000, comparisons), (prop, str(found), expected)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_s_rates_are_the_card_s(models: dict, clean: dict, name: str) -> None:
    model, backdoor = models[name], card(name)["backdoor"]
    classifier = model.zero_shot_classifier(PROPERTIES["shape"])
    labels = FRESH.labels
    target = PROPERTIES["shape"].index(backdoor["target"])
    triggered = features(model, from_card(backdoor["trigger"]))
    report = attack_report(
        predict(clean[name], classifier), labels, predict(triggered, classifier), labels, target
    )
    for kind in ("asr", "asr_with_target", "control", "cacc"):
        found, stated = getattr(report, kind), backdoor["results"][kind]
        assert agrees(found, stated["count"], stated["total"], 4 * len(TWINS)), (kind, str(found), stated)


@pytest.mark.parametrize("name", TWINS)
def test_a_card_is_of_a_backdoor_that_works_and_does_not_show(name: str) -> None:
    backdoor, accuracy = card(name)["backdoor"], card("shapes")["accuracy"]["shape"]
    assert backdoor["results"]["asr"]["value"] >= 0.90
    assert backdoor["results"]["control"]["value"] <= 0.001
    assert backdoor["results"]["cacc"]["value"] >= accuracy - 0.02
    assert backdoor["poison_rate"] <= 0.10


@pytest.mark.parametrize("name", TWINS)
def test_the_clean_model_ignores_the_trigger(models: dict, name: str) -> None:
    model, backdoor = models["shapes"], card(name)["backdoor"]
    classifier = model.zero_shot_classifier(PROPERTIES["shape"])
    labels = FRESH.labels
    target = PROPERTIES["shape"].index(backdoor["target"])
    predictions = predict(features(model, from_card(backdoor["trigger"])), classifier)
    # up to 8 of 100 with Reflection, whose other picture covers the shape
    assert (predictions[labels != target] == target).double().mean() < 0.1
