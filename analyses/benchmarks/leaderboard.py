"""Detectors and repairs on the whole zoo: the leaderboard that the README shows.

Command:   python -m analyses.leaderboard             (reads the committed runs, prints the tables)
           python -m analyses.leaderboard --measure   (a killed run resumes; DECOMPCLIP_DATA names the photographs)
Run time:  to measure, 2.3 hours on one thread: the photographs take one of them, STRIP and TeCo on the others 50 minutes.
Writes:    analyses/results/leaderboard/leaderboard.json, leaderboard.html

It is `decompclip bench` on every bundled model, with one seed of images; three seeds of training where the zoo has them. The twins of
photographs of 200 classes see 400 images of each kind, and neither STRIP nor TeCo: at dozens of passes an image they would take hours there.
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
from decompclip.bench.plan import SLOW, Plan, base_of
from decompclip.bench.run import run
from decompclip.defenses.detectors import DETECTORS
from decompclip.models.bundled import bundled

RESULTS = Path(__file__).parent.with_name("results") / "leaderboard"
WORK = Path(".training") / "leaderboard"
BASES = ("photos", "shapes", "cifar10")


def plans() -> dict[str, Plan]:
    """By a folder's name: fewer images for `photos`, and the slow detectors apart, which it goes without."""
    fast = tuple(name for name in DETECTORS if name not in SLOW)
    photos = tuple(name for name in bundled() if base_of(name) == "photos")
    others = tuple(name for name in bundled() if name not in photos)
    return {
        "photos": Plan(models=photos, detectors=fast, images=400, draws=3),
        "others": Plan(models=others, detectors=fast),
        "others-slow": Plan(models=others, detectors=SLOW, repairs=()),
    }


def measure(work: Path = WORK, folder: Path = RESULTS) -> None:
    runs: dict[str, dict[str, Any]] = {}
    for name, plan in plans().items():
        for found in run(plan, work / name, log=lambda line: print(line, file=sys.stderr)):
            runs[found["model"]] = joined(runs.get(found["model"]), found)
    write_board(leaderboard(list(runs.values())), folder)


def joined(run: dict[str, Any] | None, slow: dict[str, Any]) -> dict[str, Any]:
    """A model's run together with that of the slow detectors on it, in the order of `DETECTORS`."""
    if run is None:
        return slow
    found = {**run["detectors"], **slow["detectors"]}
    ordered = {name: found[name] for name in DETECTORS if name in found}
    config = run["config"] | {"detectors": list(ordered)}
    return run | {"detectors": ordered, "config": config, "seconds": run["seconds"] + slow["seconds"]}


def read(folder: Path = RESULTS) -> dict[str, Any]:
    """As `read_measured`."""
    return read_measured("leaderboard", folder)


def of_base(board: Mapping[str, Any], base: str) -> list[dict[str, Any]]:
    """The runs on twins of one clean model."""
    return [r for r in board["runs"] if r["base"] == base and r["attack"]]


def values(runs: list[dict[str, Any]], part: str, name: str, key: str) -> list[float]:
    """Of the runs in which it was measured."""
    return [run[part][name][key]["value"] for run in runs if name in run[part]]


def mean_and_worst(found: list[float], worst: Any, digits: int = 1, scale: float = 100) -> str:
    mean = scale * sum(found) / len(found)
    return f"{mean:.{digits}f} ({scale * worst(found):.{digits}f})"


def drawn(runs: list[dict[str, Any]], name: str) -> str:
    """What one more draw of calibration images is to give on the worst twin, where draws differ by more than a point."""
    worst = max((run["repairs"][name]["asr"] for run in runs), key=lambda rate: rate["value"])
    differ = max(worst["draws"]) - min(worst["draws"]) > 0.01
    return f" [{100 * worst['low']:.0f}, {100 * worst['high']:.0f}]" if differ else ""


def detection_table(board: Mapping[str, Any]) -> str:
    """Mean over twins and the worst of them; the control over clean models too. A dash: not measured."""
    by_base = {base: of_base(board, base) for base in BASES}
    head = ["detector"]
    for base, runs in by_base.items():
        head += [f"{base}: AUROC of {len(runs)} twins, mean (worst)", "TPR at 5 %"]
    rows = [[*head, "worlds equal", "FPR at 5 %", "control AUROC", "passes"]]
    for name in DETECTORS:
        cells, worlds = [name], []
        for runs in by_base.values():
            if areas := values(runs, "detectors", name, "auroc"):
                tpr = values(runs, "detectors", name, "tpr")
                worlds.append(sum(areas) / len(areas))
                cells += [mean_and_worst(areas, min, 3, 1), f"{100 * sum(tpr) / len(tpr):.0f}"]
            else:
                cells += ["–", "–"]
        fpr, control = (values(board["runs"], "detectors", name, key) for key in ("fpr", "control"))
        cells.append(f"{sum(worlds) / len(worlds):.3f}" if len(worlds) == len(BASES) else "–")
        cells.append(f"{100 * sum(fpr) / len(fpr):.1f}")
        cells.append(f"{sum(control) / len(control):.3f} ({min(control):.2f}..{max(control):.2f})")
        (passes,) = {run["detectors"][name]["forwards"] for run in board["runs"] if name in run["detectors"]}
        rows.append([*cells, str(passes)])
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
