"""The analyses, in the order of the index."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from analyses.study.command import Analysis

IN_ORDER = {
    "paper": "figure1 figure2 figure3 figure4 figure5 figure6 table1 table2 table3 table4 table5",
    "questions": "local_or_structured infected_set direct_or_causal role_change base_decomp_gap "
    "attack_agnostic token_rep adaptive_attacker",
    "benchmarks": "throughput",
}
ANALYSES = {name: folder for folder, names in IN_ORDER.items() for name in names.split()}
"""The folder of each."""

READERS = ("table4",)
"""They read what others measured, and come after them."""


def load(name: str) -> Analysis:
    """The module of an analysis.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ANALYSES:
        raise ValueError(f"expected an analysis of {', '.join(ANALYSES)}; received {name!r}")
    return cast(Analysis, import_module(f"analyses.{ANALYSES[name]}.{name}"))
