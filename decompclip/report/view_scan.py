"""What the page shows of a scan with clean images alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from decompclip.audit.scan.result import CONCLUDES, ProbeResult, ScanResult
from decompclip.figures.heatmaps import component_map, picture
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels
from decompclip.figures.theme import figure_json
from decompclip.report.tables import as_link, flat, tables_of_scan
from decompclip.report.view import DASH, rate

SHOWN = 5
"""Classes in the table of a probe; the CSV holds all."""


def scans(results: Sequence[ScanResult], *, first: int = 0) -> list[dict[str, Any]]:
    """Everything the page shows of each scan; `first` numbers them on from what stands before."""
    return [_scan(result, first + place) for place, result in enumerate(results)]


DRAWN = 16
"""Classes drawn: those that some probe reaches most easily."""


def class_changes(result: ScanResult) -> go.Figure:
    """Success with its 95 % interval, a row a class, a panel a probe; the reference's beside where there is one."""
    best: dict[str, float] = {}
    for change in (change for probe in result.probes for change in probe.classes):
        best[change.name] = max(best.get(change.name, 0.0), change.success.value)
    names = sorted(best, key=lambda name: -best[name])[:DRAWN]
    scans = {result.name: result} | (
        {} if result.reference is None else {result.reference.name: result.reference}
    )
    panels = []
    for place, probe in enumerate(result.probes):
        points: dict[str, list[Point | None]] = {}
        for label, scan in scans.items():
            found = {change.name: Point.of(change.success.to_dict()) for change in scan.probes[place].classes}
            points[label] = [found.get(name) for name in names]
        panels.append(Panel(probe.probe, "images sent there, %", points, ends=PERCENT))
    return point_panels(names, panels)


def _scan(result: ScanResult, index: int) -> dict[str, Any]:
    statistics = result.statistics
    favoured = sorted(zip(result.class_names, result.predicted, strict=True), key=lambda item: -item[1].value)
    return {
        "id": f"audit{index}",
        "model": result.name,
        "suspect": "",
        "clean": result.clean_name,
        "verdict": result.verdict,
        "concludes": CONCLUDES,
        "config": result.config,
        "counts": result.counts,
        "accuracy": rate(result.accuracy),
        "classes": len(result.class_names),
        "reference": None if result.reference is None else result.reference.name,
        "figure": figure_json(class_changes(result)),
        "probes": [
            _probe(probe, index, place, None if result.reference is None else result.reference.probes[place])
            for place, probe in enumerate(result.probes)
        ],
        "small": result.probes[0].pictures.shape[2] < 128,
        "favoured": [{"name": name, "share": rate(share)} for name, share in favoured[:SHOWN]],
        "statistics": None
        if statistics is None
        else figure_json(
            component_map(statistics.heads, statistics.mlps, unit="unlike the reference", scale="sequential")
        ),
        "skipped": [("clean", file.path, file.reason) for file in result.skipped],
        "provenance": flat(_facts(result)),
        "csv": {name: as_link(rows) for name, rows in tables_of_scan(result).items()},
    }


def _probe(probe: ProbeResult, index: int, place: int, twin: ProbeResult | None) -> dict[str, Any]:
    return {
        "name": probe.probe,
        "lead": lead(probe),
        "left_out": probe.left_out,
        "reference": DASH if twin is None else f"{twin.easiest.name}: {lead(twin)}",
        "rows": [
            {"name": change.name, "success": rate(change.success), "loss": f"{change.loss:.2f}"}
            for change in probe.classes[:SHOWN]
        ],
        "images": [
            {"class": f"probe-{index}-{place}-{i}-{side}", "uri": picture(pixels), "said": said}
            for i, pair in enumerate(probe.pictures)
            for side, (pixels, said) in enumerate(
                zip(pair, ("as it is", f"changed toward {probe.easiest.name}"), strict=True)
            )
        ],
    }


def lead(probe: ProbeResult) -> str:
    return f"{probe.lead:.2f} [{probe.lead_low:.2f}, {probe.lead_high:.2f}]".replace("-", "−")


def _facts(result: ScanResult) -> dict[str, Any]:
    images = {
        "clean": result.clean_name,
        "to search on": result.counts["fit"],
        "held out": result.counts["held_out"],
        "classes": f"{len(result.class_names)}: {', '.join(result.class_names[:20])}"
        + (", ..." if len(result.class_names) > 20 else ""),
    }
    return {**result.provenance, "images": images, "options": vars(result.config)}
