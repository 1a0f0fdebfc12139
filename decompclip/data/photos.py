"""Photographs that are well known: Tiny ImageNet, with captions that tell class and some of what is seen, and CIFAR-10.

Each photograph of Tiny ImageNet has properties beside its class, as measured from its pixels and the object's box: `colour`, `brightness`,
`position`, `size`; and its class has a `kind` (dog, vehicle, food, ...).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import Unpack

from decompclip.api import check_choice
from decompclip.data.datasets import DatasetPairs
from decompclip.data.files import data_folder
from decompclip.data.pairs import PairOptions, Pairs, SubsetPairs, keyed
from decompclip.data.parquet import ParquetPairs
from decompclip.data.pixels import Preprocess
from decompclip.data.shards import ShardPairs

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


class PhotoPairs(ParquetPairs):
    """One split of Tiny ImageNet: photographs of 64 x 64 pixels in 200 classes, with natural captions.

    Args:
        split: `"train"` has 100,000; `"validation"`, for choices, 2,500; `"test"`, for reports, 5,000.
        folder: holds `train-*.parquet`, `validation-*.parquet`, `test-*.parquet` and `classes.json`. By default `tiny-imagenet`
            in the folder that the environment variable DECOMPCLIP_DATA names.
        preprocess: as `Pairs`.
        options: as `Pairs`; `templates` take the natural captions' place.

    Attributes:
        properties: `colour`, `brightness`, `position`, `size` and `kind` of each photograph.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: an unknown split.
    """

    def __init__(
        self,
        split: Split = "train",
        folder: str | Path | None = None,
        *,
        preprocess: Preprocess | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        check_choice("split", split, Split)
        folder = data_folder(
            "tiny-imagenet", "Tiny ImageNet (python -m analyses.prepare_tiny_imagenet makes it)", folder
        )
        files, classes = sorted(folder.glob(f"{split}-*.parquet")), folder / "classes.json"
        if not files or not classes.is_file():
            raise FileNotFoundError(
                f"expected {split}-*.parquet and classes.json in {folder}; they are not there"
            )
        self._classes: list[dict[str, Any]] = json.loads(classes.read_text(encoding="utf-8"))
        templates = options.get("templates")
        self._natural = templates is None
        names = [about["name"] for about in self._classes]
        super().__init__(
            files, preprocess, **{**options, "templates": templates or TEMPLATES, "class_names": names}
        )

    @cached_property
    def properties(self) -> dict[str, list[str]]:
        found = {name: self.rows.column(name) or [] for name in PROPERTIES}
        return found | {"kind": [self._classes[label or 0]["kind"] for label in self.known_labels]}

    @cached_property
    def boxes(self) -> list[list[int]]:
        """Of the object in each photograph of 64 x 64 pixels: left, top, right and bottom pixel, which belong to it."""
        return self.rows.column("box") or []

    def _texts(self, labels: Sequence[int | None]) -> Sequence[str]:
        if not self._natural:
            return [""] * len(labels)
        own = [self.rows.column(name) or [] for name in PROPERTIES]
        return [
            caption(self._classes[label or 0], *facts, seed=self.caption_seed, name=name)
            for name, label, *facts in zip(self.rows.ids, labels, *own, strict=True)
        ]


def properties_of(pairs: Pairs) -> dict[str, list[str]]:
    """`PhotoPairs.properties`, of a part of them too.

    Raises:
        ValueError: pairs that are none of `PhotoPairs`.
    """
    if isinstance(pairs, SubsetPairs):
        whole = properties_of(pairs.base)
        return {name: [values[place] for place in pairs.places] for name, values in whole.items()}
    if not isinstance(pairs, PhotoPairs):
        raise ValueError(f"expected PhotoPairs; received {pairs!r}, whose properties are not known")
    return pairs.properties


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


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR10_TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a small photo of a {}",
    "a blurry photo of a {}",
    "a close photo of a {}",
    "a low resolution photo of a {}",
    "this is a {}",
    "there is a {}",
)
"""Captions, and prompts of the zero-shot classifier."""


def cifar10(
    split: Literal["train", "test"] = "train",
    folder: str | Path | None = None,
    *,
    preprocess: Preprocess | None = None,
    **options: Unpack[PairOptions],
) -> Pairs:
    """The pairs of one split of CIFAR-10: photographs of 32 x 32 pixels in 10 classes, captions from templates.

    Args:
        split: `"train"`: 50,000 photographs. `"test"`: 10,000 of torchvision, as many as there are of shards.
        folder: holds shards `train-*.tar` and `test-*.tar` (JPEG), or the folder `cifar-10-batches-py` that
            torchvision's `CIFAR10(folder, download=True)` leaves. By default `cifar-10` in the folder that the
            environment variable DECOMPCLIP_DATA names.
        preprocess: as `Pairs`.
        options: as `Pairs`; `templates` are `CIFAR10_TEMPLATES` by default.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: an unknown split, or templates without a slot.
    """
    check_choice("split", split, ("train", "test"))
    folder = data_folder("cifar-10", "CIFAR-10", folder)
    options = {"templates": CIFAR10_TEMPLATES, "class_names": CIFAR10_CLASSES, **options}
    if shards := sorted(folder.glob(f"{split}-*.tar")):
        return ShardPairs(shards, preprocess, **options)
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(str(folder), train=split == "train", download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"expected {split}-*.tar or cifar-10-batches-py in {folder}; found neither; "
            "torchvision.datasets.CIFAR10(folder, download=True) gets the latter"
        ) from error
    return DatasetPairs(
        dataset, preprocess, ids=[f"{split}/{index:06d}" for index in range(len(dataset))], **options
    )
