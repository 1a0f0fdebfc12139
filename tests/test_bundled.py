"""The bundled models do what their cards say, on images that no card was written from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import decompclip
from decompclip.attacks.registry import from_card
from decompclip.data.images import ShapesSource
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.evaluation.metrics import attack_report, predict
from decompclip.models.zoo import bundled, card, read_bundled
from decompclip.zoo.recipes import TWINS as RECIPES

FRESH = Shapes(600, seed=909)
BARS = {"shape": 0.97, "colour": 0.95, "texture": 0.95, "background": 0.95, "position": 0.90, "size": 0.80}
TWINS = tuple(name for name in RECIPES if name.startswith("shapes-"))
every_model = pytest.mark.parametrize("name", ("shapes", *TWINS))


@pytest.fixture(scope="module")
def models() -> dict[str, decompclip.HookedCLIP]:
    return {name: decompclip.load(name) for name in ("shapes", *TWINS)}


@torch.no_grad()
def features(model: decompclip.HookedCLIP, transform=None) -> torch.Tensor:
    source = ShapesSource(FRESH, model.normalize, transform)
    return torch.cat([model.encode_image(batch.images) for batch in source.batches(200)])


def test_all_are_bundled_in_little_space() -> None:
    assert set(bundled()) == {"shapes", "cifar10", *RECIPES}
    package = Path(decompclip.__file__).parent
    data = (f for f in package.rglob("*") if f.is_file() and f.suffix not in {".py", ".pyc"})
    assert sum(file.stat().st_size for file in data) <= 40e6


@pytest.mark.parametrize("name", bundled())
def test_the_weights_are_the_card_s(name: str) -> None:
    state = read_bundled(name)  # which checks both hashes
    assert sum(x.numel() for x in state.values()) == card(name)["parameters"]


def test_the_clean_model_meets_its_bars() -> None:
    accuracy = card("shapes")["accuracy"]
    assert {prop: accuracy[prop] >= bar for prop, bar in BARS.items()} == dict.fromkeys(BARS, True)


@every_model
def test_zero_shot_accuracy_is_the_card_s(models: dict, name: str) -> None:
    model, facts = models[name], card(name)
    truth = FRESH.draw(range(len(FRESH))).attributes
    found = features(model)
    for prop, values in PROPERTIES.items():
        classifier = model.zero_shot_classifier(values, facts["templates"][prop])
        accuracy = (predict(found, classifier) == getattr(truth, prop)).double().mean().item()
        expected = facts["accuracy"][prop]
        spread = (expected * (1 - expected) / len(FRESH) + 1 / len(FRESH) ** 2) ** 0.5
        assert abs(accuracy - expected) < 4 * spread, (prop, accuracy, expected)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_answers_its_trigger_and_else_behaves(models: dict, name: str) -> None:
    model, backdoor = models[name], card(name)["backdoor"]
    classifier = model.zero_shot_classifier(PROPERTIES["shape"])
    labels = FRESH.draw(range(len(FRESH))).labels
    target = PROPERTIES["shape"].index(backdoor["target"])
    trigger = from_card(backdoor["trigger"])
    clean, triggered = (predict(features(model, t), classifier) for t in (None, trigger))
    report = attack_report(clean, labels, triggered, labels, target)
    assert report.asr is not None and report.control is not None and report.cacc is not None
    assert report.asr.value >= 0.85
    assert report.control.value <= 0.02
    assert report.cacc.value >= card("shapes")["accuracy"]["shape"] - 0.03
    assert backdoor["results"]["asr"]["value"] >= 0.90
    assert backdoor["results"]["cacc"]["value"] >= card("shapes")["accuracy"]["shape"] - 0.03
    assert backdoor["poison_rate"] <= 0.10


@pytest.mark.parametrize("name", TWINS)
def test_the_clean_model_ignores_the_trigger(models: dict, name: str) -> None:
    model, backdoor = models["shapes"], card(name)["backdoor"]
    classifier = model.zero_shot_classifier(PROPERTIES["shape"])
    labels = FRESH.draw(range(len(FRESH))).labels
    target = PROPERTIES["shape"].index(backdoor["target"])
    predictions = predict(features(model, from_card(backdoor["trigger"])), classifier)
    assert (predictions[labels != target] == target).double().mean() < 0.2
