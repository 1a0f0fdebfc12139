# pyright: reportAttributeAccessIssue=false
"""The paper's figures and tables: small runs whose numbers are checked by hand, and both ends of each finding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from analyses.paper import figure1, figure2, figure3, figure4, figure5, figure6, table2, table3, table5
from analyses.study.case import Case
from analyses.study.family import BundledFamily
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.defenses.decomp import DecompRep
from decompclip.evaluation.metrics import auroc
from decompclip.operators.ablation import MeanAblate

FAMILY = BundledFamily("shapes")
TWO = FAMILY.select(("shapes-badnet", "shapes-sig"))
IMAGES = 120


def record(analysis: Any, **options: Any) -> dict[str, Any]:
    config = analysis.Config(images=IMAGES, **options)
    facts = {m.name: {"attack": m.attack, "kind": m.kind, "target": m.target, "seed": m.seed} for m in TWO}
    return {
        "analysis": analysis.__name__.rpartition(".")[2],
        "models": facts,
        "config": dict(vars(config)),
        "found": analysis.run(config, FAMILY, TWO),
    }


@pytest.fixture(scope="module")
def case() -> Case:
    return FAMILY.case(TWO[0], images=IMAGES)


def drawn(analysis: Any, found: dict[str, Any], names: set[str]) -> None:
    """Figures have data, titled axes where there are axes, and tables as many cells in every row."""
    figures = analysis.plot(found)
    assert set(figures) == names
    assert all(figure.data for figure in figures.values())
    for block in analysis.table(found).split("\n\n"):
        rows = [line.count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1


def test_figure1_is_the_operator_by_hand(case: Case) -> None:
    found = record(figure1)
    moments = Moments.of(case.terms("fit"), second=False)
    answers = [
        case.answers(MeanAblate(mlps, moments)(case.terms(p)).features) for p in ("clean", "triggered")
    ]
    assert found["found"]["models"]["shapes-badnet"]["without MLPs"] == case.report(*answers).to_dict()
    drawn(figure1, found, {"rates"})


def test_finding_1_has_two_ends() -> None:
    def report(asr: float, cacc: float = 0.1) -> dict[str, Any]:
        return {"asr": {"value": asr}, "control": {"value": 0.0}, "cacc": {"value": cacc}}

    def model(heads: float, mlps: float) -> dict[str, Any]:
        return {"as it is": report(1.0, 1.0), "without heads": report(heads), "without MLPs": report(mlps)}

    facts = {"a": {"kind": "local, structured"}, "b": {"kind": "global, noise"}}
    crossing = {"models": {"a": model(0.1, 1.0), "b": model(1.0, 0.1)}}
    assert "Finding 1 holds" in figure1.finding({"models": facts, "found": crossing})
    same = {"models": {"a": model(0.1, 0.1), "b": model(1.0, 0.1)}}
    assert "Finding 1 does not hold" in figure1.finding({"models": facts, "found": same})
    for rows in crossing["models"].values():  # what does not carry the class says nothing, however it looks
        rows["without heads"]["cacc"]["value"] = 0.9
    said = figure1.finding({"models": facts, "found": crossing})
    assert "Finding 1 cannot be tested in its first half" in said
    for rows in crossing["models"].values():
        rows["without MLPs"]["cacc"]["value"] = 0.9
    assert "Finding 1 cannot be tested here" in figure1.finding({"models": facts, "found": crossing})
    for rows in crossing["models"].values():
        rows["without heads"]["cacc"]["value"] = 0.1
    said = figure1.finding({"models": facts, "found": crossing})
    assert "shows in its first half" in said and "cannot be tested in its second" in said
    alone = {"models": {"a": model(0.1, 1.0)}}
    assert "No global trigger" in figure1.finding({"models": facts, "found": alone})


def test_sweeps_end_where_everything_of_a_kind_is_ablated(case: Case) -> None:
    found = record(figure2, mmd_images=40)
    model = found["found"]["models"]["shapes-badnet"]
    whole = figure1.run(figure1.Config(images=IMAGES), FAMILY, TWO[:1])["models"]["shapes-badnet"]
    for kind, setting in (("heads", "without heads"), ("mlps", "without MLPs")):
        sweeps = model["sweeps"][kind]
        assert sweeps["forward"][-1] == sweeps["backward"][0]
        assert sweeps["forward"][0] == sweeps["separate"][0]
        assert sweeps["backward"][-1] == sweeps["separate"][-1]
        assert sweeps["forward"][-1]["asr"] == pytest.approx(100 * whole[setting]["asr"]["value"], abs=1e-2)
    for estimate in ("paper", "unbiased"):
        assert {len(values) for values in model["mmd"][estimate].values()} == {case.terms("clean").n_layers}
    for level in figure2.plot(found)["asr"].data:
        if level.hovertemplate and level.hovertemplate.startswith("before"):
            assert level.y[0] in {m["before"]["asr"] for m in found["found"]["models"].values()}
    drawn(figure2, found, {"asr", "cacc", "mmd"})
    assert "Finding 2" in figure2.finding(found)
    assert "cannot be tested, as without all heads" in figure2.finding(found)


def test_figure3_keeps_maps_of_what_is_drawn_alone() -> None:
    found = record(figure3, n_texts=3, draw=("BadNet",))
    models = found["found"]["models"]
    assert "maps" in models["shapes-badnet"] and "maps" not in models["shapes-sig"]
    maps = np.array(models["shapes-badnet"]["maps"])
    assert maps.shape == (8, 2, 6, 6)
    assert 1 <= len(models["shapes-badnet"]["marked"]) <= 4  # a patch of 7 pixels on a grid of 8
    drawn(figure3, found, {"badnet"})
    assert "of the last layer's MMD" in figure3.finding(found)
    with pytest.raises(ValueError, match=r"expected an example in 0\.\.\d+; received 9999"):
        record(figure3, example=9999, draw=("BadNet",))


def test_figure4_has_a_row_a_layer() -> None:
    found = record(figure4, n_texts=3, draw=("BadNet",))
    assert [row["layer"] for row in found["found"]["models"]["shapes-sig"]] == list(range(6))
    assert figure4.table(found).count("`shapes-badnet`") == 6
    drawn(figure4, found, {"mlps"})
    kept = {"models": {"m": [{"halves": 0.7, "similarity": 0.7}]}}
    assert "change, as Finding 3 says, does not show" in figure4.finding({"found": kept})
    lost = {"models": {"m": [{"halves": 0.7, "similarity": 0.5}]}}
    assert "change, as Finding 3 says, shows" in figure4.finding({"found": lost})


def test_figure5_s_areas_are_of_the_similarities(case: Case) -> None:
    found = record(figure5, draw=("SIG",))
    prototypes = case.terms("fit").heads[:, -1].mean(0)
    sims = [
        torch.nn.functional.cosine_similarity(case.terms(p).heads[:, -1], prototypes, dim=-1)[case.others]
        for p in ("clean", "triggered")
    ]
    expected = [auroc(-sims[0][:, h], -sims[1][:, h]) for h in range(8)]
    measured = found["found"]["models"]["shapes-badnet"]["cosine"]
    assert measured["auroc"] == pytest.approx(expected, abs=1e-3)
    assert all(0 <= overlap <= 1 for overlap in measured["overlap"])
    apart = max(range(8), key=lambda h: abs(expected[h] - 0.5))
    assert measured["overlap"][apart] == min(
        measured["overlap"]
    )  # the head that tells them best overlaps least
    density = found["found"]["models"]["shapes-sig"]["dot"]["densities"][0]
    assert np.trapezoid(density["clean"], density["x"]) == pytest.approx(1, abs=0.15)
    drawn(figure5, found, {"sig-cosine", "sig-dot"})


def test_figure6_replaces_more_heads_with_every_step(case: Case) -> None:
    found = record(figure6, epsilons=(0.001, 0.01, 10.0), quantiles=(0.05, 0.5))
    model = found["found"]["models"]["shapes-badnet"]
    steps = model["epsilon"]
    shares = [step["replaced_clean"] for step in steps]
    assert shares == sorted(shares) and shares[-1] == 100
    assert model["before"]["asr"] == pytest.approx(100 * case.report_of(None)["asr"]["value"], abs=1e-2)
    half = model["quantile"][1]["replaced_clean"]
    assert model["quantile"][0]["replaced_clean"] < half and half == pytest.approx(
        50, abs=12
    )  # of other clean images
    everything = case.report_of(MeanAblate(heads[-1], Moments.of(case.terms("fit"))))
    assert steps[-1]["asr"] == pytest.approx(100 * everything["asr"]["value"], abs=1e-2)
    drawn(figure6, found, {"thresholds"})


def test_table2_s_detectors_are_those_of_the_registry(case: Case) -> None:
    found = record(table2, slow_images=40, detectors=("k-distance", "agnostic"))
    areas = found["found"]["models"]["shapes-sig"]
    assert areas["agnostic"]["auroc"]["value"] > 0.95
    assert abs(areas["k-distance"]["control"]["value"] - 0.5) < 0.25
    drawn(table2, found, {"auroc"})
    assert "order, Decomp-Det above" not in table2.finding(found)  # none of them was measured
    with pytest.raises(ValueError, match=r"expected detectors of STRIP, .*; received 'nose'"):
        table2.Config(detectors=("nose",))


def test_table3_fixes_the_paper_s_heads() -> None:
    assert list(table3.fixed(12).values()) == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    assert list(table3.fixed(8).values()) == [[0, 1, 2], [4, 5, 6], [5, 6, 7]]
    assert list(table3.fixed(3).values()) == [[0, 1, 2]] * 3
    with pytest.raises(ValueError, match=r"at least 3 heads to fix three; received 2"):
        table3.fixed(2)
    found = record(table3)
    rows = found["found"]["models"]["shapes-badnet"]
    assert rows["Decomp-Reverse"]["control"] == rows["No Defense"]["control"]
    drawn(table3, found, {"rates"})


def test_table5_fills_what_is_infected(case: Case) -> None:
    found = record(table5)
    rows = found["found"]["models"]["shapes-badnet"]
    repair = DecompRep.paper().fit(case.terms("fit"))
    assert rows["Decomp-Rep"] == case.report_of(repair)
    zero = DecompRep(epsilon=0.002, convention="paper", fill="zero").fit(case.terms("fit"))
    assert rows["w/ Abandon"] == case.report_of(zero)
    assert (
        rows["w/ Random Prototypes"]["cacc"]["value"]
        < 0.5
        < rows["w/ Random Prototypes, matched"]["cacc"]["value"]
    )
    drawn(table5, found, {"rates"})
