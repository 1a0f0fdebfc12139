"""Detectors and repairs on the whole zoo: the leaderboard that the README shows.

Command:   python -m analyses.leaderboard             (reads the committed runs, prints the tables)
           python -m analyses.leaderboard --measure   (a killed run resumes; DECOMPCLIP_DATA names the photographs)
Run time:  to measure, 1.2 hours on one thread: STRIP and TeCo take two thirds of it.
Writes:    analyses/results/leaderboard/leaderboard.json, leaderboard.html

It is `decompclip bench` on every bundled model, with one seed of images; three seeds of training where the zoo has them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from analyses.study.results import read_measured
from analyses.study.summary import markdown
from decompclip.bench.page import leaderboard, write_board
from decompclip.bench.plan import Plan
from decompclip.bench.run import run
from decompclip.models.bundled import bundled

RESULTS = Path(__file__).parent.with_name("results") / "leaderboard"
WORK = Path(".training") / "leaderboard"
BASES = ("shapes", "cifar10")


def measure(work: Path = WORK, folder: Path = RESULTS) -> None:
    runs = run(Plan(models=tuple(bundled())), work, log=lambda line: print(line, file=sys.stderr))
    write_board(leaderboard(runs), folder)


def read(folder: Path = RESULTS) -> dict[str, Any]:
    """As `read_measured`."""
    return read_measured("leaderboard", folder)


def of_base(board: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """The runs on twins of one clean model."""
    return [r for r in board["runs"] if r["base"] == base and r["attack"]]


def values(runs: list[dict[str, Any]], part: str, name: str, key: str) -> list[float]:
    return [run[part][name][key]["value"] for run in runs]


def mean_and_worst(found: list[float], worst: Any, digits: int = 1, scale: float = 100) -> str:
    mean = scale * sum(found) / len(found)
    return f"{mean:.{digits}f} ({scale * worst(found):.{digits}f})"


def drawn(runs: list[dict[str, Any]], name: str) -> str:
    """What one more draw of calibration images is to give on the worst twin, where draws were measured."""
    worst = max((run["repairs"][name]["asr"] for run in runs), key=lambda rate: rate["value"])
    return f" [{100 * worst['low']:.0f}, {100 * worst['high']:.0f}]" if "draws" in worst else ""


def detection_table(board: Mapping[str, Any]) -> str:
    """Mean over twins and the worst of them; the control over clean models too."""
    by_base = {base: of_base(board, base) for base in BASES}
    head = ["detector"]
    for base, runs in by_base.items():
        head += [f"{base}: AUROC of {len(runs)} twins, mean (worst)", "TPR at 5 %"]
    rows = [[*head, "all: AUROC", "worlds equal", "FPR at 5 %", "control AUROC", "passes"]]
    twins = [r for runs in by_base.values() for r in runs]
    for name in board["detectors"]:
        cells = [name]
        for runs in by_base.values():
            cells.append(mean_and_worst(values(runs, "detectors", name, "auroc"), min, 3, 1))
            tpr = values(runs, "detectors", name, "tpr")
            cells.append(f"{100 * sum(tpr) / len(tpr):.0f}")
        areas = values(twins, "detectors", name, "auroc")
        fpr = values(board["runs"], "detectors", name, "fpr")
        control = values(board["runs"], "detectors", name, "control")
        worlds = [values(runs, "detectors", name, "auroc") for runs in by_base.values()]
        equal = sum(sum(world) / len(world) for world in worlds) / len(worlds)
        cells += [f"{sum(areas) / len(areas):.3f}", f"{equal:.3f}", f"{100 * sum(fpr) / len(fpr):.1f}"]
        cells.append(f"{sum(control) / len(control):.3f} ({min(control):.2f}..{max(control):.2f})")
        rows.append([*cells, str(twins[0]["detectors"][name]["forwards"])])
    return markdown(rows)


def repair_table(board: Mapping[str, Any]) -> str:
    by_base = {base: of_base(board, base) for base in BASES}
    rows = [
        [
            "repair",
            *(f"{base}: {x}" for base in BASES for x in ("ASR", "control", "CACC", "right on triggered")),
        ]
    ]
    for name in board["repairs"]:
        cells = [name]
        for runs in by_base.values():
            cells.append(mean_and_worst(values(runs, "repairs", name, "asr"), max) + drawn(runs, name))
            cells.append(mean_and_worst(values(runs, "repairs", name, "control"), max))
            cells.append(mean_and_worst(values(runs, "repairs", name, "cacc"), min))
            right = values(runs, "repairs", name, "triggered_accuracy")
            cells.append(f"{100 * sum(right) / len(right):.1f}")
        rows.append(cells)
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure what is not there yet")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.measure:
        measure()
    board = read()
    print(f"{detection_table(board)}\n\n{repair_table(board)}")


if __name__ == "__main__":
    main()
