"""A twin is built from its recipe: the same one each time, measured as it is stored."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from decompclip.attacks.patch import BadCLIP
from decompclip.attacks.registry import TRIGGERS, from_card
from decompclip.attacks.whole_image import Blended
from decompclip.data.shapes import Shapes
from decompclip.evaluation.evaluate import evaluate
from decompclip.models.bundled import bundled, card, load_bundled
from decompclip.training.recipes import FineTuning
from decompclip.zoo import build as building
from decompclip.zoo.build import REPRODUCED, build_twin, poisoned_pairs
from decompclip.zoo.recipes import TWINS, WORLDS, PatchRecipe, ShapesWorld, TwinRecipe, twin_recipe

SMALL = TwinRecipe(
    base="shapes",
    trigger=Blended(alpha=0.5),
    pairs=192,
    rate=0.1,
    recipe=FineTuning(epochs=1, batch_size=32, lr=2e-3, optimizer="muon", max_grad_norm=1.0),
)


class SmallWorld(ShapesWorld):
    def validation(self) -> Shapes:
        return Shapes(24, seed=self.validation_seed)

    def report(self) -> Shapes:
        return Shapes(120, seed=self.report_seed)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORLDS, "shapes", SmallWorld())
    monkeypatch.setattr(building, "QUALITY_IMAGES", 16)


@pytest.mark.usefixtures("small")
def test_a_build_is_repeatable_and_its_card_true(tmp_path: Path) -> None:
    first, second = (build_twin("mine", tmp_path / at, recipe=SMALL) for at in ("a", "b"))
    assert first.card["sha256"] == second.card["sha256"]
    assert first.card["weights_sha256"] == second.card["weights_sha256"]
    assert first.bundled is None and first.reproduced is None
    facts = card("mine", tmp_path / "a")
    backdoor = facts["backdoor"]
    assert (backdoor["poisoned_pairs"], backdoor["poison_rate"], backdoor["target"]) == (19, 0.1, "star")
    assert from_card(backdoor["trigger"]) == SMALL.trigger
    assert facts["training"]["seed"] == 0 and facts["training"]["recipe"]["lr"] == 2e-3
    assert 0 < backdoor["quality"]["psnr"] < 20
    model, world = load_bundled("mine", folder=tmp_path / "a"), SmallWorld()
    found = evaluate(model, world.report(), world.classifier(model), SMALL.trigger, world.label)  # type: ignore[arg-type]
    assert found.report.to_dict() == backdoor["results"]
    assert facts["accuracy"]["shape"] == pytest.approx(found.cacc.value, abs=1e-4)


@pytest.mark.usefixtures("small")
def test_another_seed_is_another_twin(tmp_path: Path) -> None:
    clean, world = load_bundled("shapes"), SmallWorld()
    trigger = Blended(alpha=0.5)
    one, other = (poisoned_pairs(replace(SMALL, seed=seed), clean, trigger) for seed in (0, 1))
    assert {p.id for p in one.record.poisons}.isdisjoint(p.id for p in other.record.poisons)
    assert world.label == 3


def test_a_build_is_held_to_its_card() -> None:
    def facts(asr: float, cacc: float) -> dict:
        rates = {"asr": asr, "cacc": cacc}
        return {"backdoor": {"results": {k: {"value": v, "low": v, "high": v} for k, v in rates.items()}}}

    built = building.BuiltTwin("x", facts(0.95, 0.99), facts(0.95 + REPRODUCED["asr"] - 0.01, 0.99))
    assert built.reproduced and "reproduced (ASR within 5 points and CACC within 2 points)" in str(built)
    for there in (
        facts(0.95 - REPRODUCED["asr"] - 0.01, 0.99),
        facts(0.95, 0.99 - REPRODUCED["cacc"] - 0.01),
    ):
        built = building.BuiltTwin("x", facts(0.95, 0.99), there)
        assert not built.reproduced and "NOT reproduced" in str(built)


def test_the_recipes_are_those_of_the_bundled_twins() -> None:
    twins = {name for name in bundled() if card(name)["backdoor"]}
    assert twins == set(TWINS)
    for name in twins:
        facts, recipe = card(name), twin_recipe(name)
        about = facts["training"]
        assert about["recipe"] == {**recipe.card()["recipe"], "betas": list(recipe.recipe.betas)}
        assert (about["base"], about["seed"], about["pairs"]) == (recipe.base, recipe.seed, recipe.pairs)
        trigger = from_card(facts["backdoor"]["trigger"])
        if isinstance(recipe.trigger, PatchRecipe):
            assert isinstance(trigger, BadCLIP) and trigger.size == recipe.trigger.size
        else:
            assert trigger == recipe.trigger
        assert about["poison_rate"] == recipe.rate <= (0.2 if name == "photos-wanet" else 0.1)


def test_all_attacks_have_a_twin_and_four_kinds_three() -> None:
    of_shapes = [card(name) for name in TWINS if name.startswith("shapes")]
    assert {facts["backdoor"]["trigger"]["name"] for facts in of_shapes} == set(TRIGGERS)
    stems = ("badnet", "badnet-noise", "blended", "blended-noise")
    for base, stem in product(("shapes", "photos"), stems):
        seeds = {card(f"{base}-{stem}{end}")["training"]["seed"] for end in ("", "-1", "-2")}
        assert seeds == {0, 1, 2}
    with pytest.raises(ValueError, match=r"expected a twin among shapes-badnet.*received 'shapes-rain'"):
        twin_recipe("shapes-rain")


def test_what_is_trained_on_is_neither_looked_at_nor_reported() -> None:
    world = ShapesWorld()
    used = {world.pairs_seed + recipe.seed for recipe in TWINS.values()}
    assert used.isdisjoint({world.validation_seed, world.report_seed})
    drawn = world.pairs(8, 0).read(range(8)).images
    for other in (world.validation(), world.report()):
        assert not torch.equal(drawn, other.draw(range(8)).images)
