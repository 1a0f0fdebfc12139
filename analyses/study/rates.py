"""ASR, control and CACC of models under several settings: the tables and figures that most analyses end in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analyses.study.summary import by_attack, interval_text, markdown, over_seeds
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels

RATES = {"asr": "attack success", "control": "control", "cacc": "clean accuracy"}

BARS = "95 % interval; of several models, their range"
"""What the bars of a figure are."""

Published = Mapping[str, Mapping[str, tuple[float | None, float]]]
"""The paper's own ASR and CACC, by attack and setting; of ViT-B/32 on ImageNet-1K unless said otherwise."""


def points(record: Mapping[str, Any], names: Sequence[str], setting: str, rate: str) -> Point | None:
    """Over the models that have this setting; None where none has."""
    found = [record["found"]["models"][name].get(setting) for name in names]
    rates = [report[rate] for report in found if report is not None and report[rate] is not None]
    return over_seeds(rates) if rates else None


def rates_figure(
    record: Mapping[str, Any], settings: Sequence[str], labels: Mapping[str, str] | None = None
) -> Any:
    """A row an attack, a panel a rate, a series a setting; `labels` for those that are shown by another name."""
    attacks = by_attack(record)
    rows = [f"{attack} ({record['models'][names[0]]['kind']})" for attack, names in attacks.items()]
    panels = [
        Panel(
            title,
            "images, %",
            {
                (labels or {}).get(s, s): [points(record, names, s, rate) for names in attacks.values()]
                for s in settings
            },
            PERCENT,
        )
        for rate, title in RATES.items()
    ]
    return point_panels(rows, panels, bars=BARS)


def rates_table(
    record: Mapping[str, Any], settings: Sequence[str], published: Published | None = None
) -> str:
    """A row an attack and setting; the paper's numbers beside, where it has the attack."""
    head = ["attack", "trigger", "setting", "ASR, %", "control, %", "CACC, %"]
    rows = [head + (["paper: ASR", "paper: CACC"] if published else [])]
    for attack, names in by_attack(record).items():
        for setting in settings:
            found = [points(record, names, setting, rate) for rate in RATES]
            if all(point is None for point in found):
                continue
            cells = ["" if point is None else interval_text(point) for point in found]
            row = [attack, record["models"][names[0]]["kind"], setting, *cells]
            if published:
                theirs = published.get(attack, {}).get(setting)
                row += ["" if x is None else f"{x:.2f}" for x in theirs or (None, None)]
            rows.append(row)
    return markdown(rows)


def excess(report: Mapping[str, Any]) -> float:
    """ASR minus control, in points: what the trigger does beyond what the setting does to every image."""
    return 100 * (report["asr"]["value"] - report["control"]["value"])
