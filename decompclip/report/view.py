"""What the page shows of each result: the result itself, its figures and pictures, and its tables for downloads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from torch import Tensor

from decompclip.audit.checks import Setting, interval_columns, rate_columns
from decompclip.audit.components import InfectedPart, short
from decompclip.audit.findings import findings
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import KINDS, SCHEMES, Ablations, AuditResult, Detection, Suspicion
from decompclip.audit.scan_result import ScanResult
from decompclip.display import inert, some
from decompclip.figures.bars import Histogram, bar_rows, class_scores, histograms
from decompclip.figures.curves import Curve, LinePanel, line_panels, sweep_panels
from decompclip.figures.heatmaps import Scale, attention_overlay, component_map, contribution_overlay, picture
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels, wrapped
from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS, figure_json
from decompclip.intervals import Rate
from decompclip.operators.sweep_results import Kind, Scheme, sweep_title

SHOWN = 16
"""Components in the table of the most affected, and classes drawn of a scan; the CSV holds all."""

SMALL = 128
"""Side of pictures, in pixels, below which they are enlarged without smoothing."""

RATES = {
    SUCCESS: lambda setting: setting.success,
    CONTROL: lambda setting: setting.control,
    ACCURACY: lambda setting: setting.report.cacc,
}
"""What is drawn of a setting, by its look."""


def subjects(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """Everything the page shows of each audit; maps of components have one scale on the page."""
    shifts = [result.shift for result in results]
    tops = {
        what: max(float(getattr(shift, f"{kind}_{what}").abs().max()) for shift in shifts for kind in KINDS)
        for what in ("distance", "contribution")
        if shifts
    }
    return [_subject(result, index, tops, wide=len(results) == 1) for index, result in enumerate(results)]


def _subject(result: AuditResult, index: int, tops: dict[str, float], *, wide: bool) -> dict[str, Any]:
    rules = [rule_name(d.similarity, d.threshold) for d in result.detectors]
    parts, repairs = result.infection.parts[:SHOWN], [repair.setting for repair in result.repairs]
    figures = {
        "complete": rates([result.as_it_is, *result.ablations.complete.values()]),
        "curves": ablation_curves(result.ablations, result.as_it_is, wide=wide),
        "components": component_bars(parts),
        "repairs": rates([result.as_it_is, *repairs]),
        "roc": roc(result.detectors, rules),
        "flag_counts": flag_counts(result.detectors, rules),
    }
    looks: dict[str, tuple[str, Scale]] = {
        "distance": ("floor", "sequential"),
        "contribution": ("error", "diverging"),
    }
    for what, (beside, scale) in looks.items():
        values, notes = (
            [getattr(result.shift, f"{kind}_{name}") for kind in KINDS] for name in (what, beside)
        )
        figures[what] = component_map(
            *values,
            unit="share of the feature's norm",
            scale=scale,
            heads_note=notes[0],
            mlps_note=notes[1],
            top=tops[what],
            **({"note": "; from sampling alone"} if what == "distance" else {}),
        )
    if result.suspicion is not None:
        figures["scores"] = score_histogram(result.suspicion)
    skipped = [(side, file.path, file.reason) for side, files in result.skipped.items() for file in files]
    facts = {
        "suspect": result.suspect_name,
        **{f"{name.replace('_', ' ')} images": count for name, count in result.counts.items()},
        "paired": "yes" if result.paired else "no",
        "target": f"{result.target.name}{' (inferred)' if result.target.inferred else ''}",
    }
    return _shown(result, index, figures, facts, skipped, tables_of(result)) | {
        "suspect": result.suspect_name,
        "findings": findings(result),
        "parts": [(short(part.part), part) for part in parts],
        "rules": list(zip(rules, result.detectors, strict=True)),
        "maps": maps_of(result, index),
    }


def _shown(
    result: AuditResult | ScanResult,
    index: int,
    figures: Mapping[str, go.Figure],
    facts: dict[str, Any],
    skipped: list[tuple[str, str, str]],
    tables: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """What the page shows of an audit and of a scan alike."""
    names, weights = result.class_names, result.weights
    if weights is not None and weights.parts:
        tables = {**tables, "weights-parts": [*weights.parts]}
    if weights is not None and weights.classes:
        tables = {**tables, "weights-classes": [*weights.classes]}
        drawn = ([entry[key] for entry in weights.classes] for key in ("class", "score"))
        figures = {**figures, "weights": class_scores(*drawn)}
    images = {
        "clean": result.clean_name,
        **facts,
        "classes": f"{len(names)}: {some(names, 20)}",
    }
    return {
        "id": f"audit{index}",
        "model": result.name,
        "suspect": "",
        "result": result,
        "figures": {name: figure_json(figure) for name, figure in figures.items()},
        "skipped": skipped,
        "provenance": flat({**result.provenance, "images": images, "options": vars(result.config)}),
        "csv": {name: as_link(rows) for name, rows in tables.items()},
    }


def maps_of(result: AuditResult, index: int) -> dict[str, Any] | None:
    """Example pictures, and the maps over them of a few heads."""
    shown = result.examples
    if shown is None:
        return None
    heads = []
    for head in shown.heads:
        attention_top = float(head.attention.max())
        contribution_top = float(head.contribution.abs().max())
        maps = zip(head.attention, head.class_token, head.contribution, strict=True)
        heads.append(
            {
                "name": f"{head.layer}.{head.head}",
                "affected": head.affected,
                "attention_top": f"{attention_top:.2f}",
                "contribution_top": f"{contribution_top:.4f}",
                "cells": [
                    {
                        "attention": attention_overlay(attention, attention_top),
                        "class_token": f"{float(own):.2f}",
                        "contribution": contribution_overlay(contribution, contribution_top),
                        "sum": f"{float(contribution.sum()):+.4f}".replace("-", "−"),
                    }
                    for attention, own, contribution in maps
                ],
            }
        )
    images = [
        {"class": f"picture-{index}-{i}", "uri": picture(pixels), "caption": caption, "side": side}
        for i, (pixels, caption, side) in enumerate(
            zip(shown.pictures, shown.captions, shown.sides, strict=True)
        )
    ]
    return {"images": images, "heads": heads, "small": shown.pictures.shape[1] < SMALL}


def rates(settings: Sequence[Setting]) -> go.Figure:
    """Attack success, control and clean accuracy with their 95 % intervals, a row a setting."""
    points = {style.short: [_point(of(setting)) for setting in settings] for style, of in RATES.items()}
    known = {name: values for name, values in points.items() if any(value is not None for value in values)}
    styles = {style.short: style for style in RATES}
    names = [wrapped(setting.name) for setting in settings]
    return point_panels(names, [Panel("", "images, %", known, PERCENT)], styles=styles, bars="95 % interval")


def _point(value: Rate | None) -> Point | None:
    if value is None or not value.total:
        return None
    return replace(Point.of(value.to_dict()), note=f"of {value.total} images")


def ablation_curves(ablations: Ablations, before: Setting, *, wide: bool = True) -> go.Figure:
    """Mean-ablation layer by layer, a panel for each kind of component and scheme (He et al., Figures 1 and 2).

    Args:
        ablations: what was measured.
        before: the model as it is.
        wide: three panels in a line, for a whole page's width; else two.
    """
    order: list[tuple[Kind, Scheme]] = [(k, s) for k in KINDS for s in SCHEMES]
    if not wide:
        order = [(k, s) for s in SCHEMES for k in KINDS]
    panels = {
        sweep_title(kind, scheme, len(settings)): {
            style: [_point(of(setting)) for setting in settings] for style, of in RATES.items()
        }
        for kind, scheme in order
        if (settings := ablations.sweeps[kind][scheme])
    }
    levels = {style: 100 * of(before).value for style, of in RATES.items() if of(before) is not None}
    return sweep_panels(panels, levels, columns=3 if wide else 2)


def roc(detectors: Sequence[Detection], names: Sequence[str]) -> go.Figure:
    """One curve a rule; the large point on it is the detector's own threshold."""
    curves = {}
    for detector, name in zip(detectors, names, strict=True):
        false, true = _at_least(detector.clean_counts), _at_least(detector.suspect_counts)
        curves[name] = Curve(false, true, large=min(detector.zeta + 1, len(false) - 1))
    x, y = "clean images called suspicious, %", "suspect images called suspicious, %"
    panel = LinePanel("", x, y, curves, ends=PERCENT, diagonal=True)
    return line_panels([panel], columns=1, row_height=290)


