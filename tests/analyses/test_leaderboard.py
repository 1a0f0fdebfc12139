"""The committed leaderboard is of the models that are bundled, and its tables say what its runs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analyses.benchmarks import leaderboard
from decompclip.bench.run import weights_of
from decompclip.defenses.detectors import DETECTORS
from decompclip.models.bundled import bundled


def test_it_is_of_the_bundled_weights() -> None:
    board = leaderboard.read()
    assert {r["model"]: r["weights"] for r in board["runs"]} == {name: weights_of(name) for name in bundled()}


def test_it_is_of_the_plans() -> None:
    """Every model's run holds what its plans say, in the order of the registry."""
    wanted: dict[str, dict[str, Any]] = {}
    for plan in leaderboard.plans().values():
        for model, seed in plan.jobs:
            own = wanted.setdefault(model, {"detectors": [], "repairs": []})
            config = plan.config(seed)
            for part in ("detectors", "repairs"):
                own[part] += config.pop(part)
            own |= config
    for run in leaderboard.read()["runs"]:
        own = wanted[run["model"]]
        assert list(run["detectors"]) == [name for name in DETECTORS if name in own["detectors"]]
        assert list(run["repairs"]) == own["repairs"]
        assert run["config"] == own | {"detectors": list(run["detectors"])}


def test_runs_of_one_model_are_joined() -> None:
    fast = {
        "model": "m",
        "detectors": {"TeCo": 1, "agnostic": 2},
        "repairs": {"none": 3},
        "config": {"seed": 0},
        "seconds": 4,
    }
    slow = {"model": "m", "detectors": {"STRIP": 5}, "repairs": {}, "config": {"seed": 0}, "seconds": 6}
    found = leaderboard.joined(fast, slow)
    assert list(found["detectors"].items()) == [("STRIP", 5), ("TeCo", 1), ("agnostic", 2)]
    assert found["repairs"] == {"none": 3} and found["seconds"] == 10
    assert found["config"] == {"seed": 0, "detectors": ["STRIP", "TeCo", "agnostic"]}
    assert leaderboard.joined(None, slow) is slow


def test_tables_hold_means_and_worst_cases() -> None:
    board = leaderboard.read()
    runs = [r for r in board["runs"] if r["base"] == "cifar10" and r["attack"]]
    areas = [r["detectors"]["agnostic"]["auroc"]["value"] for r in runs]
    rows = leaderboard.detection_table(board).splitlines()
    row = next(line for line in rows if line.startswith("| agnostic |"))
    assert f"| {sum(areas) / len(areas):.3f} ({min(areas):.3f}) |" in row
    assert len(rows) == 2 + len(DETECTORS)
    rates = [100 * r["repairs"]["none"]["asr"]["value"] for r in runs]
    row = next(line for line in leaderboard.repair_table(board).splitlines() if line.startswith("| none |"))
    assert f"| {sum(rates) / len(rates):.1f} ({max(rates):.1f}) |" in row


def test_a_missing_board_says_what_measures_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run: python -m analyses\.leaderboard --measure"):
        leaderboard.read(tmp_path)
