"""The leaderboard's tables, as a page shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

RATES = {"auroc": "AUROC %", "tpr": "TPR %", "fpr": "FPR %", "control": "control AUROC %"}
REPAIR_RATES = {
    "cacc": "CACC %",
    "asr": "ASR %",
    "control": "control %",
    "triggered_accuracy": "accuracy with trigger %",
}


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]


def detection_means(board: dict[str, Any]) -> Table:
    """Means over attacks, and what a detector costs."""
    found = board["detectors"]
    means = _means(found, RATES, best=("auroc", max))
    forwards = {name: cells["forwards"] for run in board["runs"] for name, cells in run["detectors"].items()}
    rows = tuple(
        Row(row.name, (*row.cells, Cell(str(forwards[row.name])), _time(found[row.name]["cost"])))
        for row in means.rows
    )
    return Table(means.title, (*means.head, "forwards", "time"), rows)


def repair_means(board: dict[str, Any]) -> Table:
    return _means(board["repairs"], REPAIR_RATES)


def _means(
    found: dict[str, Any],
    columns: dict[str, str],
    *,
    best: tuple[str, Callable[..., Any]] | None = None,
) -> Table:
    """One row a defense; where there was no attack at all, what the clean models say."""
    shown = {name: {key: _overall(cells[key]) for key in columns} for name, cells in found.items()}
    metric, better = best or ("", max)
    values = [mean["value"] for row in shown.values() if (mean := row.get(metric)) is not None]
    top = better(values, default=None)
    rows = [
        Row(
            name,
            tuple(_cell(value, best=key == metric and _is(value, top)) for key, value in row.items()),
        )
        for name, row in shown.items()
    ]
    return Table("Over all attacks", ("", *columns.values()), tuple(rows))


def by_attack(
    title: str, found: dict[str, Any], metric: str, attacks: Sequence[str], best: Callable[..., Any]
) -> Table:
    values = {
        name: [cells[metric]["attacks"].get(attack) for attack in attacks] for name, cells in found.items()
    }
    tops = [
        best([x for x in column if x is not None], default=None)
        for column in zip(*values.values(), strict=True)
    ]
    rows = [
        Row(
            name,
            tuple(
                Cell(_percent(x), best=x is not None and _percent(x) == _percent(top))
                for x, top in zip(row, tops, strict=True)
            ),
        )
        for name, row in values.items()
    ]
    return Table(title, ("", *attacks), tuple(rows))


def model_tables(run: dict[str, Any]) -> list[Table]:
    """What was measured of one model, with intervals."""
    tables = []
    if found := run["detectors"]:
        rows = [
            Row(name, (*_cells(cells, RATES), Cell(str(cells["images"])), Cell(f"{cells['cost']:.1f} x")))
            for name, cells in found.items()
        ]
        tables.append(Table("", ("detector", *RATES.values(), "images", "time"), tuple(rows)))
    if found := run["repairs"]:
        rows = [
            Row(name, (*_cells(cells, REPAIR_RATES), Cell(str(len(cells["cacc"].get("draws", (0,)))))))
            for name, cells in found.items()
        ]
        tables.append(Table("", ("repair", *REPAIR_RATES.values(), "draws"), tuple(rows)))
    return tables


def _cells(found: dict[str, Any], columns: dict[str, str]) -> list[Cell]:
    return [_cell(found[key]) for key in columns]


def _overall(cells: dict[str, Any]) -> dict[str, Any] | None:
    if cells["mean"]:
        return cells["mean"]
    return None if cells["clean"] is None else {"value": cells["clean"], "low": None, "high": None}


def _is(found: dict[str, Any] | None, top: float | None) -> bool:
    return found is not None and _percent(found["value"]) == _percent(top)


def _time(cells: dict[str, Any]) -> Cell:
    found = _overall(cells)
    return Cell("–" if found is None else f"{found['value']:.1f} x")


def _cell(found: dict[str, Any] | None, *, best: bool = False) -> Cell:
    if found is None or found["value"] is None:
        return Cell("–")
    known = found["low"] is not None
    interval = f"[{100 * found['low']:.1f},\u00a0{100 * found['high']:.1f}]" if known else ""
    return Cell(_percent(found["value"]), interval, best)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
