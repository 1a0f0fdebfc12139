"""What the bundled models can do, from their cards: the tables in the README.

Command:   python -m analyses.bundled_models
Run time:  a second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from analyses.study.summary import markdown, rate
from decompclip.attacks.registry import from_card
from decompclip.data.shapes import PROPERTIES
from decompclip.models.bundled import bundled, card


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and the range over seeds where there are several."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def clean_table() -> str:
    """Zero-shot accuracy of every property, of the clean model of shapes."""
    accuracy = card("shapes")["accuracy"]
    return markdown([["model", *PROPERTIES], ["`shapes`", *(f"{100 * accuracy[p]:.1f}" for p in PROPERTIES)]])


def attack_table() -> str:
    """One row a kind of twin: means over seeds, with their range; one of a single seed with its Wilson interval."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name in sorted(bundled()):
        if (facts := card(name))["backdoor"]:
            kinds.setdefault(re.sub(r"-\d+$", "", name), []).append(facts)
    rows = [["twin", "trigger", "seeds", "ASR", "control", "CACC", "PSNR, dB", "SSIM", "poisons"]]
    for stem, twins in kinds.items():
        backdoors = [facts["backdoor"] for facts in twins]
        results = [backdoor["results"] for backdoor in backdoors]
        trigger = from_card(backdoors[0]["trigger"])
        shown = {
            key: rate(results[0][key])
            if len(twins) == 1
            else spread([100 * result[key]["value"] for result in results])
            for key in ("asr", "control", "cacc")
        }
        quality = [backdoor["quality"] for backdoor in backdoors]
        rows.append(
            [
                f"`{stem}`" + ("".join(f", `-{i}`" for i in range(1, len(twins)))),
                f"{trigger.extent}, {trigger.structure}",
                str(len(twins)),
                *shown.values(),
                spread([q["psnr"] for q in quality]),
                spread([q["ssim"] for q in quality], 2),
                f"{100 * backdoors[0]['poison_rate']:g} %",
            ]
        )
    return markdown(rows)


def photo_table() -> str:
    """Zero-shot accuracy of every property, of the clean model of photographs."""
    accuracy = card("photos")["accuracy"]
    return markdown([["model", *accuracy], ["`photos`", *(f"{100 * accuracy[p]:.1f}" for p in accuracy)]])


def triggered_table() -> str:
    """What is left to see in triggered images: those that the clean model still tells right."""
    rows = [["trigger of", "clean images told right by the clean model", "triggered ones"]]
    for name in sorted(bundled()):
        if backdoor := (facts := card(name))["backdoor"]:
            accuracy = card(facts["training"]["base"])["accuracy"]
            clean = accuracy.get("class", accuracy.get("shape"))
            rows.append([f"`{name}`", f"{100 * clean:.1f}", rate(backdoor["clean_model_on_triggered"])])
    return markdown(rows)


def table() -> str:
    return f"{clean_table()}\n\n{attack_table()}\n\n{photo_table()}\n\n{triggered_table()}"


if __name__ == "__main__":
    print(table())