def _at_least(counts: Tensor) -> list[float]:
    """Percent of images with at least 0, 1, ... flagged heads, and with more than all: 100 to 0."""
    return [*(100 * counts.flip(0).cumsum(0).flip(0).double() / counts.sum()).tolist(), 0.0]


def flag_counts(detectors: Sequence[Detection], names: Sequence[str]) -> go.Figure:
    """Share of images by number of flagged heads, a panel a rule; suspicious is right of the line."""
    panels = []
    for detector, name in zip(detectors, names, strict=True):
        clean, suspect = detector.clean_counts.tolist(), detector.suspect_counts.tolist()
        panels.append(Histogram(name, list(range(len(clean))), clean, suspect, detector.zeta + 0.5))
    return histograms(panels, x="flagged heads")


def score_histogram(found: Suspicion) -> go.Figure:
    """Share of images a bin; right of the line an image is flagged. The last bin holds all that lies beyond."""
    line = f"flagged from here (set to {100 * found.stated:g} % of clean images)"
    middles = ((found.edges[:-1] + found.edges[1:]) / 2).tolist()
    counts = found.clean_counts.tolist(), found.suspect_counts.tolist()
    panel = Histogram("", middles, *counts, found.threshold, line)
    return histograms([panel], x="score: higher is more suspicious", overlay=True, height=320)


