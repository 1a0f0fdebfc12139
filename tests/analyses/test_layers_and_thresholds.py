"""Both ends of the findings of figures 2, 5 and 6, on records made up for it."""

from __future__ import annotations

from typing import Any

import pytest

from analyses.paper import figure2, figure5, figure6

LOCAL = {"attack": "A", "kind": "local, structured"}
GLOBAL = {"attack": "B", "kind": "global, noise"}


def steps(*success: float) -> list[dict[str, float]]:
    return [{"asr": value, "control": 0.0, "cacc": 90.0} for value in success]


def sweeps(alone: list[float], backward: list[float], *, cacc: float = 10.0) -> dict[str, Any]:
    """Of three layers; forward ends where backward begins, at the accuracy that is left without all of a kind."""
    return {
        "forward": [*steps(100, 100), steps(backward[0])[0] | {"cacc": cacc}],
        "backward": steps(*backward),
        "separate": steps(*alone),
    }


KEPT = sweeps([100, 100, 100], [100, 100, 100])


def layers(heads: dict[str, Any], mlps: dict[str, Any]) -> dict[str, Any]:
    return {
        "before": steps(100)[0],
        "sweeps": {"heads": heads, "mlps": mlps},
        "mmd": {
            "paper": {"heads": [1.0, 1.0, 2.0], "mlps": [0.0, 0.0, 0.0]},
            "unbiased": {"heads": [1.0, 1.0, 1.0], "mlps": [3.0, -1.0, 1.0]},
        },
    }


def record(**models: tuple[dict[str, str], Any]) -> dict[str, Any]:
    return {
        "models": {name: facts for name, (facts, _) in models.items()},
        "found": {"models": {name: found for name, (_, found) in models.items()}},
        "config": {"epsilons": [0.001, 0.01], "quantiles": [0.1, 0.2], "similarities": ["cosine"]},
    }


def test_finding_2_asks_heads_of_local_and_mlps_of_global_triggers() -> None:
    last = sweeps([100, 100, 20], [10, 15, 20])
    spread = sweeps([100, 100, 90], [0, 50, 90])
    holds = figure2.finding(record(a=(LOCAL, layers(last, KEPT)), b=(GLOBAL, layers(KEPT, spread))))
    assert "under local triggers: hold;" in holds and "80.0 points" in holds and "heads 90.0." in holds
    assert "under global ones: hold; without the last five 100.0 points are lost" in holds
    assert "50 % of the heads' MMD and 0 % of the MLPs'" in holds
    assert "33 and 25 % (an equal share is 33 %)" in holds
    # The same ablations under the other kind of trigger are no support for it.
    swapped = figure2.finding(record(a=(LOCAL, layers(KEPT, spread)), b=(GLOBAL, layers(last, KEPT))))
    assert "under local triggers: do not show" in swapped and "under global ones: do not show" in swapped


def test_mlps_of_which_one_is_enough_are_not_spread() -> None:
    one = sweeps([100, 100, 0], [0, 0, 0])
    assert "under global ones: do not show" in figure2.finding(record(b=(GLOBAL, layers(KEPT, one))))


def test_what_does_not_carry_the_class_cannot_be_tested() -> None:
    last = sweeps([100, 100, 20], [10, 15, 20], cacc=80.0)
    said = figure2.finding(record(a=(LOCAL, layers(last, KEPT))))
    assert "under local triggers: cannot be tested, as without all heads 80.0 of 90.0 %" in said


def test_finding_2_says_which_kind_is_missing() -> None:
    assert "No global trigger among" in figure2.finding(record(a=(LOCAL, layers(KEPT, KEPT))))
    assert "No local trigger among" in figure2.finding(record(b=(GLOBAL, layers(KEPT, KEPT))))


def test_every_attack_counts_once_whatever_its_seeds() -> None:
    last, other = sweeps([100, 100, 0], [0, 0, 0]), {**LOCAL, "attack": "C"}
    found = figure2.finding(
        record(a=(LOCAL, layers(last, KEPT)), c=(other, layers(KEPT, KEPT)), c1=(other, layers(KEPT, KEPT)))
    )
    assert "50.0 (0.0..100.0) points of attack success" in found


def test_figure5_s_median_is_between_the_middle_heads() -> None:
    found = record(a=(LOCAL, {"cosine": {"auroc": [0.9, 0.4, 0.6, 0.7], "overlap": [0.2, 0.4, 0.6, 0.8]}}))
    assert "| cosine | 0.900 | 0.650 | 1.0 of 4 | 0.50 |" in figure5.table(found)
    said = figure5.finding(found)
    assert (
        "local triggers, cosine: best head" in said and "1.0 on the wrong side of 0.5, overlap 0.50" in said
    )
    assert "global" not in said


@pytest.mark.parametrize(("rest", "said"), [(10.0, "matters"), (95.0, "is not what limits")])
def test_figure6_says_whether_epsilon_matters(rest: float, said: str) -> None:
    sweep = steps(100, rest)
    assert f"threshold {said}" in figure6.finding(record(a=(LOCAL, both(sweep))))
    assert "Without repair attack success over its control is 100.0" in figure6.finding(
        record(a=(LOCAL, both(sweep)))
    )


def both(sweep: list[dict[str, float]]) -> dict[str, Any]:
    """The same sweep along epsilons and quantiles."""
    return {"before": steps(100)[0], "epsilon": sweep, "quantile": sweep}


def test_an_epsilon_that_costs_too_much_is_not_the_best() -> None:
    cheap, dear = steps(60, 0)
    assert "leaves 60.0 points" in figure6.finding(record(a=(LOCAL, both([cheap, dear | {"cacc": 84.0}]))))
    assert "leaves 0.0 points" in figure6.finding(record(a=(LOCAL, both([cheap, dear | {"cacc": 86.0}]))))
    low_first = [cheap | {"cacc": 40.0}, dear | {"cacc": 90.0}, dear | {"cacc": 36.0}]
    assert figure6._best(low_first) == 1


def test_figure5_draws_no_cosine_past_one() -> None:
    kde = {"x": [-1.1, 0.0, 1.0, 1.2], "clean": [0.1, 1.0, 2.0, 0.5], "triggered": [0.0, 2.0, 1.0, 0.2]}
    found = {"auroc": [0.5], "overlap": [0.5], "densities": [kde]}
    cosine, dot = (figure5._panels(found, *figure5.UNITS[of]) for of in ("cosine", "dot"))
    assert [(tuple(t.x), tuple(t.y)) for t in cosine.data] == [((0, 1), (1, 2)), ((0, 1), (2, 1))]
    assert [len(trace.x) for trace in dot.data] == [4, 4]
