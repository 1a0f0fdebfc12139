"""`decompclip bench`, from the command line to the page."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from decompclip.bench import run as running
from decompclip.bench.plan import MOST_SEEDS, REPAIRS, SLOW, Plan, default_models
from decompclip.defenses.detectors import DETECTORS
from tests.commands import refused, run, succeeds

command = importlib.import_module("decompclip.cli.bench")  # the package's name is the function's

SMALL = (
    "--models",
    "shapes-blended",
    "--count",
    "70",
    "--detectors",
    "k-distance, Decomp-Det (cosine, quantile)",
)


def test_a_leaderboard_and_again(tmp_path: Path) -> None:
    arguments = (*SMALL, "--repairs", "none", "--out", tmp_path)
    stdout, stderr = succeeds("bench", *arguments)
    board = json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    assert set(board["detectors"]) == {"k-distance", "Decomp-Det (cosine, quantile)"}
    assert set(board["repairs"]) == {"none"}
    (run,) = board["runs"]
    assert run["model"] == "shapes-blended" and run["images"]["fit"] == 70
    assert "none: CACC" in stdout and f"{tmp_path}/leaderboard.html" in stdout
    assert "[1/1] shapes-blended, seed 0: k-distance" in stderr
    page = (tmp_path / "leaderboard.html").read_text(encoding="utf-8")
    assert "Decomp-Det (cosine, quantile)" in page
    again, stderr = succeeds("bench", *arguments)
    assert "there already" in stderr and again == stdout
    assert json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8")) == board
    assert (tmp_path / "leaderboard.html").read_text(encoding="utf-8") == page


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    plans: list[Plan] = []

    def measure(name: str, plan: Plan, **options: Any) -> dict[str, Any]:
        plans.append(plan)
        return {"images": {}, "detectors": {}, "repairs": {}}

    monkeypatch.setattr(running, "measure", measure)
    return plans


def test_everything_by_default(tmp_path: Path, planned: list[Plan]) -> None:
    succeeds("bench", "--out", tmp_path)
    (plan,) = set(planned)
    assert plan == Plan(models=default_models())
    assert (plan.images, plan.slow_images, plan.seeds) == (1_000, 200, (0,))
    assert plan.detectors == tuple(DETECTORS) and plan.repairs == tuple(REPAIRS)


def test_options(tmp_path: Path, planned: list[Plan]) -> None:
    options = ("--models", "shapes,shapes-sig", "--detectors", "fast", "--repairs", "", "--count", "100")
    succeeds("bench", "--out", tmp_path, *options, "--slow", 45, "--seed", 3, "--seed", 1)
    (plan,) = set(planned)
    assert plan.models == ("shapes", "shapes-sig") and plan.repairs == () and plan.seeds == (3, 1)
    assert set(plan.detectors) == set(DETECTORS) - set(SLOW)
    assert (plan.images, plan.slow_images) == (100, 45)
    assert len(planned) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "nobody"), "error: expected a model among"),
        (("--detectors", "k-distance,nobody"), "received 'nobody'"),
        (("--repairs", "cure"), "error: expected a repair among none, "),
        (("--detectors", "", "--repairs", ""), "error: expected models, seeds, and detectors or repairs"),
        (("--count", "65", "--detectors", "LID"), "error: expected at least 66 images to fit LID on"),
    ],
)
def test_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("bench", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--count", 3), ("--slow", 3), ("--draws", 1), ("--seed", 100)]
)
def test_too_few_and_too_many(tmp_path: Path, option: str, value: int) -> None:
    code, _, stderr = run("bench", "--out", tmp_path / "out", option, value)
    assert code == 2 and f"Invalid value for '{option}'" in stderr and "should be" in stderr


def test_the_number_of_images_has_another_name_than_their_place(tmp_path: Path, planned: list[Plan]) -> None:
    _, stderr = succeeds(
        "bench", "--out", tmp_path, "--models", "shapes", "--detectors", "fast", "--images", 100
    )
    assert planned[0].images == 100 and "note: --images N is now --count N" in stderr


def test_the_names_that_are_checked_are_the_registries() -> None:
    assert tuple(DETECTORS) == command.DETECTORS and tuple(REPAIRS) == command.REPAIRS
    assert command.SLOW == SLOW and command.MOST_SEEDS == MOST_SEEDS


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "expected a folder to write the leaderboard to with --out" in refused(
        "bench", "--out", tmp_path / "out"
    )


def test_too_few_images_for_a_detector_is_said_with_its_name(tmp_path: Path) -> None:
    options = ("--models", "shapes", "--count", 45, "--detectors", "agnostic", "--repairs", "")
    said = refused("bench", "--out", tmp_path, *options)
    assert "error: shapes, agnostic: expected at least" in said


def test_photographs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECOMPCLIP_DATA", raising=False)
    said = refused("bench", "--out", tmp_path, "--models", "cifar10", "--count", 200)
    assert "DECOMPCLIP_DATA is not set" in said
