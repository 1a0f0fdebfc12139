# pyright: reportAttributeAccessIssue=false
"""Our own questions: effects of a trigger grid by hand, direct beside causal, roles, activations, times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from analyses.benchmarks import throughput
from analyses.questions import (
    base_decomp_gap,
    direct_or_causal,
    infected_set,
    local_or_structured,
    role_change,
)
from analyses.study.family import BundledFamily
from analyses.study.rates import excess
from decompclip.decomposition.components import mlps
from decompclip.decomposition.moments import Moments
from decompclip.models.bundled import load_bundled
from decompclip.operators.ablation import MeanAblate

FAMILY = BundledFamily("shapes")
IMAGES = 120


def record(analysis: Any, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    config, members = analysis.Config(images=IMAGES, **options), FAMILY.select(names)
    return {
        "models": {m.name: {"attack": m.attack, "kind": m.kind, "seed": m.seed} for m in members},
        "config": dict(vars(config)),
        "family": {"title": FAMILY.title},
        "found": analysis.run(config, FAMILY, members),
    }


# Local or structured


CELLS = [(extent, structure) for extent in ("local", "global") for structure in ("structured", "noise")]


def test_effects_are_those_of_a_linear_model() -> None:
    rng = np.random.default_rng(0)
    values = {cell: (i + rng.normal(size=3)).tolist() for i, cell in enumerate(CELLS)}
    found = local_or_structured.effects(values)
    y = np.concatenate([values[cell] for cell in CELLS])
    a = np.repeat([1 if cell[0] == "local" else -1 for cell in CELLS], 3)
    b = np.repeat([1 if cell[1] == "structured" else -1 for cell in CELLS], 3)
    x = np.stack([np.ones(12), a, b, a * b], 1)
    beta, rest, *_ = np.linalg.lstsq(x, y, rcond=None)
    error = np.sqrt(rest[0] / 8 * np.linalg.inv(x.T @ x).diagonal())
    for name, k in (("extent", 1), ("structure", 2), ("both", 3)):
        assert found[name].value == pytest.approx(2 * beta[k])
        assert found[name].high == pytest.approx(2 * (beta[k] + stats.t.ppf(0.975, 8) * error[k]))


def test_the_grid_of_triggers_needs_all_four_kinds() -> None:
    with pytest.raises(ValueError, match=r"fewer of 'local, noise'.*--model-family shapes"):
        record(local_or_structured, ("BadNet", "Blended"))


def test_contributions_and_what_is_left() -> None:
    config = local_or_structured.Config(images=IMAGES, causal_images=IMAGES)
    case = FAMILY.case(FAMILY.select(("shapes-badnet",))[0], images=IMAGES)
    found = local_or_structured.measure(case, config, local_or_structured.energy(case) / 4)
    towards = case.classifier[case.target] - case.classifier[torch.arange(12) != case.target].mean(0)
    moved = (case.terms("triggered", "centred").features - case.terms("clean", "centred").features)[
        case.others
    ]
    whole = float((moved @ towards).mean())
    parts = sum(found["push"]["heads"]) + sum(found["push"]["mlps"])
    # the embedding and the constants are the rest: divided by another length
    assert parts == pytest.approx(whole, abs=0.1 * abs(whole))
    assert found["gap"] == found["left"]["mlps"] - found["left"]["heads"]
    moments = Moments.of(case.terms("fit", "centred"), second=False)
    edits = {
        kind: MeanAblate(parts_of_kind, moments) for kind, parts_of_kind in local_or_structured.PARTS.items()
    }
    for kind, edit in edits.items():
        report = case.report_of(edit, "centred")
        assert found["paths"][kind]["left"][-1] == pytest.approx(excess(report), abs=0.01)
        assert found["paths"][kind]["cacc"][0] == pytest.approx(
            100 * case.report_of(None, "centred")["cacc"]["value"]
        )
    assert found["causal"] == found["causal_left"]["mlps"]["left"] - found["causal_left"]["heads"]["left"]
    # a quarter of the energy is half of what the trigger changes
    assert found["mixed"] == pytest.approx(0.5)
    halved = case.decompose((case.clean + case.triggered) / 2, "centred")
    for name, edit in {"as it is": None, **edits}.items():
        ends = (d if edit is None else edit(d) for d in (case.terms("clean", "centred"), halved))
        report = case.report(*(case.answers(d.features) for d in ends)).to_dict()
        assert found["faint_left"][name] == pytest.approx(excess(report), abs=0.01)


def test_all_triggers_are_mixed_down_to_the_faintest(monkeypatch: pytest.MonkeyPatch) -> None:
    members = FAMILY.select(("shapes-badnet", "shapes-badnet-1", "shapes-blended", "shapes-blended-1"))
    members += FAMILY.select(("shapes-badnet-noise", "shapes-badnet-noise-1"))
    members += FAMILY.select(("shapes-blended-noise", "shapes-blended-noise-1"))
    energies = {m.name: place + 3.0 for place, m in enumerate(members)}
    monkeypatch.setattr(local_or_structured, "energy", lambda case: energies[case.member.name])
    monkeypatch.setattr(local_or_structured, "measure", lambda case, config, faintest: faintest)
    config = local_or_structured.Config(images=12)
    found = local_or_structured.run(config, FAMILY, members)
    assert found["models"] == dict.fromkeys(energies, 3.0)


def test_attacks_are_compared_at_the_accuracy_that_the_milder_ablation_leaves() -> None:
    mild = {"cacc": [80.0, 70.0, 60.0], "left": [90.0, 85.0, 82.0]}
    hard = {"cacc": [80.0, 50.0, 10.0], "left": [90.0, 60.0, 0.0]}  # at 60: two thirds of the way to 60
    assert local_or_structured.at_equal_accuracy(mild, hard) == pytest.approx(82 - 70)
    assert local_or_structured.at_equal_accuracy(hard, mild) == pytest.approx(70 - 82)
    assert local_or_structured.at_equal_accuracy(mild, mild) == 0


# Direct or causal


def test_early_mlps_work_through_later_layers() -> None:
    found = record(direct_or_causal, ("shapes-badnet", "shapes-badnet-1"), effect_images=16)
    models = found["found"]["models"]
    assert list(models) == ["shapes-badnet"]  # one model an attack
    components = models["shapes-badnet"]["components"]
    assert len(components) == 6 * 9
    mlps = {c["layer"]: c for c in components if c["kind"] == "mlps"}
    assert abs(mlps[0]["causal"]) > 10 * abs(mlps[0]["direct"])
    assert models["shapes-badnet"]["all heads, causal"]["cacc"]["value"] < 0.5
    assert models["shapes-badnet"]["all heads, direct"]["cacc"]["value"] > 0.8
    figures = direct_or_causal.plot(found)
    assert set(figures) == {"components", "rates"}
    assert sum(len(t.x) for t in figures["components"].data if t.mode == "markers") == len(components)
    assert direct_or_causal.by_layer(found).count("\n") == 1 + 6
    assert "the direct effect cannot stand for the causal one" in direct_or_causal.finding(found)


def test_correlations_of_what_does_not_vary_are_none() -> None:
    parts = [{"direct": 1.0, "causal": float(i)} for i in range(5)]
    assert direct_or_causal.correlation(parts) is None
    parts = [{"direct": float(i), "causal": 2.0 * i} for i in range(5)]
    assert direct_or_causal.correlation(parts) == pytest.approx(1)


# Roles


def test_roles_are_of_the_last_heads_and_late_mlps() -> None:
    found = record(role_change, ("shapes-badnet",), n_texts=3, draws=20)
    rows = found["found"]["models"]["shapes-badnet"]
    assert [(r["kind"], r["layer"]) for r in rows] == [("heads", 5)] * 8 + [
        ("mlps", layer) for layer in range(1, 6)
    ]
    assert all(0 <= r[key] <= 1 for r in rows for key in ("explained", "explained_halves"))
    assert set(role_change.plot(found)) == {"change"}
    assert "of 3 |" in role_change.table(found)


def test_finding_3_has_two_ends() -> None:
    """Late MLPs change, and some heads keep their roles while others do not; else it does not show."""

    def model(heads: tuple[float, ...], mlps: float) -> list[dict[str, Any]]:
        return [
            {
                "kind": kind,
                "similarity": 0.7 - lost,
                "similarity_halves": 0.7,
                "explained": 0.5,
                "explained_halves": 0.5,
            }
            for kind, lost in (*(("heads", x) for x in heads), ("mlps", mlps))
        ]

    def said_of(heads: tuple[float, ...], mlps: float) -> str:
        models = {name: model(heads, mlps + 0.01 * i) for i, name in enumerate("abc")}
        facts = {name: {"kind": "local, noise"} for name in "abc"}
        return role_change.finding({"models": facts, "found": {"models": models}})

    mixed = said_of((0.0, 0.04, 0.3), 0.3)
    assert "6 of 9 heads keep their role" in mixed and "3 change it" in mixed
    assert "Finding 3, shows" in mixed
    assert "Finding 3, does not show" in said_of((0.0, 0.0, 0.0), 0.3)
    assert "Finding 3, does not show" in said_of((0.3, 0.3, 0.3), 0.3)
    assert "Finding 3, does not show" in said_of((0.0, 0.04, 0.3), -0.01)


# The gap of Base-Decomp, and times


def test_another_activation_is_another_model() -> None:
    from decompclip.diagnosis.trials import with_activation

    found = record(base_decomp_gap, ("shapes-badnet",))
    rows = found["found"]["models"]["shapes-badnet"]
    assert rows["sum of terms"] == rows["as trained"]
    assert rows["sum_error"] < 1e-5 and rows["activation"] == "gelu"
    model = load_bundled("shapes-badnet")
    pixels = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(
        model.encode_image(pixels), with_activation(model, "quick_gelu").encode_image(pixels), rtol=1e-3
    )
    assert "loses 0.00 points of CACC" in base_decomp_gap.finding(found)


def test_times_are_ratios_to_a_plain_forward() -> None:
    config = throughput.Config(images=16, fit_images=130, rounds=3)
    members = FAMILY.select(("shapes-badnet",))
    found = {"config": vars(config), "found": throughput.run(config, FAMILY, members)}
    ratios = found["found"]["models"]["shapes-badnet"]
    assert ratios[throughput.PLAIN] == [1.0] * 3
    assert ratios["decompose"][0] > 0.5
    assert throughput.table(found).count("\n") == 1 + 4
    with pytest.raises(ValueError, match=r"at least 3 rounds.*received 2"):
        throughput.Config(rounds=2)


# Infected set


def test_the_strongest_contribute_and_carry_the_backdoor() -> None:
    found = record(infected_set, ("shapes-sig",), sizes=(0, 8, 54), draws=2)
    model = found["found"]["models"]["shapes-sig"]
    assert len(model["order"]) == len(set(model["order"])) == model["components"] == 54
    before, eight, _ = infected_set.excesses(model, "strongest")
    assert before > 90 and eight < before - 40
    assert infected_set.excesses(model, "others")[1] > before - 10
    assert model["others"][2] == model["others"][0]  # nothing else is left to draw from
    assert infected_set.half(model, [0, 8, 54]) == 8
    assert model["as_costly"] is None  # of a set of all
    assert set(infected_set.plot(found)) == {"sizes"}
    assert "hold both heads and MLPs in 1 of 1 models" in infected_set.finding(found)
    assert "| SIG | global, structured |" in infected_set.table(found)


def test_the_others_leave_the_backdoor_even_all_of_them() -> None:
    model = record(infected_set, ("shapes-badnet",), sizes=(0, 16), draws=2)["found"]["models"][
        "shapes-badnet"
    ]
    costly, strongest = model["as_costly"], model["strongest"][1]
    assert costly["components"] == 38  # all: in this small model the strongest carry the classes too
    assert strongest["cacc"] < costly["cacc"] <= model["strongest"][0]["cacc"]
    assert infected_set.left_of(costly) > infected_set.left_of(strongest) + 50


@pytest.mark.parametrize(
    ("accuracies", "taken"), [((9, 8, 7, 5, 4), 3), ((9, 8, 7, 7, 7), 4), ((6, 5, 4, 3, 2), 0)]
)
def test_as_many_others_are_taken_as_cost_enough(accuracies: tuple[int, ...], taken: int) -> None:
    parts = [mlps[layer] for layer in range(4)]
    found = infected_set.as_costly(lambda some: {"cacc": accuracies[len(some)]}, parts, 6)
    less = float(accuracies[taken] > 6)
    assert found == {"cacc": accuracies[taken], "components": taken, "all_cost_less": less}


def test_components_are_ordered_by_their_contribution() -> None:
    case = FAMILY.case(FAMILY.select(("shapes-badnet",))[0], images=IMAGES)
    order = infected_set.ordered(case)
    others = torch.arange(12) != case.target
    toward = case.classifier[case.target] - case.classifier[others].mean(0)
    clean = case.terms("fit")
    twins = case.member.trigger(case.fit, infected_set.FRESH + torch.arange(IMAGES))
    triggered = case.model.decompose(case.model.normalize(twins), convention="paper", normalize=True)
    moved = triggered.mlps.mean(0) - clean.mlps.mean(0)
    mlps = [part.layer for part in order if part.kind == "mlps"]
    assert mlps == (moved @ toward).argsort(descending=True).tolist()


@pytest.mark.parametrize("sizes", [(), (1, 2), (0, 4, 2), (0, 0)])
def test_sizes_of_sets_rise_from_nothing(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising sizes from 0"):
        infected_set.Config(sizes=sizes)
