"""CIFAR-10 as pairs: photographs of 32 x 32 pixels, captions from templates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from typing_extensions import Unpack

from decompclip.data.datasets import DatasetPairs
from decompclip.data.files import data_folder
from decompclip.data.pairs import PairOptions, Pairs
from decompclip.data.pixels import Preprocess
from decompclip.data.shards import ShardPairs

Split = Literal["train", "test"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

TEMPLATES = (
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
    split: Split = "train",
    folder: str | Path | None = None,
    *,
    preprocess: Preprocess | None = None,
    **options: Unpack[PairOptions],
) -> Pairs:
    """The pairs of one split.

    Args:
        split: `"train"`: 50,000 photographs. `"test"`: 10,000 of torchvision, as many as there are of shards.
        folder: holds shards `train-*.tar` and `test-*.tar` (JPEG), or the folder `cifar-10-batches-py` that
            torchvision's `CIFAR10(folder, download=True)` leaves. By default `cifar-10` in the folder that the
            environment variable DECOMPCLIP_DATA names.
        preprocess: as `Pairs`.
        options: as `Pairs`; `templates` are `TEMPLATES` by default.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: an unknown split, or templates without a slot.
    """
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is not one of {get_args(Split)}")
    folder = data_folder("cifar-10", "CIFAR-10", folder)
    options = {"templates": TEMPLATES, "class_names": CLASSES, **options}
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
