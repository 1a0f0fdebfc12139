"""Every table of a report as rows of plain numbers at full precision: what its CSV downloads hold."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from decompclip.audit.checks import Setting
from decompclip.audit.evidence import Repair
from decompclip.audit.infected import InfectedPart
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult
from decompclip.audit.scan.result import ScanResult
from decompclip.intervals import Rate
from decompclip.printable import inert

Row = dict[str, Any]


def tables_of(result: AuditResult) -> dict[str, list[Row]]:
    """`settings`, `layers`, `components`, `repairs`, `detectors`, `scores` and `classes` of an audit."""
    infection = result.infection
    settings = [result.as_it_is, *result.ablations.complete.values()]
    settings += [s for s in (infection.without, infection.without_others) if s is not None]
    layers = [
        {"kind": kind, "scheme": scheme, "layer": layer} | _setting(setting)
        for kind, schemes in result.ablations.sweeps.items()
        for scheme, found in schemes.items()
        for layer, setting in enumerate(found)
    ]
    return {
        "settings": [_setting(setting) for setting in settings],
        "layers": layers,
        "components": [_component(part) for part in infection.parts],
        "repairs": [_repair(repair) for repair in result.repairs],
        "detectors": list(_detectors(result)),
        "scores": list(_scores(result)),
        "classes": [
            {"class": c.name} | _rate("clean", c.clean) | _rate("suspect", c.suspect)
            for c in result.class_shares
        ],
    }


def tables_of_scan(result: ScanResult) -> dict[str, list[Row]]:
    """`probes` and `predictions` of a scan, and `components` where there is a reference."""
    found = {
        "probes": [
            {"probe": probe.probe, "class": change.name}
            | _rate("success", change.success)
            | {
                "loss": change.loss,
                "lead": probe.lead,
                "lead_low": probe.lead_low,
                "lead_high": probe.lead_high,
            }
            for probe in result.probes
            for change in probe.classes
        ],
        "predictions": [
            {"class": name} | _rate("predicted", rate)
            for name, rate in zip(result.class_names, result.predicted, strict=True)
        ],
    }
    if (statistics := result.statistics) is None:
        return found
    rows: list[Row] = [
        {"kind": "head", "layer": layer, "head": head, "unlike": float(value)}
        for layer, values in enumerate(statistics.heads)
        for head, value in enumerate(values)
    ]
    rows += [
        {"kind": "MLP", "layer": layer, "head": "", "unlike": float(value)}
        for layer, value in enumerate(statistics.mlps)
    ]
    return found | {"components": rows}


def as_csv(rows: list[Row]) -> str:
    """Comma-separated, with a header of all columns; an empty cell where a row has no such number.

    Texts are quoted and no formulas, whatever a spreadsheet takes for the separator; numbers are as they are.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = [row.get(column, "") for column in columns]
        writer.writerow([inert(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def as_link(rows: list[Row]) -> str:
    """The CSV as an address of its own, which a page can offer without a network or a second file."""
    return "data:text/csv;charset=utf-8," + quote(as_csv(rows))


def _rate(name: str, rate: Rate | None) -> Row:
    if rate is None or not rate.total:
        return {name: "", f"{name}_low": "", f"{name}_high": "", f"{name}_images": 0}
    return {
        name: rate.value,
        f"{name}_low": rate.low,
        f"{name}_high": rate.high,
        f"{name}_images": rate.total,
    }


def _interval(name: str, values: tuple[float, float, float] | None) -> Row:
    keys = (name, f"{name}_low", f"{name}_high")
    return dict(zip(keys, values or ("", "", ""), strict=True))


def _setting(setting: Setting) -> Row:
    return (
        {"setting": setting.name}
        | _rate("attack_success", setting.success)
        | _rate("control", setting.control)
        | _interval("difference", (setting.difference, *setting.difference_interval))
        | _rate("clean_accuracy", setting.report.cacc)
    )


def _component(found: InfectedPart) -> Row:
    part = found.part
    return {
        "kind": "MLP" if part.kind == "mlps" else "head",
        "layer": part.layer,
        "head": "" if part.head is None else part.head,
        "push": found.push,
        "push_error": found.error,
        "share": found.share,
        "distance": found.distance,
        "distance_floor": found.floor,
        "infected": int(found.infected),
    }


def _repair(repair: Repair) -> Row:
    change = repair.change
    return (
        _setting(repair.setting)
        | _rate("saved", change.saved)
        | _rate("restored", change.restored)
        | _interval("accuracy_lost", change.cost)
        | _rate("sent_to_target", change.sent)
        | {
            "heads_flagged_clean": _known(repair.flagged_clean),
            "heads_flagged_suspect": _known(repair.flagged_suspect),
        }
    )


def _known(value: float | None) -> float | str:
    return "" if value is None else value


def _detectors(result: AuditResult) -> Iterator[Row]:
    if (found := result.suspicion) is not None:
        area = (found.auroc, found.auroc_low, found.auroc_high)
        yield (
            {"detector": "without a hint", "threshold": found.threshold}
            | _interval("auroc", area)
            | _rate("false_positives", found.false_positives)
            | _rate("true_positives", found.true_positives)
        )
    for found in result.detectors:
        yield (
            {
                "detector": f"Decomp-Det, {rule_name(found.similarity, found.threshold)}",
                "threshold": found.zeta,
            }
            | _interval("auroc", (found.auroc, found.auroc_low, found.auroc_high))
            | _rate("false_positives", found.false_positives)
            | _rate("true_positives", found.true_positives)
        )


def _scores(result: AuditResult) -> Iterator[Row]:
    if (found := result.suspicion) is None:
        return
    edges = found.edges.tolist()
    for low, high, clean, suspect in zip(
        edges, edges[1:], found.clean_counts.tolist(), found.suspect_counts.tolist(), strict=False
    ):
        yield {"from": low, "to": high, "clean": clean, "suspect": suspect}


def flat(facts: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, value) rows."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}: ")
        elif value is not None:
            said = f"{value:.1e}" if name == "sum_error" else str(value)
            rows.append((f"{prefix}{str(name).replace('_', ' ')}", said))
    return rows
