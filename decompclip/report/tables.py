"""Every table of a report as rows of plain numbers at full precision: what its CSV downloads hold."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from decompclip.audit.checks import interval_columns, rate_columns
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult
from decompclip.audit.scan_result import ScanResult
from decompclip.printable import inert

Row = dict[str, Any]


def tables_of(result: AuditResult) -> dict[str, list[Row]]:
    """`settings`, `layers`, `components`, `repairs`, `detectors`, `scores` and `classes` of an audit."""
    layers = [
        {"kind": kind, "scheme": scheme, "layer": layer} | setting.row()
        for kind, schemes in result.ablations.sweeps.items()
        for scheme, found in schemes.items()
        for layer, setting in enumerate(found)
    ]
    components = [
        _place(found.part.layer, found.part.head)
        | {
            "push": found.contribution,
            "push_error": found.error,
            "share": found.share,
            "distance": found.distance,
            "distance_floor": found.floor,
            "infected": int(found.infected),
        }
        for found in result.infection.parts
    ]
    repairs = [
        repair.setting.row()
        | rate_columns("saved", repair.change.saved)
        | rate_columns("restored", repair.change.restored)
        | interval_columns("accuracy_lost", repair.change.cost)
        | rate_columns("sent_to_target", repair.change.sent)
        | {"heads_flagged_clean": repair.flagged_clean, "heads_flagged_suspect": repair.flagged_suspect}
        for repair in result.repairs
    ]
    return {
        "settings": [setting.row() for setting in result.settings],
        "layers": layers,
        "components": components,
        "repairs": repairs,
        "detectors": list(_detectors(result)),
        "scores": list(_scores(result)),
        "classes": [
            {"class": c.name} | rate_columns("clean", c.clean) | rate_columns("suspect", c.suspect)
            for c in result.class_shares
        ],
    }


def tables_of_scan(result: ScanResult) -> dict[str, list[Row]]:
    """`probes` and `predictions` of a scan, and `components` where there is a reference."""
    predicted = zip(result.class_names, result.predicted, strict=True)
    found = {
        "probes": result.rows(),
        "predictions": [{"class": name} | rate_columns("predicted", rate) for name, rate in predicted],
    }
    if (statistics := result.statistics) is not None:
        heads, mlps = statistics.heads.tolist(), statistics.mlps.tolist()
        found["components"] = [
            _place(layer, head) | {"unlike": value}
            for layer, values in enumerate(heads)
            for head, value in enumerate(values)
        ] + [_place(layer, None) | {"unlike": value} for layer, value in enumerate(mlps)]
    return found


def as_csv(rows: list[Row]) -> str:
    """Comma-separated, with a header of all columns; an empty cell where a row has no such number.

    Texts are quoted and no formulas, whatever a spreadsheet takes for the separator; numbers are as they are.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = ["" if (cell := row.get(column)) is None else cell for column in columns]
        writer.writerow([inert(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def as_link(rows: list[Row]) -> str:
    """The CSV as an address of its own, which a page can offer without a network or a second file."""
    return "data:text/csv;charset=utf-8," + quote(as_csv(rows))


def _place(layer: int | None, head: int | None) -> Row:
    return {"kind": "MLP" if head is None else "head", "layer": layer, "head": head}


def _detectors(result: AuditResult) -> Iterator[Row]:
    named = (
        {} if result.suspicion is None else {"without a hint": (result.suspicion.threshold, result.suspicion)}
    )
    named |= {
        f"Decomp-Det, {rule_name(found.similarity, found.threshold)}": (found.zeta, found)
        for found in result.detectors
    }
    for name, (threshold, found) in named.items():
        yield (
            {"detector": name, "threshold": threshold}
            | interval_columns("auroc", (found.auroc, found.auroc_low, found.auroc_high))
            | rate_columns("false_positives", found.false_positives)
            | rate_columns("true_positives", found.true_positives)
        )


def _scores(result: AuditResult) -> Iterator[Row]:
    if (found := result.suspicion) is None:
        return
    edges, counts = found.edges.tolist(), (found.clean_counts.tolist(), found.suspect_counts.tolist())
    for low, high, clean, suspect in zip(edges, edges[1:], *counts, strict=False):
        yield {"from": low, "to": high, "clean": clean, "suspect": suspect}


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, value) rows."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}: ")
        elif value is not None:
            text = f"{value:.1e}" if name == "sum_error" else str(value)
            rows.append((f"{prefix}{str(name).replace('_', ' ')}", text))
    return rows
