"""Images with classes by a word or a path, as the command line names them: in [0, 1], for `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decompclip.data.cifar10 import CLASSES, cifar10
from decompclip.data.images import FolderSource, OnError
from decompclip.data.pair_images import PairImages, open_images
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import Preprocess, to_pixels
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.data.subset import SubsetPairs

WORLD_SEED = 8_001
"""Stream of the Shapes world; no bundled model was trained or measured on it."""

DEFAULT_LIMIT = 2_000

KNOWN = {"shapes": PROPERTIES["shape"], "cifar10": CLASSES}
"""Bundled or well-known data sets, with their classes."""


def classes_of(spec: str) -> tuple[str, ...]:
    """The classes of a data set that is known by a word; none for a folder."""
    return KNOWN.get(spec.partition(":")[0], ())


def open_labelled(
    spec: str,
    size: tuple[int, int],
    class_names: Sequence[str],
    *,
    preprocess: Preprocess | None = None,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    on_error: OnError = "skip",
    root: str | Path | None = None,
) -> Shapes | Pairs | FolderSource | PairImages:
    """The images that `spec` names.

    Args:
        spec: `shapes` or `shapes:5000` (the bundled world), `cifar10` or `cifar10:500` (its test part, in the folder that
            DECOMPCLIP_DATA names), or what `open_images` takes: a folder with a sub-folder of images a class, a table, shards.
        size: of the model's images.
        class_names: the classifier's.
        preprocess: from a picture to pixels in [0, 1] of that size, a model's `pixels`; by default the shorter side is
            scaled and the middle cropped.
        limit: at most so many images, where `spec` does not say how many; None takes all of a folder.
        seed: of the world, or of which images are taken.
        root: a folder that the images must lie in, links resolved.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such source, or its classes are others.
    """
    name, _, length = spec.partition(":")
    preprocess = preprocess or to_pixels(size)
    if name in KNOWN and tuple(class_names) != KNOWN[name]:
        raise ValueError(
            f"expected the {len(KNOWN[name])} classes of {name}, {', '.join(KNOWN[name])}; received {len(class_names)}: "
            f"{', '.join(class_names)}; leave --classes out"
        )
    if name in KNOWN and length and not (length.isdecimal() and int(length)):
        raise ValueError(f"expected {name}:N with a number N of images; received {spec}")
    if name == "shapes":
        if size[0] != size[1]:
            raise ValueError(f"expected a model of square images for shapes; received {size[0]} x {size[1]}")
        return Shapes(int(length or limit or DEFAULT_LIMIT), seed=WORLD_SEED + seed, resolution=size[0])
    if name == "cifar10":
        photos = cifar10("test", preprocess=preprocess)
        order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(photos))
        return SubsetPairs(photos, sorted(order[: int(length or limit or len(photos))].tolist()))
    return open_images(spec, preprocess, class_names, limit=limit, seed=seed, on_error=on_error, root=root)
