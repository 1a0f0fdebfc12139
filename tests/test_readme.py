"""The README's examples run, the commands that it names exist, and the numbers are the measured ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from analyses import audit_scan, leaderboard
from analyses.study.registry import ANALYSES, load
from analyses.study.results import RESULTS as FOLDER
from analyses.study.results import read

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "analyses" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)  # one after another, as a reader would


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"make (\w+)", "\n".join(blocks("sh"))))
    assert {"demo", "test"} <= targets
    for target in targets:
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr


def test_commands_and_their_options_exist() -> None:
    commands = re.findall(r"decompclip (\w+)(.*?)(?<!\\)\n", "\n".join(blocks("sh")) + "\n", flags=re.DOTALL)
    assert commands
    for command, options in commands:
        run = subprocess.run(
            [sys.executable, "-m", "decompclip.cli", command, "--help"],
            capture_output=True,
            text=True,
            check=False,
            env={"COLUMNS": "200", "PATH": "", "NO_COLOR": "1"},
        )
        assert run.returncode == 0, run.stderr
        for option in re.findall(r"--[a-z-]+", options):
            assert option in run.stdout, (command, option)


def test_the_table_of_models_is_the_command_s() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "analyses.bundled_models"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() in RESULTS, "run `python -m analyses.bundled_models` and paste its table"


def test_the_leaderboard_is_the_measured_one() -> None:
    board = leaderboard.read()
    for table in (leaderboard.detection_table(board), leaderboard.repair_table(board)):
        assert table in RESULTS, "run `python -m analyses.leaderboard` and paste its tables"


def test_the_scan_s_table_is_the_measured_one() -> None:
    for block in audit_scan.printed(audit_scan.read()):
        assert block in RESULTS, "run `python -m analyses.audit_scan` and paste what it prints"


@pytest.mark.parametrize(
    "family", sorted(path.name for path in FOLDER.iterdir() if (path / "figure1.json").exists())
)
def test_findings_are_what_the_committed_results_say(family: str) -> None:
    for name in ANALYSES:
        if (FOLDER / family / f"{name}.json").exists():
            found = load(name).finding(read(name, family))
            assert f"| `{name}` | {found} |" in RESULTS, (
                f"run `python -m analyses.{name} --model-family {family} --redraw` and paste its finding"
            )


def test_numbers_in_short_are_those_of_the_long_tables() -> None:
    rows = re.findall(r"^\|[^|]*\?\s*\|(.*)\|.*\|$", README, flags=re.MULTILINE)
    numbers = {number for row in rows for number in re.findall(r"\d+\.\d+", row)}
    assert len(numbers) > 10
    assert not [number for number in numbers if number not in RESULTS]


def test_files_that_it_names_are_there() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", prose)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    for module in re.findall(r"python -m (analyses(?:\.\w+)?)", README + RESULTS):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists() or module == "analyses", module
