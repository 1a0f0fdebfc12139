"""Table 5: what stands in for the infected components.

Paper:     He et al. (2025), Table 5 and section 5.5: without all heads or MLPs, zero, noise, prototypes.
Command:   python -m analyses.table5 --model-family shapes
Run time:  about 4 minutes, one thread.
Expected:  all heads matter to local triggers, all MLPs to global ones; zero is worse than prototypes, noise ruins accuracy.
Writes:    analyses/results/FAMILY/table5.json, table5.png

"Abandon" and "Random Prototypes" are Decomp-Rep, with the right hint, with another fill. The code's noise has standard normal
entries, many times longer than a term; beside it stands noise of the terms' own size ("matched").
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analyses.paper.published import SETTING, TABLE5
from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.rates import excess, rates_figure, rates_table
from analyses.study.summary import SPREAD, mean, over_models
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.defenses.decomp import DecompRep
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.noise import RandomAblate

TITLE = "Table 5: all heads, all MLPs, and other fills than prototypes"

NOISE = ("w/ Random Prototypes", "w/ Random Prototypes, matched")
ROWS = ("No Defense", "w/o all heads", "w/o all MLPs", "w/ Abandon", *NOISE, "Decomp-Rep")


@dataclass(frozen=True)
class Config:
    """`epsilon` as the authors' code has it."""

    images: int = 1_000
    seed: int = 0
    epsilon: float = 0.002


def measure(case: Case, config: Config) -> dict[str, Any]:
    """For a global trigger the infected components are the last five MLPs, for a local one the flagged heads."""
    extent = case.member.trigger.extent
    repair = DecompRep.paper(epsilon=config.epsilon, trigger=extent).fit(case.terms("fit"))
    moments = repair.selector_.moments_
    local, infected = extent == "local", mlps[-min(5, case.terms("fit").n_layers) :]

    def flagged(edit: Any) -> Any:
        return lambda d: edit.on(repair.flags(d))(d)

    edits: dict[str, Any] = {
        "No Defense": None,
        "w/o all heads": MeanAblate(heads, moments),
        "w/o all MLPs": MeanAblate(mlps, moments),
        "w/ Abandon": flagged(ZeroAblate(heads[-1])) if local else ZeroAblate(infected),
        "Decomp-Rep": repair,
    }
    unit, matched = NOISE
    noise = RandomAblate(heads[-1] if local else infected, moments, scale="unit", seed=config.seed)
    edits[unit] = flagged(noise) if local else noise
    found = {name: case.report_of(edit) for name, edit in edits.items()}
    centred = Moments.of(
        case.terms("fit", "centred")
    )  # in which a term is what its component writes, and has a size
    noise = RandomAblate(
        heads[-1] if local else infected, centred, scale="matched", seed=config.seed, model=case.model
    )
    answers = []
    for part in ("clean", "triggered"):
        edit = noise.on(repair.flags(case.terms(part))) if local else noise
        answers.append(case.answers(edit(case.terms(part, "centred")).features))
    return found | {matched: case.report(*answers).to_dict()}


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return family.measured(members, config, measure)


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"rates": rates_figure(record, ROWS)}


def table(record: Mapping[str, Any]) -> str:
    return f"{rates_table(record, ROWS, TABLE5)}\n\n{SETTING[0].upper()}{SETTING[1:]}."


def finding(record: Mapping[str, Any]) -> str:
    facts, models = record["models"], record["found"]["models"]
    said = []
    for extent in ("local", "global"):
        own = [m for name, m in models.items() if facts[name]["kind"].startswith(extent)]
        if own:
            parts = [
                f"{row} {over_models(excess(m[row]) for m in own)} at CACC {mean(100 * m[row]['cacc']['value'] for m in own):.1f}"
                for row in ROWS
            ]
            said.append(f"{extent} triggers ({len(own)} model{'s' * (len(own) > 1)}): {', '.join(parts)}")
    return (
        f"Attack success over its control, in points, {SPREAD}: {'; '.join(said)}. Where noise lowers the first it lowers accuracy with "
        "it; a larger model, with more heads a layer, would leave more when some are replaced."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
