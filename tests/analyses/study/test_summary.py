"""Intervals over images and over seeds, and how they are written."""

from __future__ import annotations

import pytest

from analyses.study.rates import excess, rates_table
from analyses.study.summary import by_attack, curve, groups, interval_text, over_models, over_seeds


def rate(value: float, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def record(attacks: dict[str, tuple[str, str]]) -> dict:
    models = {name: {"attack": attack, "kind": kind, "seed": 0} for name, (attack, kind) in attacks.items()}
    report = {"asr": rate(0.9), "control": rate(0.1), "cacc": rate(0.5)}
    return {"models": models, "found": {"models": {name: {"as it is": report} for name in attacks}}}


def test_one_model_has_its_interval_and_several_their_range() -> None:
    assert interval_text(over_seeds([rate(0.5, 0.4, 0.6)])) == "50.0 [40.0, 60.0]"
    assert interval_text(over_seeds([rate(0.5), rate(0.7)])) == "60.0 (50.0..70.0)"


def test_curves_are_means_with_their_range() -> None:
    found = curve([0, 1], [[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [1.0, 3.0]])
    assert (found.y, found.low, found.high, found.thin) == ([2.0, 4.0], [1.0, 2.0], [3.0, 6.0], [0.5, 1.5])
    assert curve([0, 1], [[1.0, 2.0]]).low is None


def test_many_attacks_are_drawn_by_kind() -> None:
    few = record({f"m{i}": (f"attack {i}", "local, noise") for i in range(4)})
    assert list(groups(few)) == [f"attack {i}" for i in range(4)]
    many = record({f"m{i}": (f"attack {i}", "local, noise" if i else "global, noise") for i in range(5)})
    assert list(groups(many)) == ["global, noise (1 model)", "local, noise (4 models)"]
    assert by_attack(many)["attack 3"] == ["m3"]


def test_tables_leave_out_settings_that_no_model_has() -> None:
    found = record({"m": ("BadNet", "local, noise")})
    text = rates_table(found, ("as it is", "CleanCLIP"), {"BadNet": {"as it is": (86.09, 56.72)}})
    assert text.splitlines()[2:] == [
        "| BadNet | local, noise | as it is | 90.0 [0.0, 100.0] | 10.0 [0.0, 100.0] | 50.0 [0.0, 100.0] | 86.09 | 56.72 |"
    ]
    assert excess(found["found"]["models"]["m"]["as it is"]) == pytest.approx(80)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([2.0], "2.0"),
        ([1.0, 3.0], "2.0 (1.0..3.0)"),
        # of 2.5, standard error 0.645, three degrees of freedom: 3.182 of them
        ([1.0, 2.0, 3.0, 4.0], "2.5 [0.4, 4.6]"),
    ],
)
def test_models_are_the_units_and_few_have_no_interval(values: list[float], said: str) -> None:
    assert over_models(values) == said
