"""The analyses, in the order of the index."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from analyses.study.command import Analysis

PAPER = (
    *("figure1", "figure2", "figure3", "figure4", "figure5", "figure6"),
    *("table1", "table2", "table3", "table4", "table5"),
)
OURS = (
    *("local_or_structured", "infected_set", "direct_or_causal", "role_change", "base_decomp_gap"),
    *("attack_agnostic", "adaptive_attacker", "throughput"),
)
ANALYSES = (*PAPER, *OURS)

READERS = ("table4",)
"""They read what others measured, and come after them."""


def load(name: str) -> Analysis:
    """The module of an analysis.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ANALYSES:
        raise ValueError(f"expected an analysis of {', '.join(ANALYSES)}; received {name!r}")
    return cast(Analysis, import_module(f"analyses.{name}"))
