"""The analysis of trigger inversion: a killed run goes on, nothing is begun late, and its tables say what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analyses.questions import trigger_inversion as study
from analyses.study.family import BundledFamily
from analyses.study.results import RESULTS

FAMILY = BundledFamily("shapes")


def rate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def found(name: str, what: str) -> dict[str, Any]:
    """Of the clean model sizes 2, 2, 2, 2, 4, of twins 1, 2, 4, 2, 2; the scan names another class."""
    if what == "scan":
        return {"seconds": 3.04, "losses": {"everywhere": [2.0, 1, 2, 2, 2], "patch": [4.0, 2, 2, 2, 2]}}
    if what.startswith("repair"):
        left = {"repair by inversion": 0.2}.get(what, 0.9)
        report = {"control": rate(0.05), "cacc": rate(0.75)}
        return {
            "seconds": 9.04,
            "before": report | {"asr": rate(0.99)},
            "after": report | {"asr": rate(left)},
        }
    clean = name == FAMILY.name
    sizes = dict(zip("abcde", (2.0, 2, 2, 2, 4) if clean else (1.0, 2, 4, 2, 2), strict=True))
    success = dict.fromkeys("abcde", rate(0.9)) | {FAMILY.world.target: rate(0.8)}
    moves = {"moves": [1.0, 1.0] if clean else [1.0, 0.0], "true moves": None if clean else [1.0, 0.0]}
    return {"seconds": 1.04, "sizes": sizes, "success": success} | moves


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    steps = []

    def measured(family: BundledFamily, name: str, what: str) -> dict[str, Any]:
        steps.append(f"{name}: {what}")
        return found(name, what)

    monkeypatch.setattr(study, "measured", measured)
    return steps


def test_a_plan_has_every_model_once_and_each_repair_after_its_inversion() -> None:
    plan = study.plan(FAMILY)
    assert len(plan) == len(set(plan)) and plan[0] == ("shapes", "inversion")
    assert sum(what == "inversion" for _, what in plan) == 1 + len(FAMILY.members)
    repaired = [name for name, what in plan if what == "repair by PAR"]
    assert {name for name, what in plan if what == "scan"} == {"shapes", *repaired}
    assert all(plan.index((n, "inversion")) < plan.index((n, "repair by inversion")) for n in repaired)


def test_a_run_goes_on_and_begins_nothing_late(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = study.plan(FAMILY)
    a_minute_each = SimpleNamespace(monotonic=lambda: 60 * len(asked))
    monkeypatch.setattr(study, "time", a_minute_each)
    assert study.measure(FAMILY, tmp_path / "work", tmp_path, minutes=2.5) == len(plan) - 3
    assert len(asked) == 3
    record = study.read("shapes", tmp_path)
    assert record["left"] == len(plan) - 3 and f"{len(plan) - 3} steps were not measured" in study.finding(
        record
    )
    assert study.measure(FAMILY, tmp_path / "work", tmp_path) == 0
    assert asked == [f"{name}: {what}" for name, what in plan]
    kept = (tmp_path / "shapes.json").read_bytes()
    assert study.measure(FAMILY, tmp_path / "work", tmp_path) == 0 and len(asked) == len(plan)
    assert (tmp_path / "shapes.json").read_bytes() == kept
    assert json.loads(kept)["runs"]["shapes"]["inversion"]["seconds"] == 1.0


def test_tables_say_what_was_measured(tmp_path: Path, asked: list[str]) -> None:
    study.measure(FAMILY, tmp_path / "work", tmp_path)
    record = study.read("shapes", tmp_path)
    detection, repairs, said = study.printed(record)
    (row,) = (line for line in detection.splitlines() if "`shapes-badnet` " in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "`shapes-badnet`",
        "1.0000",
        "80.0 [79.0, 81.0]",
        "0.69 (1)",
        "0.69 (1)",
        "1.00",
        "0.71",
        "1",
        "0.00 (2)",
        "3",
    ]
    assert f"By the scan it has the highest in 0 of {len(FAMILY.members)} twins." in said
    twins, accuracy = len(FAMILY.members), "75.0 [74.0, 76.0]"
    kept, left = "90.0 [89.0, 91.0] (5.0)", "20.0 [19.0, 21.0] (5.0)"
    cells = ["99.0 [98.0, 100.0] (5.0)", accuracy, left, accuracy, kept, accuracy, kept, accuracy]
    assert f"| `shapes-badnet` | {' | '.join(cells)} |" in repairs
    assert (
        f"inversion 20.0 % (20.0 to 20.0, n = {twins}), for 0.0 points of accuracy and 9 s; PAR 90.0 %"
        in said
    )
    assert "not measured" not in said
    assert f"highest score in {twins} of {twins} twins alone and in {twins} beside" in said


def test_a_score_is_the_inversions_own() -> None:
    sizes, reference = [1.0, 2.0, 4.0, 3.0], [1.0, 1.0, 2.0, 2.0]
    logs = torch.tensor(sizes).log()
    slow = [float(sorted(logs[[j for j in range(4) if j != i]].tolist())[1] - logs[i]) for i in range(4)]
    assert study.scores(sizes) == pytest.approx(slow, abs=1e-6)
    assert study.scores(sizes, sizes) == pytest.approx([0] * 4)
    ratios = [a / b for a, b in zip(sizes, reference, strict=True)]
    assert study.scores(sizes, reference) == pytest.approx(study.scores(ratios))


def test_a_missing_record_names_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="--model-family shapes --measure"):
        study.read("shapes", tmp_path)
    assert study.main(["--model-family", "no-such"]) == 1
    assert "python -m analyses.trigger_inversion: expected" in capsys.readouterr().err


def test_the_page_says_what_was_measured() -> None:
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert all(block.strip() in page for block in study.printed(study.read()))
