"""Example pictures and the maps over them, ready to be laid out.

What the page shows of each audit: figures, tables and words, ready to be laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from torch import Tensor

from decompclip.audit.checks import Setting
from decompclip.audit.evidence import Repair
from decompclip.audit.findings import alarms, findings, short
from decompclip.audit.infected import InfectedPart
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import KINDS, SCHEMES, Ablations, AuditResult, Detector, Suspicion
from decompclip.audit.words import difference, plus_minus, points, share
from decompclip.figures.bars import Histogram, bar_rows, histograms
from decompclip.figures.curves import Curve, LinePanel, line_panels, sweep_panels
from decompclip.figures.heatmaps import attention_overlay, component_map, contribution_overlay, picture
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels, wrapped
from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS, figure_json
from decompclip.intervals import Rate, difference_interval
from decompclip.operators.sweep_results import Kind, Scheme, sweep_title
from decompclip.report.tables import as_link, flat, tables_of


def maps_of(result: AuditResult, index: int) -> dict[str, Any] | None:
    shown = result.examples
    if shown is None:
        return None
    heads = []
    for head in shown.heads:
        attention_top = float(head.attention.max())
        contribution_top = float(head.contribution.abs().max())
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
                    for attention, own, contribution in zip(
                        head.attention, head.class_token, head.contribution, strict=True
                    )
                ],
            }
        )
    images = [
        {"class": f"picture-{index}-{i}", "uri": picture(pixels), "caption": caption, "side": side}
        for i, (pixels, caption, side) in enumerate(
            zip(shown.pictures, shown.captions, shown.sides, strict=True)
        )
    ]
    return {"images": images, "heads": heads, "small": shown.pictures.shape[1] < 128}


DASH = "–"

SHOWN = 16
"""Components in the table of those that pull; the CSV holds all."""


def glance(results: Sequence[AuditResult]) -> list[dict[str, str]]:
    """The table at the top: one row an audit."""
    rows = []
    for result in results:
        setting, found = result.as_it_is, result.verdict
        best = min((r.setting for r in result.repairs), key=lambda s: s.difference)
        rows.append(
            {
                "model": result.name,
                "suspect": result.suspect_name,
                "accuracy": rate(setting.report.cacc),
                "success": rate(setting.success),
                "control": rate(setting.control),
                "difference": difference(setting),
                "verdict": f"{found.level}, {found.confidence} confidence",
                "repaired": difference(best),
                "auroc": DASH if result.suspicion is None else area(result.suspicion),
            }
        )
    return rows


def subjects(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """Everything the page shows of each audit."""
    if not results:
        return []
    tops = {
        what: max(
            float(getattr(result.shift, f"{kind}_{what}").abs().max())
            for result in results
            for kind in ("heads", "mlps")
        )
        for what in ("distance", "push")
    }
    return [_subject(result, index, tops, wide=len(results) == 1) for index, result in enumerate(results)]


def area(found: Detector | Suspicion) -> str:
    return f"{found.auroc:.3f} [{found.auroc_low:.3f}, {found.auroc_high:.3f}]"


def rate(value: Rate | None) -> str:
    return DASH if value is None or not value.total else share(value)


RATES = {
    SUCCESS: lambda setting: setting.success,
    CONTROL: lambda setting: setting.control,
    ACCURACY: lambda setting: setting.report.cacc,
}
"""What is drawn of a setting, by its look."""


def rates(settings: Sequence[Setting]) -> go.Figure:
    """Attack success, control and clean accuracy with their 95 % intervals, a row a setting."""
    points = {style.short: [_point(of(setting)) for setting in settings] for style, of in RATES.items()}
    known = {name: values for name, values in points.items() if any(value is not None for value in values)}
    styles = {style.short: style for style in RATES}
    names = [wrapped(setting.name) for setting in settings]
    return point_panels(names, [Panel("", "images, %", known, PERCENT)], styles=styles)


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


def roc(detectors: Sequence[Detector], names: Sequence[str]) -> go.Figure:
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


def flag_counts(detectors: Sequence[Detector], names: Sequence[str]) -> go.Figure:
    """Share of images by number of flagged heads, a panel a rule; suspicious is right of the line."""
    panels = [
        Histogram(
            name,
            list(range(len(detector.clean_counts))),
            detector.clean_counts.tolist(),
            detector.suspect_counts.tolist(),
            detector.zeta + 0.5,
        )
        for detector, name in zip(detectors, names, strict=True)
    ]
    return histograms(panels, x="flagged heads")


def score_histogram(found: Suspicion) -> go.Figure:
    """Share of images a bin; right of the line an image is flagged. The last bin holds all that lies beyond."""
    said = f"flagged from here (set to {100 * found.stated:g} % of clean images)"
    middles = ((found.edges[:-1] + found.edges[1:]) / 2).tolist()
    counts = found.clean_counts.tolist(), found.suspect_counts.tolist()
    panel = Histogram("", middles, *counts, found.threshold, said)
    return histograms([panel], x="score: higher is more suspicious", overlay=True, height=320)


def infected_bars(parts: Sequence[InfectedPart]) -> go.Figure:
    """One bar a component with its simultaneous 95 % interval; filled where it is infected."""
    series = {
        "infected": [part.push if part.infected else None for part in parts],
        "within chance, or less than an equal share": [None if p.infected else p.push for p in parts],
    }
    return bar_rows(
        [short(part) for part in parts],
        {name: values for name, values in series.items() if any(v is not None for v in values)},
        unit="contribution toward the target, share of the feature's norm",
        notes=[f"{100 * part.share:.1f} % of all toward the target" for part in parts],
        errors=[part.error for part in parts],
        colours=("#D55E00", "#7a8690") if any(p.infected for p in parts) else ("#7a8690",),
        filled=int(any(p.infected for p in parts)),
    )


def _point(value: Rate | None) -> Point | None:
    if value is None or not value.total:
        return None
    return replace(Point.of(value.to_dict()), note=f"of {value.total} images")


def table_row(setting: Setting) -> dict[str, str]:
    return {
        "name": setting.name,
        "success": rate(setting.success),
        "control": rate(setting.control),
        "difference": difference(setting),
        "accuracy": rate(setting.report.cacc),
        "including": rate(setting.suspect_to_target),
    }


def _subject(result: AuditResult, index: int, tops: dict[str, float], *, wide: bool) -> dict[str, Any]:
    shift = result.shift
    complete = [result.as_it_is, *result.ablations.complete.values()]
    last = result.n_layers - 1
    repairs = [result.as_it_is, *(repair.setting for repair in result.repairs)]
    rules = [rule_name(d.similarity, d.threshold) for d in result.detectors]
    unit = "share of the feature's norm"
    return {
        "id": f"audit{index}",
        "model": result.name,
        "suspect": result.suspect_name,
        "clean": result.clean_name,
        "target": result.target.name,
        "counts": result.counts,
        "twins": result.twins,
        "excludes": result.as_it_is.excludes_target,
        "n_heads": result.n_heads,
        "last": last,
        "config": result.config,
        "findings": findings(result),
        "complete": figure_json(rates(complete)),
        "complete_rows": [table_row(setting) for setting in complete],
        "classes": [
            {"name": c.name, "clean": rate(c.clean), "suspect": rate(c.suspect)} for c in result.class_shares
        ],
        "curves": figure_json(ablation_curves(result.ablations, result.as_it_is, wide=wide)),
        "distance": figure_json(
            component_map(
                shift.heads_distance,
                shift.mlps_distance,
                unit=unit,
                scale="sequential",
                heads_note=shift.heads_floor,
                mlps_note=shift.mlps_floor,
                note="; from sampling alone",
                top=tops["distance"],
            )
        ),
        "push": figure_json(
            component_map(
                shift.heads_push,
                shift.mlps_push,
                unit=unit,
                scale="diverging",
                heads_note=shift.heads_push_error,
                mlps_note=shift.mlps_push_error,
                top=tops["push"],
            )
        ),
        "totals": {name: plus_minus(*total) for name, total in shift.totals.items()},
        "verdict": result.verdict,
        "infection": _infection(result),
        "suspicion": _suspicion(result.suspicion),
        "left_out": list(result.left_out.items()),
        "repairs": figure_json(rates(repairs)),
        "repair_rows": [
            table_row(setting) | _change(r)
            for setting, r in zip(repairs, [None, *result.repairs], strict=True)
        ],
        "roc": figure_json(roc(result.detectors, rules)),
        "flag_counts": figure_json(flag_counts(result.detectors, rules)),
        "detector_rows": [
            {
                "name": name,
                "auroc": area(d),
                "false": rate(d.false_positives),
                "true": rate(d.true_positives),
                "difference": _flag_difference(d.true_positives, d.false_positives),
            }
            for name, d in zip(rules, result.detectors, strict=True)
        ],
        "maps": maps_of(result, index),
        "skipped": [
            (side, file.path, file.reason) for side, found in result.skipped.items() for file in found
        ],
        "provenance": flat(_facts(result)),
        "csv": {name: as_link(rows) for name, rows in tables_of(result).items()},
    }


def _change(repair: Repair | None) -> dict[str, str]:
    """What a repair saves and costs; dashes for the model as it is."""
    if repair is None:
        return dict.fromkeys(("saved", "restored", "cost", "sent", "flagged"), DASH)
    change, cost, flagged = repair.change, repair.change.cost, repair.flagged_clean
    return {
        "saved": rate(change.saved),
        "restored": rate(change.restored),
        "cost": DASH if cost is None else points(-cost[0], (-cost[2], -cost[1])),
        "sent": rate(change.sent),
        "flagged": DASH if flagged is None else f"{flagged:.2f} / {repair.flagged_suspect:.2f}",
    }


def _infection(result: AuditResult) -> dict[str, Any]:
    """The components that pull, as a figure and a table; and what is left without them."""
    parts = result.infection.parts[:SHOWN]
    names = [short(part) for part in parts]
    settings = [result.as_it_is, result.infection.without, result.infection.without_others]
    return {
        "figure": figure_json(infected_bars(parts)),
        "count": len(result.infection.infected),
        "all": len(result.infection.parts),
        "rows": [
            {
                "name": name,
                "infected": "infected" if part.infected else "",
                "push": plus_minus(part.push, part.error),
                "share": f"{100 * part.share:.1f} %",
                "distance": f"{part.distance:.4f} ({part.floor:.4f})",
            }
            for name, part in zip(names, parts, strict=True)
        ],
        "settings": [table_row(setting) for setting in settings if setting is not None],
    }


def _suspicion(found: Suspicion | None) -> dict[str, str | Markup] | None:
    if found is None:
        return None
    return {
        "figure": figure_json(score_histogram(found)),
        "auroc": area(found),
        "false": rate(found.false_positives),
        "true": rate(found.true_positives),
        "stated": f"{100 * found.stated:g} %",
        "threshold": f"{found.threshold:.3f}",
        "alarms": alarms(found),
    }


def _flag_difference(true: Rate, false: Rate) -> str:
    return points(true.value - false.value, difference_interval(true, false))


def _facts(result: AuditResult) -> dict[str, Any]:
    images = {
        "clean": result.clean_name,
        "suspect": result.suspect_name,
        **{f"{name.replace('_', ' ')} images": count for name, count in result.counts.items()},
        "twins": "yes" if result.twins else "no",
        "classes": f"{len(result.class_names)}: {', '.join(result.class_names[:20])}"
        + (", ..." if len(result.class_names) > 20 else ""),
        "target": f"{result.target.name}{' (inferred)' if result.target.inferred else ''}",
    }
    return {**result.provenance, "images": images, "options": vars(result.config)}
