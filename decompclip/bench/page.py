"""The leaderboard: summaries of runs, by attack and over attacks, and one page that opens offline."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from markupsafe import Markup, escape

from decompclip.display import printable_all, shown
from decompclip.figures.theme import content_policy
from decompclip.files import atomic_folder, digest, write_json, write_text
from decompclip.intervals import mean_interval

RATES = {"auroc": "AUROC %", "tpr": "TPR %", "fpr": "FPR %", "control": "control AUROC %"}
REPAIR_RATES = {
    "cacc": "CACC %",
    "asr": "ASR %",
    "control": "control %",
    "triggered_accuracy": "accuracy with trigger %",
}


def leaderboard(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every run, and their summary, ready for JSON.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("expected at least one run; received none")
    return {
        "attacks": list(dict.fromkeys(run["attack"] for run in runs if run["attack"])),
        "detectors": _table(runs, "detectors", (*RATES, "cost")),
        "repairs": _table(runs, "repairs", REPAIR_RATES),
        "runs": list(runs),
    }


def mean_over(values: Sequence[float]) -> dict[str, Any]:
    """Mean with the 95 % interval of Student's t over independent values, ready for JSON; of one value there is no interval."""
    mean, low, high = mean_interval(torch.tensor(values, dtype=torch.float64))
    ends = {"low": low, "high": high} if len(values) > 1 else {"low": None, "high": None}
    return {"value": mean, **ends, "n": len(values)}


def _table(runs: Sequence[dict[str, Any]], part: str, metrics: Iterable[str]) -> dict[str, Any]:
    """Name -> metric -> mean by attack (over twins and seeds), mean over attacks, and the clean models' own.

    An attack counts once, whether it has one twin or three.
    """
    names = dict.fromkeys(name for run in runs for name in run[part])
    return {name: {metric: _by_cell(runs, part, name, metric) for metric in metrics} for name in names}


def _by_cell(runs: Sequence[dict[str, Any]], part: str, name: str, metric: str) -> dict[str, Any]:
    by_attack: dict[str | None, list[float]] = {}
    for run in runs:
        found = run[part].get(name, {}).get(metric)
        value = found["value"] if isinstance(found, dict) else found
        if value is not None:
            by_attack.setdefault(run["attack"] or None, []).append(value)
    means = {attack: sum(values) / len(values) for attack, values in by_attack.items()}
    clean = means.pop(None, None)
    mean = mean_over(list(means.values())) if means else None
    if mean and mean["low"] is not None:
        most = math.inf if metric == "cost" else 1.0
        mean |= {"low": max(0.0, mean["low"]), "high": min(most, mean["high"])}
    return {"attacks": means, "mean": mean, "clean": clean}


class Cell(NamedTuple):
    text: str
    interval: str = ""
    best: bool = False


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]


def means(found: dict[str, Any], columns: dict[str, str], best: str = "") -> Table:
    """One row a defense: its mean over attacks; where there was no attack at all, what the clean models say.

    The mean of a defense that has fewer attacks than others says how many, and is never the best.
    """
    overall = [{key: _overall(cells[key]) for key in columns} for cells in found.values()]
    counts = [max((value.get("n", 0) for value in row.values() if value), default=0) for row in overall]
    whole = [n == max(counts) for n in counts]
    tops = _best(
        [
            (row.get(best) or {}).get("value") if all_ else None
            for row, all_ in zip(overall, whole, strict=True)
        ],
        max,
    )
    rows = [
        (
            name if all_ else f"{name} ({n} of {max(counts)} attacks)",
            [_cell(value, best=key == best and top) for key, value in row.items()],
        )
        for name, row, top, n, all_ in zip(found, overall, tops, counts, whole, strict=True)
    ]
    return Table("Over all attacks", ("", *columns.values()), rows)


def detection_means(board: dict[str, Any]) -> Table:
    """Means over attacks, and what a detector costs."""
    found = board["detectors"]
    table = means(found, RATES, best="auroc")
    forwards = {name: cells["forwards"] for run in board["runs"] for name, cells in run["detectors"].items()}
    for name, (_, cells) in zip(found, table.rows, strict=True):
        time = _overall(found[name]["cost"])
        cells += [Cell(str(forwards[name])), Cell("–" if time is None else f"{time['value']:.1f} x")]
    return table._replace(head=(*table.head, "forwards", "time"))


def by_attack(
    title: str, found: dict[str, Any], metric: str, attacks: Sequence[str], better: Callable[..., Any]
) -> Table:
    values = [[cells[metric]["attacks"].get(attack) for attack in attacks] for cells in found.values()]
    tops = zip(*[_best(column, better) for column in zip(*values, strict=True)], strict=True)
    rows = [
        (name, [Cell(_percent(x), best=best) for x, best in zip(row, top, strict=True)])
        for name, row, top in zip(found, values, tops, strict=True)
    ]
    return Table(title, ("", *attacks), rows)


