"""The page holds every number, needs nothing from outside, and shows names as they are; summaries are means."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_1samp

from decompclip.bench.page import leaderboard, mean_over, means, render
from decompclip.bench.plan import Plan
from decompclip.bench.run import _facts

VOID = {"meta"}


class Checked(HTMLParser):
    """Every element is closed, in order; texts of cells are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data


def parsed(page: str) -> Checked:
    checked = Checked()
    checked.feed(page)
    assert checked.open == []
    return checked


@pytest.fixture(scope="module")
def runs(plan: Plan, measured: dict[str, Any]) -> list[dict[str, Any]]:
    return [_facts("shapes-blended", plan, 0) | measured | {"seconds": 1.0}]


def test_it_opens_and_holds_every_row(runs: list[dict[str, Any]]) -> None:
    page = parsed(render(leaderboard(runs)))
    (run,) = runs
    detection, by_attack, repair, asr, cacc, own_detectors, own_repairs = page.tables
    for table in (detection, by_attack, own_detectors):
        assert [row[0] for row in table[1:]] == list(run["detectors"])
    for table in (repair, asr, cacc, own_repairs):
        assert [row[0] for row in table[1:]] == list(run["repairs"])
    for table in page.tables:
        assert len({len(row) for row in table}) == 1
    rate = run["repairs"]["none"]["asr"]
    text = f"{100 * rate['value']:.1f} [{100 * rate['low']:.1f},\u00a0{100 * rate['high']:.1f}]"
    assert own_repairs[1][own_repairs[0].index("ASR %")] == text
    assert by_attack[0] == ["", "shapes-blended"]


def test_equals_are_best_together(runs: list[dict[str, Any]]) -> None:
    run = json.loads(json.dumps(runs[0]))
    first, second = run["detectors"].values()
    first["auroc"]["value"], second["auroc"]["value"] = 0.99999, 1.0
    assert render(leaderboard([run])).count('class="best">100.0') == 2 * 2  # over all attacks, and by attack


def test_it_needs_nothing_from_outside(runs: list[dict[str, Any]]) -> None:
    page = render(leaderboard(runs))
    assert not re.search(r"(src|href)=[\"'](?!#)|url\(|@import|https?:", page)
    assert "script" not in parsed(page).tags
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and "max-width: 640px" in page


def test_it_says_how_it_was_made(runs: list[dict[str, Any]]) -> None:
    page = render(leaderboard(runs))
    assert runs[0]["weights"] in page and runs[0]["versions"]["torch"] in page


def test_a_clean_model_alone(runs: list[dict[str, Any]]) -> None:
    run = json.loads(json.dumps(runs[0])) | {
        "attack": None,
        "extent": None,
        "structure": None,
        "target": None,
    }
    for cells in run["detectors"].values():
        cells |= {"auroc": None, "tpr": None}
    for cells in run["repairs"].values():
        cells |= {"asr": None, "triggered_accuracy": None}
    page = parsed(render(leaderboard([run])))
    assert page.tables[0][1][1] == "–" and len(page.tables) == 4


def test_detectors_alone_or_repairs_alone(runs: list[dict[str, Any]]) -> None:
    for part in ("detectors", "repairs"):
        assert len(parsed(render(leaderboard([runs[0] | {part: {}}]))).tables) in (3, 4)


def test_names_are_no_markup(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    page = render(leaderboard([runs[0] | {"attack": evil, "model": evil}]))
    assert evil not in page and "&lt;script&gt;" in page
    assert "script" not in parsed(page).tags


def made(attack: str | None, auroc: float, *, seed: int = 0, asr: float = 0.5) -> dict[str, Any]:
    rate = {"value": asr, "low": 0.0, "high": 1.0}
    detector = {
        "auroc": None if attack is None else {"value": auroc, "low": 0.0, "high": 1.0},
        "tpr": None,
        "fpr": rate,
        "control": {"value": 0.5, "low": 0.4, "high": 0.6},
        "cost": 2.0 + seed,
    }
    repair = {"cacc": rate, "control": rate, "asr": attack and rate, "triggered_accuracy": attack and rate}
    return {"attack": attack, "seed": seed, "detectors": {"D": detector}, "repairs": {"R": repair}}


RUNS = [
    made("a", 0.9),
    made("a", 0.7, seed=1),
    made("a", 0.8, seed=2),
    made("b", 0.6, asr=0.1),
    made(None, 0.0, asr=0.2),
]


def test_an_attack_counts_once_however_many_seeds_it_has() -> None:
    board = leaderboard(RUNS)
    assert board["attacks"] == ["a", "b"]
    found = board["detectors"]["D"]["auroc"]
    assert found["attacks"] == pytest.approx({"a": 0.8, "b": 0.6})
    assert found["mean"]["value"] == pytest.approx(0.7)
    assert (found["mean"]["n"], found["clean"]) == (2, None)
    assert found["mean"]["high"] == 1.0  # of two attacks the interval is wide; a rate is none above 1
    assert board["runs"] == RUNS


def test_a_mean_over_fewer_attacks_says_so_and_is_not_the_best() -> None:
    runs = [made("a", 0.7), made("b", 0.6)]
    runs[0]["detectors"]["E"] = runs[0]["detectors"]["D"] | {"auroc": {"value": 0.9, "low": 0.8, "high": 1.0}}
    rows = dict(means(leaderboard(runs)["detectors"], {"auroc": "AUROC %"}, best="auroc").rows)
    assert list(rows) == ["D", "E (1 of 2 attacks)"]
    assert rows["D"][0].best and not rows["E (1 of 2 attacks)"][0].best
    assert rows["E (1 of 2 attacks)"][0].text == "90.0"


def test_clean_models_stand_apart() -> None:
    found = leaderboard(RUNS)["repairs"]["R"]
    assert found["cacc"]["attacks"] == pytest.approx({"a": 0.5, "b": 0.1})
    assert found["cacc"]["clean"] == pytest.approx(0.2)
    assert found["asr"]["clean"] is None


def test_cost_is_no_rate() -> None:
    found = leaderboard(RUNS)["detectors"]["D"]["cost"]["mean"]
    assert found["value"] == pytest.approx((3.0 + 2.0) / 2) and found["high"] > 1
    assert found["low"] == 0.0


def test_intervals_are_students() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    found = mean_over(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert mean_over([0.3]) == {"value": 0.3, "low": None, "high": None, "n": 1}


def test_clean_models_alone_have_no_mean() -> None:
    board = leaderboard(RUNS[-1:])
    assert board["attacks"] == [] and board["detectors"]["D"]["auroc"]["mean"] is None


def test_no_runs() -> None:
    with pytest.raises(ValueError, match="expected at least one run; received none"):
        leaderboard([])
