"""Do contribution maps find the object? Scores of segmentation beside raw attention and rollout, on photographs with boxes.

Paper:     Gandelsman, Efros and Steinhardt (ICLR 2024), by the protocol of Chefer, Gur and Wolf (CVPR 2021).
Command:   python -m analyses.segmentation [--images-a-class N] [--out FOLDER]
Run time:  about two minutes, one thread, with Tiny ImageNet where DECOMPCLIP_DATA says.
Expected:  the contribution map above raw attention and rollout in all three scores, as theirs at 400 million pairs.
Measured:  so it is, by 4 to 7 points; but a map that knows no photograph, only the middle, is 6 to 7 points above it.
Writes:    analyses/results/segmentation/segmentation.json, segmentation.png

Of each class the first test photographs count, as many of each. A contribution map is the sum over all heads toward the
photograph's own class less the mean of all classes. Maps are enlarged bilinearly, brought to 0..1, and cut at their mean. A box is
no outline: what is inside counts as the object, background at its corners too, so that numbers are lower than against
masks, and comparable with each other alone. Raw attention is the class token's in the last layer, mean over heads. The control knows no photograph: how near a patch is to the middle.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from analyses.study.results import RESULTS
from decompclip.files import write_json

if TYPE_CHECKING:
    from decompclip.operators.mask_scores import Segmentation

OURS, CENTRE = "contribution", "nearness to the middle"
BASELINES = ("raw attention", "rollout")


@dataclass(frozen=True)
class Config:
    model: str = "photos"
    images_a_class: int = 3
    seed: int = 0
    """Of the bootstrap draws."""


@torch.no_grad()
def run(config: Config) -> Segmentation:
    """The maps' scores."""
    import decompclip
    from decompclip.data.photos import PhotoPairs
    from decompclip.decomposition.components import heads
    from decompclip.operators.attention import attention_maps, contribution_maps, rollout
    from decompclip.operators.mask_scores import box_masks, segment

    model = decompclip.load(config.model)
    pairs = PhotoPairs("test")
    places: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(pairs.known_labels):
        if label is not None and len(places[label]) < config.images_a_class:
            places[label].append(place)
    classifier = model.zero_shot_classifier(pairs.class_names)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for label, own in sorted(places.items()):
        images = model.normalize(torch.stack([pairs[place].image for place in own]))
        toward = contribution_maps(
            model, images, classifier[label], against=classifier.mean(0), label="its class", pictures=False
        )
        found[OURS].append(toward.patches.sum(0))
        found["raw attention"].append(
            attention_maps(model, images, heads[-1], pictures=False).patches.mean(0)
        )
        found["rollout"].append(rollout(model, images, pictures=False).patches[0])
    rows, columns = model.cfg.grid
    y, x = (torch.linspace(-1, 1, n).square() for n in (rows, columns))
    maps = {name: torch.cat(parts) for name, parts in found.items()}
    boxes = torch.tensor([pairs.boxes[place] for _, own in sorted(places.items()) for place in own])
    maps[CENTRE] = -(y[:, None] + x).expand(len(boxes), -1, -1)
    return segment(maps, box_masks(boxes, *model.image_size))


def record(found: Segmentation, config: Config) -> dict[str, Any]:
    """What goes into the JSON."""
    from decompclip.operators.mask_scores import MEASURES

    low, high = found.intervals(seed=config.seed).tolist()
    scores = {
        name: {
            measure: {"value": found.scores[i, j].item(), "low": low[i][j], "high": high[i][j]}
            for j, measure in enumerate(MEASURES)
        }
        for i, name in enumerate(found.labels)
    }
    over = {
        name: dict(zip(MEASURES, found.difference(OURS, name, seed=config.seed).T.tolist(), strict=True))
        for name in found.labels
        if name != OURS
    }
    return {"config": asdict(config), "images": len(found), "scores": scores, "contribution less": over}


def finding(said: dict[str, Any]) -> str:
    """A sentence a comparison, in points with 95 % intervals."""
    parts = []
    for name, measures in said["contribution less"].items():
        ends = [
            f"{measure} {100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for measure, (value, low, high) in measures.items()
        ]
        parts.append(f"less {name}: {', '.join(ends)}")
    own = ", ".join(f"{measure} {100 * x['value']:.1f} %" for measure, x in said["scores"][OURS].items())
    return f"On {said['images']} photographs contribution maps reach {own}; in points, {'; '.join(parts)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images-a-class", type=int, default=Config.images_a_class)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "segmentation", help="folder of JSON and figure"
    )
    given = parser.parse_args()
    config = Config(images_a_class=given.images_a_class)
    found = run(config)
    said = record(found, config)
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "segmentation.json", said)
    found.figure().write_image(given.out / "segmentation.png", scale=1.5)
    print(found.to_frame().to_string(), finding(said), sep="\n")


if __name__ == "__main__":
    main()
