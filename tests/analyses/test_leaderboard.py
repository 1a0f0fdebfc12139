"""The committed leaderboard is of the models that are bundled, and its tables say what its runs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses.benchmarks import leaderboard
from decompclip.bench.run import weights_of
from decompclip.models.bundled import bundled


def test_it_is_of_the_bundled_weights() -> None:
    board = leaderboard.read()
    # photos is not measured yet: the slow detectors take hours on a tower of its size
    names = [name for name in bundled() if not name.startswith("photos")]
    assert {r["model"]: r["weights"] for r in board["runs"]} == {name: weights_of(name) for name in names}


def test_tables_hold_means_and_worst_cases() -> None:
    board = leaderboard.read()
    runs = [r for r in board["runs"] if r["base"] == "cifar10" and r["attack"]]
    areas = [r["detectors"]["agnostic"]["auroc"]["value"] for r in runs]
    rows = leaderboard.detection_table(board).splitlines()
    row = next(line for line in rows if line.startswith("| agnostic |"))
    assert f"| {sum(areas) / len(areas):.3f} ({min(areas):.3f}) |" in row
    assert len(rows) == 2 + len(board["detectors"])
    rates = [100 * r["repairs"]["none"]["asr"]["value"] for r in runs]
    row = next(line for line in leaderboard.repair_table(board).splitlines() if line.startswith("| none |"))
    assert f"| {sum(rates) / len(rates):.1f} ({max(rates):.1f}) |" in row


def test_a_missing_board_says_what_measures_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run: python -m analyses\.leaderboard --measure"):
        leaderboard.read(tmp_path)
