"""TEXTSPAN's words against probes, on the bundled model: the number in the README, small."""

from __future__ import annotations

import pytest

import decompclip
from analyses.questions.head_words import Config, agreements, chance, photo_texts, photo_vocabulary, table
from decompclip.operators.naming import Agreement, named_property

SMALL = Config(models=("shapes",), images=300)


@pytest.fixture(scope="module")
def found() -> dict[str, Agreement]:
    return dict(agreements(decompclip.load("shapes"), SMALL))


def test_words_name_what_explains_a_component(found: dict[str, Agreement]) -> None:
    """Far above what the frequencies of the properties alone would give."""
    explained = found["explained"]
    assert len(explained.parts) >= 40  # of 54 heads and MLPs
    assert explained.interval[0] > chance(explained) + 0.15
    assert explained.kappa > 0.4


def test_chance_is_that_of_cohen_s_kappa(found: dict[str, Agreement]) -> None:
    for agreement in found.values():
        level = chance(agreement)
        assert agreement.kappa == pytest.approx((agreement.share - level) / (1 - level))


def test_the_table_has_a_row_a_model_and_truth(found: dict[str, Agreement]) -> None:
    lines = table({("shapes", by): agreement for by, agreement in found.items()}).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "share of variance" in lines[2] and f"{found['explained'].kappa:.2f} |" in lines[2]


@pytest.mark.parametrize("name", ["colour", "brightness", "position", "size", "kind"])
def test_texts_of_photographs_name_their_property_and_no_other(name: str) -> None:
    vocabulary = photo_vocabulary()
    pool = photo_texts(vocabulary, ["goldfish", "pizza"])
    own = photo_texts({name: vocabulary[name]}, [])
    assert set(own) < set(pool)
    assert named_property(own, vocabulary, pool=pool).property == name
