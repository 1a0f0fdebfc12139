"""Figure 4: what MLPs say, layer by layer, on clean and on triggered images.

Paper:     He et al. (2025), Figure 4: texts of infected MLPs, the late ones, change distinctly.
Command:   python -m analyses.figure4 --model-family shapes
Run time:  about 5 minutes, one thread.
Expected:  texts of the last MLPs mean something else on triggered images.
Writes:    analyses/results/FAMILY/figure4.json, figure4.png

Similarity: mean cosine of each text to the nearest of the other set, pool's mean taken off. Two halves of the clean images have a
curve of their own: what lies below it is more than chance.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import RANGE, curve, groups, markdown, mean
from analyses.study.words import words
from decompclip.decomposition.components import mlps
from decompclip.figures.curves import LinePanel, line_panels
from decompclip.operators.roles import role_change

TITLE = "Figure 4: what MLPs say, layer by layer"


@dataclass(frozen=True)
class Config:
    """`draw` names attacks whose texts the table shows."""

    images: int = 600
    seed: int = 0
    n_texts: int = 5
    draw: tuple[str, ...] = ("BadNet", "Blended")


@torch.no_grad()
def measure(case: Case, config: Config) -> list[dict[str, Any]]:
    found = words(case, mlps, n_texts=config.n_texts)
    options = {"pool": found.pool.features, "draws": 50, "seed": config.seed}
    return [
        {
            "layer": before.part.layer,
            "similarity": round(role_change(before, after, **options).similarity.value, 4),
            "halves": round(role_change(first, second, **options).similarity.value, 4),
            "clean": list(before.texts),
            "triggered": list(after.texts),
        }
        for before, after, first, second in zip(
            found.clean, found.triggered, found.first, found.second, strict=True
        )
    ]


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    return family.measured(members, config, measure)


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    models, panels = record["found"]["models"], []
    shown = groups(record)
    if all(len(names) == 1 for names in shown.values()):  # a range needs several
        shown = {", ".join(shown): [name for names in shown.values() for name in names]}
    for group, names in shown.items():
        curves = {
            name: curve(range(len(models[names[0]])), [[row[key] for row in models[n]] for n in names])
            for name, key in {
                "clean and triggered images": "similarity",
                "halves of clean images": "halves",
            }.items()
        }
        panels.append(LinePanel(group, "layer", "similarity of texts", curves, ends=(0.0, 1.04), whole=True))
    return {"mlps": line_panels(panels, columns=min(2, len(panels)), row_height=200, bands=RANGE)}


def table(record: Mapping[str, Any]) -> str:
    rows = [["model", "layer", "similarity", "halves", "clean images", "triggered images"]]
    for name, found in record["found"]["models"].items():
        facts = record["models"][name]
        if facts["attack"] in record["config"]["draw"] and facts["seed"] == 0:
            rows += [
                [
                    f"`{name}`",
                    str(row["layer"]),
                    f"{row['similarity']:.2f}",
                    f"{row['halves']:.2f}",
                    "; ".join(row["clean"][:3]),
                    "; ".join(row["triggered"][:3]),
                ]
                for row in found
            ]
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    models = list(record["found"]["models"].values())
    lost = [mean(row["halves"] - row["similarity"] for row in rows) for rows in models]
    late = [mean(row["halves"] - row["similarity"] for row in rows[-1:]) for rows in models]
    return (
        f"Texts of MLPs on triggered images are {mean(lost):.2f} less similar to those on clean ones than halves of clean images are to each "
        f"other, mean over layers and {len(models)} models ({min(lost):.2f} to {max(lost):.2f}); in the last layer {mean(late):.2f}. That the last "
        f"MLP's texts change, as Finding 3 says, {'shows' if mean(late) > 0.05 else 'does not show'} here. `role_change` holds it against chance."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