def model_tables(run: dict[str, Any]) -> list[Table]:
    """What was measured of one model, with intervals."""
    tables = []
    for kind, columns, more in (
        ("detector", RATES, ("images", "time")),
        ("repair", REPAIR_RATES, ("draws",)),
    ):
        if not (found := run[f"{kind}s"]):
            continue
        rows = []
        for name, cells in found.items():
            facts = (
                [str(cells["images"]), f"{cells['cost']:.1f} x"]
                if kind == "detector"
                else [str(len(cells["cacc"].get("draws", (0,))))]
            )
            rows.append((name, [*(_cell(cells[key]) for key in columns), *map(Cell, facts)]))
        tables.append(Table("", (kind, *columns.values(), *more), rows))
    return tables


def _overall(cells: dict[str, Any]) -> dict[str, Any] | None:
    if cells["mean"]:
        return cells["mean"]
    return None if cells["clean"] is None else {"value": cells["clean"], "low": None, "high": None}


def _best(values: Sequence[float | None], better: Callable[..., Any]) -> list[bool]:
    """Which are shown as the best one is."""
    top = better([x for x in values if x is not None], default=None)
    return [x is not None and _percent(x) == _percent(top) for x in values]


def _cell(found: dict[str, Any] | None, *, best: bool = False) -> Cell:
    if found is None or found["value"] is None:
        return Cell("–")
    known = found["low"] is not None
    interval = f"[{100 * found['low']:.1f},\u00a0{100 * found['high']:.1f}]" if known else ""
    return Cell(_percent(found["value"]), interval, best)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


PAGE, NUMBERS = "leaderboard.html", "leaderboard.json"

TITLE = "Detectors and repairs on the zoo"

DETECTION_TEXT = (
    "AUROC of clean images against triggered ones; higher is better, 50 is chance. FPR and TPR at each detector's own "
    "threshold, set on other clean images to flag 5 % of them. The control is the AUROC of clean images against other "
    "clean images: 50 but for chance. Time is in plain forward passes, as measured. Means are over attacks, each first "
    "averaged over its twins of several seeds; intervals (95 %, Student's t) are over attacks. BDetCLIP's sentences hold "
    "words that the zoo's small models do not know."
)
REPAIR_TEXT = (
    "ASR: share of triggered images taken for the target, to be read beside its control, the share of clean images of "
    "other classes that the same repair sends there. CACC: accuracy on clean images; accuracy with trigger: on triggered "
    "ones. The paper's repair needs a hint, whether the trigger is local or global; the others need none. Means and "
    "intervals are over attacks, as above. A repair is fitted on several draws of clean images, and a rate is the mean over "
    "them. A model's own interval below is for one more draw, or, where it says one draw, for the images that were drawn."
)


def render(board: dict[str, Any]) -> str:
    """`leaderboard(...)` as HTML, with its style in it and without scripts."""
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined, "finalize": shown}
    environment = jinja2.Environment(**options, trim_blocks=True, lstrip_blocks=True)
    own = files("decompclip.bench") / "templates"
    css = (files("decompclip.report") / "templates" / "report.css").read_text(encoding="utf-8")
    css += (own / "bench.css").read_text(encoding="utf-8")
    return environment.from_string((own / "bench.html").read_text(encoding="utf-8")).render(
        title=TITLE,
        policy=Markup(content_policy(styles=[css])),
        run=board.get("run", ""),
        css=Markup(css),
        sections=_sections(board),
        models=[_model(run) for run in board["runs"]],
        provenance=escape(
            json.dumps(printable_all(_provenance(board["runs"])), indent=1, ensure_ascii=False)
        ),
    )


def write_board(board: dict[str, Any], folder: Path) -> Path:
    """The page and its numbers, which come together and carry the same `run`; returns the page's path."""
    board = board | {"run": digest(board)}
    with atomic_folder(folder, NUMBERS) as partial:
        write_text(partial / PAGE, render(board))
        write_json(partial / NUMBERS, board)
    return folder / PAGE


def _sections(board: dict[str, Any]) -> list[dict[str, Any]]:
    attacks, sections = board["attacks"], []
    if found := board["detectors"]:
        tables = [detection_means(board)]
        if attacks:
            tables.append(by_attack("AUROC % by attack", found, "auroc", attacks, max))
        sections.append({"id": "detection", "title": "Detection", "text": DETECTION_TEXT, "tables": tables})
    if found := board["repairs"]:
        tables = [means(found, REPAIR_RATES)]
        if attacks:
            tables.append(by_attack("ASR % by attack", found, "asr", attacks, min))
            tables.append(by_attack("CACC % by attack", found, "cacc", attacks, max))
        sections.append({"id": "repair", "title": "Repair", "text": REPAIR_TEXT, "tables": tables})
    return sections


def _model(run: dict[str, Any]) -> dict[str, Any]:
    kind = f"{run['extent']}, {run['structure']}, to {run['target']}" if run["attack"] else "clean"
    return {"title": f"{run['model']}, seed {run['seed']} ({kind})", "tables": model_tables(run)}


def _provenance(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def each(key: str) -> list[dict[str, Any]]:
        return list({json.dumps(run[key] | {"seed": None}): run[key] for run in runs}.values())

    configs = [{key: value for key, value in config.items() if key != "seed"} for config in each("config")]
    return {
        "configs": configs,
        "seeds": sorted({run["seed"] for run in runs}),
        "versions": each("versions"),
        "weights": {run["model"]: run["weights"] for run in runs},
        "seconds": round(sum(run["seconds"] for run in runs), 1),
    }
