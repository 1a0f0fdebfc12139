"""How far the best change that a scan found sends images to each class, probe by probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from decompclip.figures.panels import PERCENT, Panel, Point, point_panels

if TYPE_CHECKING:
    from decompclip.audit.scan.result import ProbeResult, ScanResult

SHOWN = 16
"""Classes drawn: those that some probe reaches most easily."""


def class_changes(result: ScanResult) -> go.Figure:
    """Success with its 95 % interval, a row a class, a panel a probe; the reference's beside where there is one."""
    easiest = {c.name: c.success.value for probe in reversed(result.probes) for c in probe.classes}
    names = sorted(easiest, key=lambda name: -_best(result, name))[:SHOWN]
    scans = {result.name: result} | (
        {} if result.reference is None else {result.reference.name: result.reference}
    )
    panels = []
    for place, probe in enumerate(result.probes):
        points = {label: _points(scan.probes[place], names) for label, scan in scans.items()}
        panels.append(Panel(probe.probe, "images sent there, %", points, ends=PERCENT))
    return point_panels(names, panels)


def _best(result: ScanResult, name: str) -> float:
    return max(
        (c.success.value for probe in result.probes for c in probe.classes if c.name == name), default=0.0
    )


def _points(probe: ProbeResult, names: list[str]) -> list[Point | None]:
    found = {change.name: change.success for change in probe.classes}
    return [Point.of(found[name].to_dict()) if name in found else None for name in names]
