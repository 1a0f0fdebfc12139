"""Table 4: repair on other data than ImageNet: every family that has a Table 1, side by side.

Paper:     He et al. (2025), Table 4: BadNet on Caltech-101 and Oxford Pets, with and without CleanCLIP.
Command:   python -m analyses.table4 --model-family cifar10   (after table1 of that family)
Run time:  a second: it reads what `python -m analyses.table1` measured.
Expected:  Decomp-Rep takes ASR from 86 to 5 (Caltech-101) and from 92 to 35 (Oxford Pets).
Writes:    analyses/results/FAMILY/table4.json, table4.png

The paper's data sets need its models; where weights and data are, `analyses/families/caltech101.json` and `oxford_pets.json`
name them. Here photographs are CIFAR-10's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyses.paper import table1
from analyses.paper.published import TABLE4
from analyses.study.case import Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.rates import excess, rates_figure, rates_table
from analyses.study.results import RESULTS, read
from analyses.study.summary import markdown, mean, over_models, spread

TITLE = "Table 4: repair on other data"


@dataclass(frozen=True)
class Config:
    """`results` is the folder in which table1's lie; by default the project's own."""

    results: str = ""


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    """Raises MissingResult: table1 was not measured; the message says which command does."""
    models = read("table1", family.name, folder=Path(config.results or RESULTS))["found"]["models"]
    return {"models": {m.name: models[m.name] for m in members if m.name in models}}


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"rates": rates_figure(record, ("No Defense", *table1.ROWS))}


def table(record: Mapping[str, Any]) -> str:
    rows = [["the paper's data", "setting", "ASR, %", "CACC, %"]]
    for data, settings in TABLE4.items():
        rows += [[data, setting, f"{asr:.2f}", f"{cacc:.2f}"] for setting, (asr, cacc) in settings.items()]
    return f"{rates_table(record, table1.settings())}\n\n{markdown(rows)}"


def finding(record: Mapping[str, Any]) -> str:
    models = list(record["found"]["models"].values())
    before, after = ([excess(m[row]) for m in models] for row in ("No Defense", "Decomp-Rep"))
    fall = mean(before) - mean(after)
    return (
        f"On {record['family']['title']} Decomp-Rep, told the kind of trigger, takes attack success over its control from "
        f"{over_models(before)} to {over_models(after)} points ({spread(len(models))}); on Caltech-101 and Oxford Pets the paper saw falls of 81 and "
        f"57 points. The transfer {'shows' if fall > 20 else 'does not show'} on these data; the paper's own models would decide it."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
