"""Tiny ImageNet as the parquet files that `photos` is trained on, from the zip that its authors give out.

Command:   python -m analyses.prepare_tiny_imagenet tiny-imagenet-200.zip --out DIR/tiny-imagenet
           then set DECOMPCLIP_DATA to DIR
Run time:  about a quarter of an hour on two cores.
Source:    http://cs231n.stanford.edu/tiny-imagenet-200.zip (Stanford CS231n; ImageNet's terms: non-commercial research)
Writes:    train-0000.parquet, train-0001.parquet (100,000), validation-0000.parquet (2,500, for choices), test-0000.parquet
           (5,000, for reports) and classes.json

Photographs are stored as WebP of quality 60. Beside label and box stand four properties, measured from the pixels as stored and
the box: `colour`, the one that covers most (`mixed` below 35 %), `brightness`, and the box's `position` and `size`.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from decompclip.data.files import open_rgb
from decompclip.data.photos import PROPERTIES
from decompclip.files import atomic_write, write_json
from decompclip.models.bundled import card

SEED = 20261126
"""Of the order of the photographs, and so of the splits."""
ROOT = "tiny-imagenet-200"
SIDE = 64
PARTS = {"validation": 2_500, "test": 5_000}

KINDS = {
    "amphibian": "n01629819 n01641577 n01644900",
    "bird": "n01855672 n02002724 n02056570 n02058221",
    "building": "n02699494 n02788148 n02791270 n02793495 n02814860 n02892201 n02927161 n03042490 "
    "n03089624 n03160309 n03388043 n03837869 n03930313 n04149813 n04311004 n04366367 "
    "n04486054 n04501370 n04532670",
    "cat": "n02123045 n02123394 n02124075 n02125311 n02129165",
    "clothing": "n02669723 n02730930 n02837789 n02883205 n02963159 n03026506 n03404251 n03617480 "
    "n03763968 n03770439 n03980874 n04254777 n04259630 n04371430 n04532106",
    "container": "n02769748 n02795169 n02808440 n02815834 n02823428 n02909870 n03014705 n03937543 "
    "n03983396 n04398044 n04560804 n04562935 n04597913",
    "device": "n02666196 n02841315 n02906734 n02948072 n02950826 n02977058 n03085013 n03126707 "
    "n03250847 n03355925 n03400231 n03544143 n03649909 n03706229 n03733131 n03804744 "
    "n03814639 n03838899 n03854065 n03891332 n03970156 n03976657 n03992509 n04008634 "
    "n04067472 n04074963 n04179913 n04251144 n04265275 n04275548 n04328186 n04356056 "
    "n04376876 n04456115 n04596742",
    "dog": "n02085620 n02094433 n02099601 n02099712 n02106662 n02113799",
    "equipment": "n02802426 n02988304 n03255030 n03584254 n03902125 n04023962 n04118538 n04540053",
    "fish": "n01443537",
    "food": "n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 "
    "n07734744 n07747607 n07749582 n07753592 n07768694 n07871810 n07873807 n07875152 "
    "n07920052 n12267677",
    "furniture": "n03179701 n03201208 n04099969",
    "insect": "n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443 "
    "n02279972 n02281406",
    "invertebrate": "n01768244 n01784675 n01910747 n01917289 n01944390 n01945685 n01950731 n01983481 "
    "n01984695 n02321529",
    "landscape": "n09193705 n09246464 n09256479 n09332890 n09428293",
    "mammal": "n01882714 n02074367 n02132136 n02364673 n02395406 n02403003 n02410509 n02415577 "
    "n02423022 n02437312 n02480495 n02481823 n02486410 n02504458 n02509815",
    "object": "n02843684 n02917067 n02999410 n03424325 n03637318 n04070727 n04133789 n04146614 "
    "n04399382 n04417672 n04487081 n04507155 n06596364",
    "reptile": "n01698640 n01742172",
    "spider": "n01770393 n01774384 n01774750",
    "vehicle": "n02814533 n03100240 n03393912 n03444034 n03447447 n03599486 n03662601 n03670208 "
    "n03796401 n03977966 n04285008 n04465501",
}
"""Classes by hypernyms of WordNet 3.0."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Job:
    """A photograph of the zip, its class, and the object's box: left, top, right and bottom pixel."""

    member: str
    label: int
    box: Box


@cache
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _lines(path: Path, member: str) -> list[list[str]]:
    text = _archive(path).read(f"{ROOT}/{member}").decode()
    return [line.split("\t") for line in text.splitlines() if line]


def wnids(path: Path) -> list[str]:
    """The classes, in the order of labels.

    Raises:
        ValueError: not the zip of Tiny ImageNet.
    """
    try:
        found = sorted(line[0].strip() for line in _lines(path, "wnids.txt"))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"expected {ROOT}.zip of CS231n; {path} is no zip with {ROOT}/wnids.txt; get it from "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        ) from error
    known = sorted(wnid for of_kind in KINDS.values() for wnid in of_kind.split())
    if found != known:
        raise ValueError(
            f"expected the {len(known)} classes of {ROOT} in {path}; received {len(found)}, of which "
            f"{len(set(found) - set(known))} are others; get the zip again"
        )
    return found


def classes(path: Path) -> list[dict[str, Any]]:
    """Name, synonyms and kind of each class. Names are those that `photos` knows, synonyms the zip's."""
    known, words = wnids(path), {line[0]: line[1] for line in _lines(path, "words.txt")}
    kinds = {wnid: kind for kind, of_kind in KINDS.items() for wnid in of_kind.split()}
    return [
        {
            "wnid": wnid,
            "name": name,
            "synonyms": [word.strip().lower() for word in words[wnid].split(",")],
            "kind": kinds[wnid],
        }
        for wnid, name in zip(known, card("photos")["class_names"], strict=True)
    ]


