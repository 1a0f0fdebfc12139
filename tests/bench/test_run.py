"""A leaderboard that was stopped goes on; what changed is measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decompclip import __version__, files
from decompclip.bench import run as running
from decompclip.bench.plan import Plan
from decompclip.bench.run import run, weights_of
from decompclip.models.bundled import card, digest, load_bundled

PLAN = Plan(
    models=("shapes", "shapes-blended", "shapes-blended-1"), detectors=(), repairs=("none",), seeds=(0, 1)
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which runs were measured; nothing is."""
    calls: list[tuple[str, int]] = []

    def measure(name: str, plan: Plan, *, seed: int, log: Any) -> dict[str, Any]:
        calls.append((name, seed))
        log("measuring")
        return {"images": {}, "detectors": {}, "repairs": {}}

    monkeypatch.setattr(running, "measure", measure)
    return calls


def test_what_is_there_is_not_measured_again(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    first = run(PLAN, tmp_path)
    assert asked == PLAN.jobs
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert {path.name for path in files} == {f"{model}-seed{seed}.json" for model, seed in PLAN.jobs}
    lines: list[str] = []
    assert run(PLAN, tmp_path, log=lines.append) == first
    assert len(asked) == len(PLAN.jobs)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert lines[0] == "[1/6] shapes, seed 0: there already"


def test_a_killed_leaderboard_goes_on(
    tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = running.measure

    def killed(name: str, plan: Plan, **options: Any) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(name, plan, **options)

    monkeypatch.setattr(running, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(PLAN, tmp_path)
    monkeypatch.setattr(running, "measure", plain)
    assert len(run(PLAN, tmp_path)) == 6
    assert asked == PLAN.jobs


@pytest.mark.parametrize(
    "changed",
    [{"images": 500}, {"repairs": ("none", "agnostic")}, {"detectors": ("LID",)}, {"slow_images": 90}],
)
def test_another_configuration_is_measured_again(
    tmp_path: Path, asked: list[tuple[str, int]], changed: dict[str, Any]
) -> None:
    run(PLAN, tmp_path)
    run(replace(PLAN, **changed), tmp_path)
    assert asked == PLAN.jobs * 2


@pytest.mark.parametrize("text", ["{", "[]", "", '{"config": {}}'])
def test_a_broken_file_is_measured_again(tmp_path: Path, asked: list[tuple[str, int]], text: str) -> None:
    run(PLAN, tmp_path)
    path = tmp_path / "runs" / "shapes-seed1.json"
    path.write_text(text, encoding="utf-8")
    run(PLAN, tmp_path)
    assert asked[6:] == [("shapes", 1)]
    assert json.loads(path.read_text(encoding="utf-8"))["model"] == "shapes"


def test_other_weights_are_measured_again(
    tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(PLAN, tmp_path)
    monkeypatch.setattr(
        running, "weights_of", lambda name: "0" * 64 if name == "shapes-blended" else weights_of(name)
    )
    run(PLAN, tmp_path)
    assert asked[6:] == [("shapes-blended", 0), ("shapes-blended", 1)]


def test_a_run_says_where_it_comes_from(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    runs = run(PLAN, tmp_path)
    by = {(found["model"], found["seed"]): found for found in runs}
    twin, clean = by["shapes-blended-1", 1], by["shapes", 0]
    assert (twin["base"], twin["attack"], twin["target"]) == ("shapes", "shapes-blended", "star")
    assert (twin["extent"], twin["structure"]) == ("global", "structured")
    assert clean["attack"] is clean["extent"] is clean["target"] is None
    assert twin["config"] == PLAN.config(1) and twin["versions"]["decompclip"] == __version__
    assert clean["weights"] == card("shapes")["sha256"]
    assert twin["weights"] == digest(load_bundled("shapes-blended-1").to_open_clip().state_dict())
    assert twin["seconds"] >= 0
    stored = json.loads((tmp_path / "runs" / "shapes-blended-1-seed1.json").read_text(encoding="utf-8"))
    assert stored == twin


def test_no_half_file_is_left(
    tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        run(PLAN, tmp_path)
    assert not list((tmp_path / "runs").glob("*.json"))
