"""What the page shows of each audit: figures, tables and words, ready to be laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from decompclip.audit.findings import difference, findings, plus_minus, points, share
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import AuditResult, Setting
from decompclip.evaluation.intervals import Rate, difference_interval
from decompclip.figures.components import component_map
from decompclip.figures.curves import ablation_curves
from decompclip.figures.detectors import counts, roc
from decompclip.figures.maps import attention_overlay, contribution_overlay, picture
from decompclip.figures.rates import rates

DASH = "–"


def glance(results: Sequence[AuditResult]) -> list[dict[str, str]]:
    """The table at the top: one row an audit."""
    rows = []
    for result in results:
        setting, detector = result.as_it_is, max(result.detectors, key=lambda d: d.auroc)
        best = min((r.setting for r in result.repairs), key=lambda s: s.difference)
        rows.append(
            {
                "model": result.name,
                "suspect": result.suspect_name,
                "accuracy": rate(setting.report.cacc),
                "success": rate(setting.success),
                "control": rate(setting.control),
                "difference": difference(setting),
                "repaired": difference(best),
                "auroc": f"{detector.auroc:.3f} [{detector.auroc_low:.3f}, {detector.auroc_high:.3f}]",
            }
        )
    return rows


def subjects(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """Everything the page shows of each audit."""
    tops = {
        what: max(
            float(getattr(result.shift, f"{kind}_{what}").abs().max())
            for result in results
            for kind in ("heads", "mlps")
        )
        for what in ("distance", "push")
    }
    return [_subject(result, index, tops, wide=len(results) == 1) for index, result in enumerate(results)]


def rate(value: Rate | None) -> str:
    return DASH if value is None or not value.total else share(value)


def figure_json(plot: go.Figure) -> Markup:
    """A figure as JSON that cannot end the script element it stands in."""
    text = plot.to_json()
    assert text is not None  # None only comes of a file
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


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
    layers = round(result.n_layers * 5 / 12) or 1  # the paper's five of twelve
    mlps = result.ablations.sweeps["mlps"]["backward"][result.n_layers - layers]
    repairs = [result.as_it_is, *(repair.setting for repair in result.repairs), mlps]
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
        "repairs": figure_json(rates(repairs)),
        "repair_rows": [
            table_row(setting)
            | {"flagged": DASH if r is None else f"{r.flagged_clean:.2f} / {r.flagged_suspect:.2f}"}
            for setting, r in zip(repairs, [None, *result.repairs, None], strict=True)
        ],
        "roc": figure_json(roc(result.detectors, rules)),
        "flag_counts": figure_json(counts(result.detectors, rules)),
        "detector_rows": [
            {
                "name": name,
                "auroc": f"{d.auroc:.3f} [{d.auroc_low:.3f}, {d.auroc_high:.3f}]",
                "false": rate(d.false_positives),
                "true": rate(d.true_positives),
                "difference": _flag_difference(d.true_positives, d.false_positives),
            }
            for name, d in zip(rules, result.detectors, strict=True)
        ],
        "maps": _maps(result, index),
        "skipped": [
            (side, file.path, file.reason) for side, found in result.skipped.items() for file in found
        ],
        "provenance": list(_flat(_facts(result))),
    }


def _flag_difference(true: Rate, false: Rate) -> str:
    return points(true.value - false.value, difference_interval(true, false))


def _maps(result: AuditResult, index: int) -> dict[str, Any] | None:
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


def _flat(facts: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, value) rows."""
    rows = []
    for name, value in facts.items():
        if hasattr(value, "items"):
            rows += _flat(value, f"{prefix}{name}: ")
        elif value is not None:
            rows.append(
                (
                    f"{prefix}{str(name).replace('_', ' ')}",
                    f"{value:.1e}" if name == "sum_error" else str(value),
                )
            )
    return rows
