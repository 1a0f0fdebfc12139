"""Pairs by a word or a path, as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from decompclip.data.cifar10 import TEMPLATES, cifar10
from decompclip.data.datasets import folder_pairs
from decompclip.data.files import is_bookkeeping
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import Preprocess
from decompclip.data.shapes_pairs import ShapesPairs
from decompclip.data.shards import ShardPairs, check_finished
from decompclip.data.tables import CsvPairs

SHAPES_LENGTH = 16_000
"""Pairs of the bundled world, unless said otherwise."""

PLAIN_TEMPLATES = ("a photo of a {}.",)


Kind = Literal["folder", "table", "shards", "poisons"]


def kind_of(spec: str | Path) -> Kind:
    """What a path stands for: a table or shards by its name, or a folder; `poisons.json` for what it lists."""
    path = Path(spec)
    if path.suffix.lower() in {".csv", ".tsv"} and not path.is_dir():
        return "table"
    if path.name == "poisons.json" and not path.is_dir():
        return "poisons"
    if path.is_dir():
        shards = (shard for shard in path.glob("*.tar") if not is_bookkeeping(shard.name))
        return "shards" if any(shards) else "folder"
    return "shards" if ".tar" in str(spec) else "folder"


def open_pairs(
    spec: str | Path,
    preprocess: Preprocess | None = None,
    *,
    class_names: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    seed: int = 0,
    root: str | Path | None = None,
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
        root: a folder that the images of folders and tables must lie in, links resolved.

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
    texts = PLAIN_TEMPLATES if templates is None else templates
    if Path(spec).is_dir():
        check_finished(Path(spec))
    filled = texts if class_names else None
    match kind_of(spec):
        case "table":
            return CsvPairs(
                spec,
                preprocess,
                class_names=class_names,
                templates=filled,
                root=root,
                caption_seed=seed,
                order_seed=seed,
            )
        case "shards":
            return ShardPairs(
                str(spec),
                preprocess,
                class_names=class_names,
                templates=filled,
                caption_seed=seed,
                order_seed=seed,
            )
        case "folder" if Path(spec).is_dir():
            return folder_pairs(spec, texts, preprocess, root=root, caption_seed=seed, order_seed=seed)
    raise FileNotFoundError(
        "expected pairs as shapes, cifar10, a .csv or .tsv table, WebDataset shards (.tar) or a folder with a sub-folder "
        f"of images a class; there is no {spec}"
    )