def component_bars(parts: Sequence[InfectedPart]) -> go.Figure:
    """One bar a component with its simultaneous 95 % interval; filled where it stands out."""
    series = {
        "beyond chance, and more than an equal share": [
            part.contribution if part.infected else None for part in parts
        ],
        "within chance, or less than an equal share": [
            None if part.infected else part.contribution for part in parts
        ],
    }
    any_infected = any(part.infected for part in parts)
    return bar_rows(
        [short(part.part) for part in parts],
        {name: values for name, values in series.items() if any(v is not None for v in values)},
        unit="contribution toward the target, share of the feature's norm",
        notes=[f"{100 * part.share:.1f} % of all toward the target" for part in parts],
        errors=[part.error for part in parts],
        bars="95 % interval, of all components at once",
        colours=("#D55E00", "#7a8690") if any_infected else ("#7a8690",),
        filled=int(any_infected),
    )


def scans(results: Sequence[ScanResult], *, first: int = 0) -> list[dict[str, Any]]:
    """Everything the page shows of each scan; `first` numbers them on from what stands before."""
    return [_scan(result, first + place) for place, result in enumerate(results)]


def _scan(result: ScanResult, index: int) -> dict[str, Any]:
    figures = {"classes": class_changes(result)}
    if (statistics := result.statistics) is not None:
        figures["statistics"] = component_map(
            statistics.heads, statistics.mlps, unit="unlike the reference", scale="sequential"
        )
    facts = {"to search on": result.counts["fit"], "held out": result.counts["held_out"]}
    skipped = [("clean", file.path, file.reason) for file in result.skipped]
    predicted = zip(result.class_names, result.predicted, strict=True)
    return _shown(result, index, figures, facts, skipped, tables_of_scan(result)) | {
        "pictures": [list(_pictures(result, index, place)) for place in range(len(result.probes))],
        "small": result.probes[0].pictures.shape[2] < SMALL,
        "favoured": sorted(predicted, key=lambda item: -item[1].value),
    }


def _pictures(result: ScanResult, index: int, place: int) -> Iterator[dict[str, str]]:
    """Held-out images of a probe, each as it is and changed."""
    probe = result.probes[place]
    captions = ("as it is", f"changed toward {probe.easiest.name}")
    for i, pair in enumerate(probe.pictures):
        for side, (pixels, caption) in enumerate(zip(pair, captions, strict=True)):
            name = f"probe-{index}-{place}-{i}-{side}"
            yield {"class": name, "uri": picture(pixels), "caption": caption}


def class_changes(result: ScanResult) -> go.Figure:
    """Success with its 95 % interval, a row a class, a panel a probe; the reference's beside where there is one."""
    best: dict[str, float] = {}
    for change in (change for probe in result.probes for change in probe.classes):
        best[change.name] = max(best.get(change.name, 0.0), change.success.value)
    names = sorted(best, key=lambda name: -best[name])[:SHOWN]
    shown = [result] if result.reference is None else [result, result.reference]
    panels = []
    for place, probe in enumerate(result.probes):
        points: dict[str, list[Point | None]] = {}
        for scan in shown:
            found = {change.name: Point.of(change.success.to_dict()) for change in scan.probes[place].classes}
            points[scan.name] = [found.get(name) for name in names]
        panels.append(Panel(probe.probe, "images sent there, %", points, ends=PERCENT))
    return point_panels(names, panels, bars="95 % interval")


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
