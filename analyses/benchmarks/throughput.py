"""Throughput: what taking apart, mapping, sweeping and guarding cost beside a plain forward pass.

Paper:     none; our own bars.
Command:   python -m analyses.throughput --model-family shapes
Run time:  about 2 minutes, one thread.
Expected:  decompositions at most 1.15 times a plain forward, a guard at most 1.2 times, of a ViT-B/32's size.
Writes:    analyses/results/FAMILY/throughput.json, throughput.png

Processor times of the family's clean model, rounds of all tasks in turn in one process; a task's ratio is taken within each round to the
plain forward of that round. Small models pay more for bookkeeping than large ones: `python -m analyses.benchmark_towers` and
`benchmark_guard` measure full-size towers.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from analyses.study.case import Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import markdown
from decompclip.decomposition.components import heads
from decompclip.decomposition.moments import Moments
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.guard import Guard
from decompclip.figures.scatter import Panel, Point, point_panels
from decompclip.operators.attention import contribution_maps
from decompclip.operators.sweeps import ablation_sweep

TITLE = "Throughput: what it costs to take an image feature apart"

PLAIN = "plain forward"


@dataclass(frozen=True)
class Config:
    """`images` a batch; models are the clean one of the family."""

    images: int = 64
    fit_images: int = 400
    rounds: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise ValueError(f"expected at least 3 rounds, for a median with a range; received {self.rounds}")


def tasks(config: Config, family: Family, member: Member) -> dict[str, Callable[[], Any]]:
    """What is timed, each on the same batch."""
    case = family.case(member, images=max(config.fit_images, config.images), seed=config.seed)
    model, images = case.model, case.model.normalize(case.clean[: config.images])
    guard = Guard(model, AgnosticRep(case.classifier, budget=0.05).fit(case.terms("fit", "centred")))
    stored, moments = case.terms("clean")[: config.images], Moments.of(case.terms("fit"), second=False)
    text = case.classifier[case.target]
    return {
        PLAIN: lambda: model.encode_image(images),
        "decompose": lambda: model.decompose(images),
        "Guard, agnostic repair": lambda: guard.encode_image(images),
        "contribution maps of the last heads": lambda: contribution_maps(
            model, images, text, heads[-1], pictures=False
        ),
        "all layer sweeps of stored terms": lambda: ablation_sweep(stored, moments, case.classifier),
    }


@torch.no_grad()
def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    work = tasks(config, family, members[0])
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for task in work.values():
        task()  # caches and lazy maps are made before the clock runs
    for _ in range(config.rounds):
        for name, task in work.items():
            begin = time.process_time()
            task()
            seconds[name].append(time.process_time() - begin)
    ratios = {
        name: [a / b for a, b in zip(values, seconds[PLAIN], strict=True)] for name, values in seconds.items()
    }
    plain = config.images / statistics.median(seconds[PLAIN])
    return {
        "models": {members[0].name: {name: [round(r, 4) for r in values] for name, values in ratios.items()}},
        "plain_images_per_second": round(plain, 1),
    }


def _ratios(record: Mapping[str, Any]) -> dict[str, Point]:
    (model,) = record["found"]["models"].values()
    return {name: Point(statistics.median(r), min(r), max(r)) for name, r in model.items() if name != PLAIN}


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    ratios = _ratios(record)
    panel = Panel("time beside a plain forward, median", "ratio", {"": list(ratios.values())}, line=1.0)
    return {"ratios": point_panels(list(ratios), [panel], bars="range over rounds")}


def table(record: Mapping[str, Any]) -> str:
    rows = [["task", "time beside a plain forward, median (range)"]]
    for name, p in _ratios(record).items():
        rows.append([name, f"{p.value:.2f} ({p.low:.2f}..{p.high:.2f})"])
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {p.value:.2f}" for name, p in _ratios(record).items())
    return (
        f"In plain forward passes (of which one thread ran {record['found']['plain_images_per_second']:.0f} images a second, machine and load "
        f"included): {said}. Medians of {record['config']['rounds']} rounds; larger towers, where bookkeeping weighs less, are benchmarked "
        "apart, and other processors would differ."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
