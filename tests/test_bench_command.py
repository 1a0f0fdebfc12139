"""`decompclip bench`, from the command line to the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from decompclip.bench import run as running
from decompclip.bench.plan import REPAIRS, SLOW, Plan, default_models
from decompclip.cli import app
from decompclip.defenses.detectors import DETECTORS

SMALL = (
    "--models",
    "shapes-blended",
    "--images",
    "70",
    "--detectors",
    "k-distance, Decomp-Det (cosine, quantile)",
)


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_a_leaderboard_and_again(tmp_path: Path) -> None:
    arguments = (*SMALL, "--repairs", "none", "--out", tmp_path)
    result = bench(*arguments)
    assert result.exit_code == 0, result.output
    board = json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    assert set(board["detectors"]) == {"k-distance", "Decomp-Det (cosine, quantile)"}
    assert set(board["repairs"]) == {"none"}
    (run,) = board["runs"]
    assert run["model"] == "shapes-blended" and run["images"]["fit"] == 70
    assert "none: CACC" in result.stdout and f"{tmp_path}/leaderboard.html" in result.stdout
    assert "[1/1] shapes-blended, seed 0: k-distance" in result.stderr
    page = (tmp_path / "leaderboard.html").read_text(encoding="utf-8")
    assert "Decomp-Det (cosine, quantile)" in page
    again = bench(*arguments)
    assert "there already" in again.stderr and again.stdout == result.stdout
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
    assert bench("--out", tmp_path).exit_code == 0
    (plan,) = set(planned)
    assert plan == Plan(models=default_models())
    assert (plan.images, plan.slow_images, plan.seeds) == (1_000, 200, (0,))
    assert plan.detectors == tuple(DETECTORS) and plan.repairs == tuple(REPAIRS)


def test_options(tmp_path: Path, planned: list[Plan]) -> None:
    options = ("--models", "shapes,shapes-sig", "--detectors", "fast", "--repairs", "", "--images", "70")
    assert bench("--out", tmp_path, *options, "--slow", "45", "--seed", "3", "--seed", "1").exit_code == 0
    (plan,) = set(planned)
    assert plan.models == ("shapes", "shapes-sig") and plan.repairs == () and plan.seeds == (3, 1)
    assert set(plan.detectors) == set(DETECTORS) - set(SLOW)
    assert (plan.images, plan.slow_images) == (70, 45)
    assert len(planned) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "nobody"), "error: expected a model among"),
        (("--detectors", "k-distance,nobody"), "received 'nobody'"),
        (("--repairs", "cure"), "error: expected a repair among none, "),
        (("--detectors", "", "--repairs", ""), "error: expected models, seeds, and detectors or repairs"),
        (("--images", "3"), "error: expected at least 40 images of each kind; received 3"),
        (("--seed", "100"), "error: expected a seed in 0..99; received 100"),
        (("--images", "65", "--detectors", "LID"), "error: expected at least 66 images to fit LID on"),
    ],
)
def test_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "expected a folder to write the leaderboard to with --out" in refused("--out", tmp_path / "out")


def test_too_few_images_for_a_detector_is_said_with_its_name(tmp_path: Path) -> None:
    said = refused(
        "--out", tmp_path, "--models", "shapes", "--images", "60", "--detectors", "agnostic", "--repairs", ""
    )
    assert "error: shapes, agnostic: expected at least" in said


def test_photographs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECOMPCLIP_DATA", raising=False)
    said = refused("--out", tmp_path, "--models", "cifar10", "--images", "200")
    assert "DECOMPCLIP_DATA is not set" in said
