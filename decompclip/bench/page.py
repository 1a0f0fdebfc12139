"""The leaderboard as one page that opens offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from decompclip.bench.tables import by_attack, detection_means, model_tables, repair_means
from decompclip.figures.export import content_policy
from decompclip.files import atomic_folder, digest, write_json, write_text
from decompclip.printable import printable_all, shown

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
    "ones. The paper's repair is told whether the trigger is local or global; the others are told nothing. Means and "
    "intervals are over attacks, as above. "
    "A repair is fitted on several draws of clean images, and a rate is the mean over them; a model's own interval below is for "
    "one more draw, or, where it says one draw, for the images that were drawn."
)


def render(board: dict[str, Any]) -> str:
    """`leaderboard(...)` as HTML, with its style in it and without scripts."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
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
        tables = [repair_means(board)]
        if attacks:
            tables.append(by_attack("ASR % by attack", found, "asr", attacks, min))
            tables.append(by_attack("CACC % by attack", found, "cacc", attacks, max))
        sections.append({"id": "repair", "title": "Repair", "text": REPAIR_TEXT, "tables": tables})
    return sections


def _model(run: dict[str, Any]) -> dict[str, Any]:
    kind = f"{run['extent']}, {run['structure']}, to {run['target']}" if run["attack"] else "clean"
    return {"title": f"{run['model']}, seed {run['seed']} ({kind})", "tables": model_tables(run)}


def _provenance(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    config = {key: value for key, value in first["config"].items() if key != "seed"}
    return {
        "config": config,
        "seeds": sorted({run["seed"] for run in runs}),
        "versions": list({json.dumps(run["versions"]): run["versions"] for run in runs}.values()),
        "weights": {run["model"]: run["weights"] for run in runs},
        "seconds": round(sum(run["seconds"] for run in runs), 1),
    }