def jobs(path: Path, split: str) -> Iterator[Job]:
    """Every photograph of `train` or `val`, in the zip's order."""
    known = wnids(path)
    if split == "train":
        for label, wnid in enumerate(known):
            for name, *box in _lines(path, f"train/{wnid}/{wnid}_boxes.txt"):
                yield Job(f"{ROOT}/train/{wnid}/images/{name}", label, _box(box))
        return
    for name, wnid, *box in _lines(path, "val/val_annotations.txt"):
        yield Job(f"{ROOT}/val/images/{name}", known.index(wnid), _box(box))


def _box(numbers: list[str]) -> Box:
    left, top, right, bottom = map(int, numbers)
    return left, top, right, bottom


def read(path: Path, job: Job) -> dict[str, Any]:
    """A row: the photograph as WebP, and what is known of it."""
    stored = io.BytesIO()
    open_rgb(io.BytesIO(_archive(path).read(job.member))).save(stored, "WEBP", quality=60, method=6)
    pixels = np.asarray(open_rgb(io.BytesIO(stored.getvalue())))
    return {
        "image": stored.getvalue(),
        "label": job.label,
        "box": list(job.box),
        **properties(pixels, job.box),
    }


def properties(pixels: UInt8[np.ndarray, "h w 3"], box: Box) -> dict[str, str]:
    """Colour, brightness, position and size in words."""
    image = pixels.astype(np.float32) / 255
    name, share = main_colour(image)
    light = float((image @ np.array([0.299, 0.587, 0.114], np.float32)).mean())
    left, top, right, bottom = box
    area = (right - left + 1) * (bottom - top + 1) / SIDE**2
    x, y = ((low + high + 1) / 2 / SIDE - 0.5 for low, high in ((left, right), (top, bottom)))
    if max(abs(x), abs(y)) < 0.08:
        position = "middle"
    elif abs(x) >= abs(y):
        position = "left" if x < 0 else "right"
    else:
        position = "top" if y < 0 else "bottom"
    return {
        "colour": name if share >= 0.35 else "mixed",
        "brightness": "dark" if light < 0.33 else "bright" if light > 0.58 else "even",
        "position": position,
        "size": "small" if area < 0.25 else "large" if area > 0.75 else "medium",
    }


HUES = (
    (0, 20, "red"), (340, 361, "red"), (20, 45, "orange"), (45, 70, "yellow"), (70, 165, "green"), (165, 260, "blue"),
    (260, 300, "purple"), (300, 340, "pink"),
)  # fmt: skip


def main_colour(image: Float[np.ndarray, "h w 3"]) -> tuple[str, float]:
    """The colour that covers most of an image in [0, 1], and its share: by hue, saturation and value of each pixel."""
    value = image.max(-1)
    spread = value - image.min(-1)
    saturation = np.where(value > 0, spread / np.maximum(value, 1e-6), 0)
    red, green, blue = (image[..., channel] for channel in range(3))
    d = np.maximum(spread, 1e-6)
    of_green_or_blue = np.where(value == green, (blue - red) / d + 2, (red - green) / d + 4)
    hue = 60 * np.where(value == red, ((green - blue) / d) % 6, of_green_or_blue)
    names = np.full(hue.shape, "grey", dtype="<U6")
    chromatic = (saturation > 0.2) & (value > 0.15)
    names[~chromatic & (value < 0.25)] = "black"
    names[~chromatic & (value > 0.8)] = "white"
    for low, high, name in HUES:
        names[chromatic & (hue >= low) & (hue < high)] = name
    names[chromatic & (hue < 50) & ((value < 0.65) | (saturation < 0.45))] = "brown"
    found, counts = np.unique(names, return_counts=True)
    return str(found[counts.argmax()]), float(counts.max() / names.size)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """A parquet file in Hugging Face's layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": row["image"], "path": None} for row in rows], image),
        "label": pa.array([row["label"] for row in rows], pa.int32()),
        "box": pa.array([row["box"] for row in rows], pa.list_(pa.int16(), 4)),
        **{name: pa.array([row[name] for row in rows]).dictionary_encode() for name in PROPERTIES},
    }
    with atomic_write(path) as unfinished:
        pq.write_table(pa.table(columns), unfinished, compression="none", row_group_size=2_000)
    print(f"{path}: {len(rows)} photographs", flush=True)


def prepare(path: Path, out: Path, *, workers: int) -> None:
    """Write all files.

    Raises:
        ValueError: not the zip of Tiny ImageNet.
        OSError: it cannot be read, or `out` not be written to.
    """
    about, draw = classes(path), np.random.default_rng(SEED)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "classes.json", about)
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(partial(read, path), jobs(path, "train"), chunksize=500))
        order = draw.permutation(len(rows))
        for number, part in enumerate(np.split(order, [len(rows) // 2])):
            write([rows[place] for place in part], out / f"train-{number:04d}.parquet")
        rows = list(pool.map(partial(read, path), jobs(path, "val"), chunksize=200))
    order, start = draw.permutation(len(rows)), 0
    for name, count in PARTS.items():
        write([rows[place] for place in order[start : start + count]], out / f"{name}-0000.parquet")
        start += count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zip", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    try:
        prepare(options.zip, options.out, workers=options.workers)
    except (ValueError, OSError) as error:
        print(f"prepare_tiny_imagenet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
