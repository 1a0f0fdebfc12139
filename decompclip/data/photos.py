"""Tiny ImageNet: photographs of 64 x 64 pixels in 200 classes, with captions that tell class and some of what is seen.

Each photograph has properties beside its class, as measured from its pixels and the object's box: `colour`, `brightness`,
`position`, `size`; and its class has a `kind` (dog, vehicle, food, ...).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from decompclip.data.datasets import DatasetPairs
from decompclip.data.pairs import Pairs, SubsetPairs, keyed
from decompclip.data.parquet import ParquetRows
from decompclip.data.pixels import Preprocess

Split = Literal["train", "validation", "test"]

TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "an image of a {}",
    "a photo of one {}",
)
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
PROPERTIES = ("colour", "brightness", "position", "size")
PROMPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow"),
        ("a photo of an object mostly {}", "an object mostly {}"),
    ),
    "brightness": (("dark", "bright"), ("a {} photo of an object", "a {} picture of an object")),
    "position": (tuple(PLACES), ("a photo of an object {}", "an object {}")),
    "size": (("small", "large"), ("a photo of a {} object", "a {} object")),
    "kind": (
        (
            "amphibian",
            "bird",
            "building",
            "cat",
            "clothing",
            "container",
            "device",
            "dog",
            "equipment",
            "fish",
            "food",
            "furniture",
            "insect",
            "invertebrate",
            "landscape",
            "mammal",
            "object",
            "reptile",
            "spider",
            "vehicle",
        ),
        TEMPLATES,
    ),
}
"""Values of each property that a classifier is asked for, and the prompts; other values (even, medium, mixed) tell nothing."""


def photos(
    split: Split = "train",
    folder: str | Path | None = None,
    *,
    preprocess: Preprocess | None = None,
    caption_seed: int = 0,
    order_seed: int = 0,
) -> Pairs:
    """The photographs of one split, with natural captions.

    Args:
        split: `"train"` has 100,000; `"validation"`, for choices, 2,500; `"test"`, for reports, 5,000.
        folder: holds `train-*.parquet`, `validation-*.parquet`, `test-*.parquet` and `classes.json`. By default `tiny-imagenet`
            in the folder that the environment variable DECOMPCLIP_DATA names.
        preprocess: from a picture to pixels in [0, 1].
        caption_seed: of the captions.
        order_seed: as `Pairs`.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: an unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is not one of {get_args(Split)}")
    folder = photos_folder(folder)
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files or not (folder / "classes.json").is_file():
        raise FileNotFoundError(
            f"expected {split}-*.parquet and classes.json in {folder}; they are not there"
        )
    classes = classes_of(folder)
    dataset = _Photographs(ParquetRows(files, [c["name"] for c in classes]), classes, caption_seed)
    return DatasetPairs(
        dataset,
        preprocess,
        class_names=[c["name"] for c in classes],
        templates=TEMPLATES,
        ids=dataset.rows.ids,
        order_seed=order_seed,
    )


def photos_folder(folder: str | Path | None = None) -> Path:
    """Raises FileNotFoundError where none is given and DECOMPCLIP_DATA is not set."""
    if folder is not None:
        return Path(folder)
    if "DECOMPCLIP_DATA" not in os.environ:
        raise FileNotFoundError(
            "expected a folder with Tiny ImageNet; received none, and DECOMPCLIP_DATA is not set; pass folder="
        )
    return Path(os.environ["DECOMPCLIP_DATA"], "tiny-imagenet")


def photo_properties(pairs: Pairs) -> dict[str, list[str]]:
    """`colour`, `brightness`, `position`, `size` and `kind` of each of the photographs; of a part of them too.

    Raises:
        ValueError: pairs that are none of `photos`.
    """
    if isinstance(pairs, SubsetPairs):
        whole = photo_properties(pairs.base)
        return {name: [values[place] for place in pairs.places] for name, values in whole.items()}
    if not (isinstance(pairs, DatasetPairs) and isinstance(pairs.dataset, _Photographs)):
        raise ValueError(
            f"expected photographs of `photos`; received {pairs!r}, whose properties are not known"
        )
    return pairs.dataset.properties


@lru_cache(maxsize=2)
def classes_of(folder: Path) -> list[dict[str, Any]]:
    """`wnid`, `name`, `synonyms` and `kind` of each class, in the order of labels."""
    return json.loads((folder / "classes.json").read_text(encoding="utf-8"))


class _Photographs:
    """Rows as (picture, caption); each caption hangs on the photograph's place and the seed alone."""

    def __init__(self, rows: ParquetRows, classes: list[dict[str, Any]], seed: int) -> None:
        self.rows, self.kinds, self.seed = rows, classes, seed

    @cached_property
    def targets(self) -> list[int]:
        return self.rows.targets or []

    @cached_property
    def properties(self) -> dict[str, list[str]]:
        """What is known of each photograph beside its class."""
        found = {name: self.rows.column(name) or [] for name in PROPERTIES}
        return found | {"kind": [self.kinds[label]["kind"] for label in self.targets]}

    @cached_property
    def captions(self) -> list[str]:
        own = [self.properties[name] for name in PROPERTIES]
        return [
            caption(self.kinds[label], *facts, seed=self.seed, name=name)
            for name, label, *facts in zip(self.rows.ids, self.targets, *own, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.rows.picture(index), self.captions[index]


def caption(
    about: dict[str, Any], colour: str, brightness: str, position: str, size: str, *, seed: int, name: str
) -> str:
    """A caption that names the class, a synonym or its kind, and tells each of the rest half of the time."""
    u = np.random.Generator(np.random.Philox(key=keyed(seed, "caption", name))).random(9)
    subject = about["name"]
    if u[0] >= 0.9:
        subject = about["kind"] if u[1] < 0.5 else "object"
    elif u[0] >= 0.7:
        subject = _one(about["synonyms"], u[1])
    if u[2] < 0.2:
        return _one(TEMPLATES, u[3]).replace("{}", subject)
    words = ["a", _one(("photo", "photo", "photo", "picture", "image"), u[4]), "of", "a", subject]
    if brightness != "even" and u[5] < 0.5:
        words.insert(1, brightness)
    if size != "medium" and u[6] < 0.5:
        words.insert(-1, size)
    if u[7] < 0.5:
        words.append(PLACES[position])
    if colour != "mixed" and u[8] < 0.5:
        words += ["mostly", colour]
    following = [*words[1:], ""]
    return " ".join(
        "an" if w == "a" and n[0] in "aeiou" else w for w, n in zip(words, following, strict=True)
    )


def _one(options: Sequence[str], u: float) -> str:
    return options[int(u * len(options))]
