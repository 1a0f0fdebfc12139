"""Do contribution maps find the object? Scores of segmentation beside raw attention and rollout, on photographs with boxes.

Paper:     Gandelsman, Efros and Steinhardt (ICLR 2024), by the protocol of Chefer, Gur and Wolf (CVPR 2021).
Command:   python -m analyses.segmentation [--images-a-class N] [--out FOLDER]
           python -m analyses.segmentation --file gtsegs_ijcv.mat --model ViT-L-14 --pretrained openai
           python -m analyses.segmentation --images FOLDER --masks FOLDER [--model ... --pretrained ...]
Run time:  about two minutes, one thread, with Tiny ImageNet where DECOMPCLIP_DATA says.
Expected:  the contribution map above raw attention and rollout in all three scores, as theirs at 400 million pairs.
Writes:    analyses/results/segmentation/segmentation.json, segmentation.png

Of each class the first test photographs count, as many of each. A contribution map is the sum over all heads toward the
photograph's own class less the mean of all classes. Maps are enlarged bilinearly, brought to 0..1, and cut at their mean. A box is
no outline: what is inside counts as the object, background at its corners too, so that numbers are lower than against
masks, and comparable with each other alone. ImageNet-Segmentation (Guillaumin et al., IJCV 2014; 4,276 photographs) is read from its file, which
needs h5py; any other set from two folders, a mask beside each photograph by its name, what is not black being the object. The class of a photograph in
folders is the folder that it lies in; of those that lie in none, what the model takes it for. Both are scaled to the model's size, whatever their shape. Raw attention is the class token's in the last layer, mean over heads. The control knows no photograph: how near a patch is to the middle.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from analyses.study.results import RESULTS
from decompclip.data.files import open_image, open_rgb
from decompclip.data.images import image_files
from decompclip.figures.theme import write_figure
from decompclip.files import write_json

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP
    from decompclip.operators.mask_scores import Segmentation

OURS, CENTRE = "contribution", "nearness to the middle"
BASELINES = ("raw attention", "rollout")
BATCH = 32


@dataclass(frozen=True)
class Config:
    model: str = "photos"
    pretrained: str = ""
    images_a_class: int = 3
    seed: int = 0
    """Of the bootstrap draws."""


class Sample(NamedTuple):
    """A photograph, where its object is, and its class; None where that is not known."""

    pixels: Float[Tensor, "3 h w"]
    mask: Bool[Tensor, "h w"]
    label: int | None


def photographs(config: Config, size: tuple[int, int]) -> tuple[Sequence[str], Iterator[Sample]]:
    """Of each class the first test photographs, with boxes."""
    from decompclip.data.photos import PhotoPairs
    from decompclip.operators.mask_scores import box_masks

    pairs = PhotoPairs("test")
    places: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(pairs.known_labels):
        if label is not None and len(places[label]) < config.images_a_class:
            places[label].append(place)

    def samples() -> Iterator[Sample]:
        for label, own in sorted(places.items()):
            for place in own:
                (mask,) = box_masks(torch.tensor([pairs.boxes[place]]), *size)
                yield Sample(pairs[place].image, mask, label)

    return pairs.class_names, samples()


def sample(picture: Image.Image, mask: np.ndarray, label: int | None, size: tuple[int, int]) -> Sample:
    """Both scaled to a size.

    Raises:
        ValueError: they are of different sizes.
    """
    if mask.shape != picture.size[::-1]:
        raise ValueError(
            f"expected a mask of the photograph's size {picture.size[::-1]}; received {mask.shape}; give each its own"
        )
    height, width = size
    small = Image.fromarray((mask > 0).astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    inside = torch.from_numpy(np.asarray(small) > 0)
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(scaled).copy()).permute(2, 0, 1).float() / 255
    return Sample(pixels, inside, label)


def imagenet_segmentation(path: Path, size: tuple[int, int]) -> tuple[Sequence[str], Iterator[Sample]]:
    """ImageNet-Segmentation's file: cells `value/img`, `value/gt` and `value/id` of MATLAB 7.3, which is HDF5.

    Raises:
        ModuleNotFoundError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it has another form.
    """
    try:
        h5py: Any = import_module("h5py")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"expected h5py to read {path.name}; it is not installed: pip install h5py; or save photographs and masks as pictures, and "
            "pass --images and --masks"
        ) from None
    from decompclip.data.known import imagenet_classes, imagenet_folders

    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, ImageNet-Segmentation's gtsegs_ijcv.mat; it is not there")
    places = {key: place for place, key in enumerate(imagenet_folders())}
    with h5py.File(path, "r") as file:
        missing = [name for name in ("value/img", "value/gt") if name not in file]
    if missing:
        raise ValueError(
            f"expected value/img and value/gt in {path}, as gtsegs_ijcv.mat has them; it has no {missing[0]}"
        )

    def samples() -> Iterator[Sample]:
        with h5py.File(path, "r") as file:
            known = "value/id" in file
            for index in range(len(file["value/img"])):
                # MATLAB's arrays lie column by column: axes come in the other order
                picture = np.asarray(file[file["value/img"][index, 0]]).T
                mask = np.asarray(file[file[file["value/gt"][index, 0]][0, 0]]).T
                name = (
                    "".join(map(chr, np.asarray(file[file["value/id"][index, 0]]).flatten())) if known else ""
                )
                yield sample(Image.fromarray(picture), mask, places.get(name.partition("_")[0]), size)

    return imagenet_classes(), samples()


def folders(
    images: Path, masks: Path, size: tuple[int, int], class_names: Sequence[str]
) -> tuple[Sequence[str], Iterator[Sample]]:
    """Photographs of a folder with masks of the same names in another.

    Args:
        images: photographs; in folders that are called like their classes, or in none.
        masks: a PNG for each, in the same folders.
        size: of both, afterwards.
        class_names: of photographs in no folder.

    Raises:
        ValueError: there are no photographs, or one has no mask.
    """
    files = image_files(images)[0]
    lacking = [file.as_posix() for file in files if not (masks / file).with_suffix(".png").is_file()]
    if not files or lacking:
        found = f"none for {lacking[0]} ({len(lacking)} in all)" if files else "no photographs"
        raise ValueError(
            f"expected photographs in {images}, each with a mask of its name in {masks}, as PNG; found {found}"
        )
    sorted_in = sorted({file.parts[0] for file in files if len(file.parts) > 1})
    names = [name.replace("_", " ") for name in sorted_in] or list(class_names)

    def samples() -> Iterator[Sample]:
        for file in files:
            with open_image((masks / file).with_suffix(".png")) as opened:
                wide = opened.mode.startswith("I")  # 16 bits and more, of which "L" keeps the high ones
                mask = np.asarray(opened if wide else opened.convert("L"))
            label = sorted_in.index(file.parts[0]) if len(file.parts) > 1 else None
            yield sample(open_rgb(images / file), mask, label, size)

    return names, samples()


@torch.no_grad()
def run(model: HookedCLIP, class_names: Sequence[str], samples: Iterator[Sample]) -> Segmentation:
    """The maps' scores.

    Raises:
        ValueError: there are no photographs.
    """
    from decompclip.decomposition.components import heads
    from decompclip.operators.attention import attention_maps, contribution_maps, rollout
    from decompclip.operators.mask_scores import segment

    classifier = model.zero_shot_classifier(class_names)
    found: dict[str, list[Tensor]] = defaultdict(list)
    masks: list[Tensor] = []
    for batch in batched(samples, BATCH):
        images = model.normalize(torch.stack([x.pixels for x in batch]))
        said = (model.encode_image(images).float() @ classifier.T).argmax(1).tolist()
        labels = torch.tensor([s if x.label is None else x.label for x, s in zip(batch, said, strict=True)])
        toward = torch.empty(len(batch), *model.cfg.grid)
        for label in labels.unique().tolist():
            own = labels == label
            maps = contribution_maps(
                model,
                images[own],
                classifier[label],
                against=classifier.mean(0),
                label="its class",
                pictures=False,
            )
            toward[own] = maps.patches.sum(0)
        found[OURS].append(toward)
        found["raw attention"].append(
            attention_maps(model, images, heads[-1], pictures=False).patches.mean(0)
        )
        found["rollout"].append(rollout(model, images, pictures=False).patches[0])
        masks += [x.mask for x in batch]
    if not masks:
        raise ValueError("expected photographs with masks; received none; check the folder or file")
    rows, columns = model.cfg.grid
    y, x = (torch.linspace(-1, 1, n).square() for n in (rows, columns))
    maps = {name: torch.cat(parts) for name, parts in found.items()}
    maps[CENTRE] = -(y[:, None] + x).expand(len(masks), -1, -1)
    return segment(maps, torch.stack(masks))


def batched(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """So many at a time; the last may be fewer."""
    batch: list[Sample] = []
    for one in samples:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


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
    import decompclip

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images-a-class", type=int, default=Config.images_a_class)
    parser.add_argument("--file", type=Path, help="ImageNet-Segmentation's gtsegs_ijcv.mat")
    parser.add_argument("--images", type=Path, help="folder of photographs; with --masks")
    parser.add_argument("--masks", type=Path, help="folder of their masks, PNG files of the same names")
    parser.add_argument("--model", default=Config.model)
    parser.add_argument("--pretrained", default="", help="open_clip's tag of weights")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "segmentation", help="folder of JSON and figure"
    )
    given = parser.parse_args()
    if (given.images is None) != (given.masks is None) or (given.file and given.images):
        parser.error("expected --images and --masks together, or --file, or none of them")
    config = Config(given.model, given.pretrained, given.images_a_class)
    model = decompclip.load(config.model, pretrained=config.pretrained or None)
    size = model.image_size
    if given.file:
        names, samples = imagenet_segmentation(given.file, size)
    elif given.images:
        names, samples = folders(given.images, given.masks, size, model.class_names)
    else:
        names, samples = photographs(config, size)
    found = run(model, names, samples)
    said = record(found, config)
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "segmentation.json", said)
    write_figure(found.figure(), given.out / "segmentation.png")
    print(found.to_frame().to_string(), finding(said), sep="\n")


if __name__ == "__main__":
    main()
