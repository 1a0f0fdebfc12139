"""Pairs by a word or a path, as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from decompclip.data.cifar10 import TEMPLATES, cifar10
from decompclip.data.datasets import folder_pairs
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import Preprocess
from decompclip.data.shapes_pairs import ShapesPairs
from decompclip.data.shards import ShardPairs
from decompclip.data.tables import CsvPairs

SHAPES_LENGTH = 16_000
"""Pairs of the bundled world, unless said otherwise."""

PLAIN_TEMPLATES = ("a photo of a {}.",)


def open_pairs(
    spec: str | Path,
    preprocess: Preprocess | None = None,
    *,
    class_names: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> Pairs:
    """The pairs that `spec` names.

    Args:
        spec: `shapes` or `shapes:5000` (the bundled world); `cifar10` (in the folder that DECOMPCLIP_DATA names); a
            `.csv` or `.tsv` table; WebDataset shards, as `ShardPairs` takes them; or a folder with a sub-folder of
            images a class.
        preprocess: from a picture to pixels in [0, 1].
        class_names: of shards and tables.
        templates: captions of images that have a class; by default CIFAR-10's own, else "a photo of a {}.".
        seed: of the captions drawn and of the order; of the world too.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it cannot be used.
    """
    name, _, length = str(spec).partition(":")
    if name == "shapes":
        if length and not (length.isdecimal() and int(length)):
            raise ValueError(f"expected shapes:N with a number N of pairs; received {spec}")
        return ShapesPairs(int(length or SHAPES_LENGTH), seed=seed, order_seed=seed)
    if name == "cifar10":
        texts = TEMPLATES if templates is None else templates
        return cifar10(templates=texts, preprocess=preprocess, caption_seed=seed, order_seed=seed)
    path = Path(spec)
    if path.suffix.lower() in {".csv", ".tsv"}:
        return CsvPairs(path, preprocess, class_names=class_names, order_seed=seed)
    texts = PLAIN_TEMPLATES if templates is None else templates
    if path.is_dir() and not any(path.glob("*.tar")):
        return folder_pairs(path, texts, preprocess, caption_seed=seed, order_seed=seed)
    if path.is_dir() or ".tar" in str(spec):
        return ShardPairs(
            str(spec),
            preprocess,
            class_names=class_names,
            templates=texts if class_names else None,
            caption_seed=seed,
            order_seed=seed,
        )
    raise FileNotFoundError(
        "expected pairs as shapes, cifar10, a .csv or .tsv table, WebDataset shards (.tar) or a folder with a sub-folder "
        f"of images a class; there is no {spec}"
    )
