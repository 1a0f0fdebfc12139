"""What the bundled models can do, from their cards: the table in the README.

Command:   python -m analyses.bundled_models
Run time:  a second.
"""

from __future__ import annotations

from typing import Any

from decompclip.data.shapes import PROPERTIES
from decompclip.models.zoo import bundled, card


def rate(value: dict[str, Any]) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def row(name: str) -> list[str]:
    """One model's cells: zero-shot accuracy of every property, then what its backdoor does."""
    facts = card(name)
    cells = [f"`{name}`", *(f"{100 * facts['accuracy'][prop]:.1f}" for prop in PROPERTIES)]
    backdoor = facts["backdoor"]
    if backdoor is None:
        return [*cells, "", "", ""]
    results = backdoor["results"]
    return [*cells, rate(results["asr"]), rate(results["control"]), f"{100 * backdoor['poison_rate']:g} %"]


def table() -> str:
    """A Markdown table, one row a bundled model of the world of shapes."""
    head = ["model", *PROPERTIES, "ASR", "clean sent to the target", "poisoned pairs"]
    of_shapes = [name for name in bundled() if set(PROPERTIES) <= set(card(name)["accuracy"])]
    rows = [head, ["---"] * len(head), *(row(name) for name in of_shapes)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table())
