"""Figure 3: the last layer's heads on clean and on triggered images: where they look, how far they move, what they say.

Paper:     He et al. (2025), Figure 3: maps, MMD and texts of single heads, BadNet and others.
Command:   python -m analyses.figure3 --model-family shapes
Run time:  about 8 minutes, one thread.
Expected:  infected heads look at the trigger, have a large MMD, and other texts than on clean images.
Writes:    analyses/results/FAMILY/figure3.json, figure3-ATTACK.png

Maps show what each patch adds, through a head, to the similarity with the target class less the mean of all others. Above each map
stand the head's MMD (the paper's estimate, times 1000) and the similarity of its texts on clean and on triggered images.
Numbers are of all models, maps of those of `draw`; pictures are kept of drawn worlds alone, never of photographs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from analyses.study.case import Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import markdown, mean
from analyses.study.words import words
from decompclip.decomposition.components import heads
from decompclip.figures.gallery import HeadPair, head_pairs
from decompclip.figures.heatmaps import picture
from decompclip.operators.attention import contribution_maps
from decompclip.operators.mmd import head_mmd
from decompclip.operators.roles import role_change

TITLE = "Figure 3: heads of the last layer, clean and triggered"


@dataclass(frozen=True)
class Config:
    """`draw` names attacks whose maps are kept; `example` is the image, counted among those of other classes."""

    images: int = 600
    seed: int = 0
    n_texts: int = 5
    draw: tuple[str, ...] = ("BadNet", "Blended", "BadCLIP")
    example: int = 0


@torch.no_grad()
def measure(case: Case, config: Config, *, keep_picture: bool) -> dict[str, Any]:
    sets = [case.terms(part, "paper")[case.others] for part in ("clean", "triggered")]
    mmd = head_mmd(*sets, components=heads[-1], kernel="paper", permutations=0, paired=True)
    found = words(case, heads[-1], n_texts=config.n_texts)
    rows = []
    for before, after, moved in zip(found.clean, found.triggered, mmd.values.tolist(), strict=True):
        alike = role_change(before, after, pool=found.pool.features, draws=50, seed=config.seed).similarity
        rows.append(
            {
                "head": before.part.head,
                "mmd": round(moved, 4),
                "similarity": round(alike.value, 3),
                "clean": list(before.texts),
                "triggered": list(after.texts),
            }
        )
    result: dict[str, Any] = {"heads": rows}
    if case.member.attack in config.draw and case.member.seed == 0:
        result |= maps(case, config, keep_picture=keep_picture)
    return result


def maps(case: Case, config: Config, *, keep_picture: bool) -> dict[str, Any]:
    """Of one image without and with the trigger: contributions by patch, the patches that the trigger touches, and pictures.

    Raises:
        ValueError: there is no such image.
    """
    places = case.others.nonzero()[:, 0]
    if not 0 <= config.example < len(places):
        raise ValueError(f"expected an example in 0..{len(places) - 1}; received {config.example}")
    place = int(places[config.example])
    pixels = torch.stack([case.clean[place], case.triggered[place]])
    rest = case.classifier[torch.arange(len(case.classifier)) != case.target].mean(0)
    found = contribution_maps(
        case.model,
        case.model.normalize(pixels),
        case.classifier[case.target],
        heads[-1],
        against=rest,
        label=case.member.target,
        pictures=False,
    )
    rows, columns = found.patches.shape[2:]
    touched = (case.triggered[place] != case.clean[place]).any(0)[None, None].float()
    share = torch.nn.functional.adaptive_max_pool2d(touched, (rows, columns))[0, 0]
    marked = [] if share.mean() > 0.5 else [[int(y), int(x)] for y, x in share.nonzero()]
    result: dict[str, Any] = {
        "maps": [
            [[[round(v, 5) for v in line] for line in grid] for grid in head]
            for head in found.patches.tolist()
        ],
        "marked": marked,
        "example": case.class_names[int(case.labels[place])],
    }
    if keep_picture:
        eight = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        result["pictures"] = [picture(image.contiguous()) for image in eight]
    return result


def run(config: Config, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
    drawn = family.name == "shapes"
    return {
        "models": {
            m.name: measure(
                family.case(m, images=config.images, seed=config.seed), config, keep_picture=drawn
            )
            for m in members
        }
    }


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    figures = {}
    for name, found in record["found"]["models"].items():
        if "maps" not in found:
            continue
        pairs = [
            HeadPair(
                f"last layer<br>head {row['head']}<br>10³ MMD<br>{row['mmd']:.3g}<br>texts {row['similarity']:.2f}",
                clean,
                triggered,
            )
            for row, (clean, triggered) in zip(found["heads"], found["maps"], strict=True)
        ]
        attack = re.sub(r"\W+", "-", record["models"][name]["attack"].lower())
        pictures = tuple(found["pictures"]) if "pictures" in found else None
        figures[attack] = head_pairs(
            pairs,
            unit=f"cosine toward<br>“{record['models'][name]['target']}”, less others",
            pictures=pictures,  # pyright: ignore[reportArgumentType]
            marked=[(y, x) for y, x in found["marked"]],
        )
    return figures


def table(record: Mapping[str, Any]) -> str:
    rows = [["model", "head", "MMD × 1000", "similarity", "clean images", "triggered images"]]
    for name, found in record["found"]["models"].items():
        if "maps" in found:
            rows += [
                [
                    f"`{name}`",
                    str(row["head"]),
                    f"{row['mmd']:.3f}",
                    f"{row['similarity']:.2f}",
                    "; ".join(row["clean"][:3]),
                    "; ".join(row["triggered"][:3]),
                ]
                for row in found["heads"]
            ]
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    models = list(record["found"]["models"].values())
    shares, gaps = [], []
    for model in models:
        by_mmd = sorted(model["heads"], key=lambda row: -row["mmd"])
        total = sum(row["mmd"] for row in by_mmd)
        shares.append(by_mmd[0]["mmd"] / total if total else 0.0)
        n = max(1, len(by_mmd) // 4)
        gaps.append(mean(r["similarity"] for r in by_mmd[-n:]) - mean(r["similarity"] for r in by_mmd[:n]))
    other = sum(gap > 0 for gap in gaps)
    return (
        f"One head has {100 * mean(shares):.0f} % of the last layer's MMD, mean over {len(models)} models (an equal share would be "
        f"{100 / len(models[0]['heads']):.0f} %). In {other} of {len(models)} models the quarter of heads that moves most changes its texts more "
        f"than the quarter that moves least, by {mean(gaps):.2f} of similarity on average: infected heads "
        f"{'say something else' if mean(gaps) > 0.05 else 'do not clearly say something else'}. `role_change` holds this against chance."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
