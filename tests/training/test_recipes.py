"""Recipes are data, and say no to what makes no training."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from decompclip.training.recipes import RECIPES, FineTuning, recipe_named


def test_the_published_recipes() -> None:
    """docs/method.md, section 5, number by number."""
    paper, badclip, cleanclip = (RECIPES[name] for name in ("paper", "badclip", "cleanclip"))
    for recipe in (paper, badclip, cleanclip):
        assert recipe.betas == (0.9, 0.999)
        assert recipe.weight_decay == 0.1
        assert recipe.logit_scale_max == 4.6052
        assert recipe.optimizer == "adamw"
    assert (paper.lr, paper.epochs, paper.batch_size, paper.loss) == (1e-5, 5, 128, "clip")
    assert (badclip.lr, badclip.epochs, badclip.batch_size, badclip.loss) == (1e-6, 10, 128, "clip")
    assert (cleanclip.lr, cleanclip.epochs, cleanclip.batch_size) == (5e-6, 10, 64)
    assert (cleanclip.loss, cleanclip.ss_weight) == ("cleanclip", 1.0)


def test_a_recipe_goes_through_json() -> None:
    for recipe in RECIPES.values():
        read = json.loads(json.dumps(asdict(recipe)))
        assert FineTuning(**{**read, "betas": tuple(read["betas"])}) == recipe


def test_steps_leave_out_what_fills_no_batch() -> None:
    """The paper's half a million pairs: 3,906 batches an epoch, five times."""
    assert RECIPES["paper"].over(500_000).steps == 5 * 3_906
    assert FineTuning(epochs=3, batch_size=4).over(11).steps == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "siglip"}, r"expected loss of \('clip', 'grouped', 'cleanclip'\); received 'siglip'"),
        ({"precision": "fp16"}, r"expected precision of \('fp32', 'bf16'\); received 'fp16'"),
        ({"optimizer": "sgd"}, r"expected optimizer of \('adamw', 'muon'\); received 'sgd'"),
        ({"epochs": 0}, "expected epochs to be a whole number, at least 1; received 0"),
        ({"epochs": 1.5}, "expected epochs to be a whole number, at least 1; received 1.5"),
        ({"batch_size": 1}, "expected batch_size to be a whole number, at least 2; received 1"),
        ({"lr": 0.0}, r"expected a learning rate above 0 and a warm-up in \[0, 1\); received 0.0 and 0.05"),
        ({"warmup": 1.0}, "received 1e-05 and 1.0"),
    ],
)
def test_what_makes_no_training_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FineTuning(**{"epochs": 1, **options})  # pyright: ignore[reportArgumentType]


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert recipe_named("paper") is RECIPES["paper"]
    with pytest.raises(ValueError, match="one of paper, badclip, cleanclip; received 'clean'"):
        recipe_named("clean")
