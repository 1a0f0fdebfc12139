"""Where an audit's images come from, by the words of the command line: a folder or a bundled data set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decompclip.attacks.registry import from_card
from decompclip.data.images import FolderSource, ImageSource, OnError, ShapesSource, image_files, read_classes
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.models.clip import HookedCLIP
from decompclip.models.zoo import bundled, card

WORLD = "shapes"
WORLD_SEED = 7_001
"""Stream of the Shapes world that audits look at; no bundled model was trained or measured on it."""

DEFAULT_LIMIT = 2_000


def datasets() -> dict[str, str | None]:
    """Names of the bundled data sets, each with the model whose trigger its images carry."""
    prefix = f"{WORLD}-"
    poisoned = [name for name in bundled() if name.startswith(prefix) and card(name).get("backdoor")]
    return {WORLD: None} | {f"{WORLD}:{name.removeprefix(prefix)}": name for name in poisoned}


def open_source(
    spec: str,
    model: HookedCLIP,
    class_names: tuple[str, ...],
    *,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    on_error: OnError = "skip",
) -> ImageSource:
    """The images that `spec` names, as `model` takes them.

    Args:
        spec: a bundled data set (`shapes`, `shapes:badnet`, ...) or a folder; `./shapes` is always a folder.
        limit: at most so many images (a random subset of a folder, seeded; equal folders give equal subsets).

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `FolderSource`, or an unknown data set.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected a limit of at least 1 image; received {limit}; None takes all")
    if _is_dataset(spec):
        world = Shapes(limit or DEFAULT_LIMIT, seed=WORLD_SEED + seed, resolution=model.image_size[0])
        if class_names != PROPERTIES["shape"]:
            raise ValueError(
                f"expected the classes of the Shapes world with data set {spec!r}: {', '.join(PROPERTIES['shape'])}; "
                f"received {', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}; leave --classes out"
            )
        carrier = _known(spec)
        if carrier is None:
            return ShapesSource(world, model.normalize)
        return triggered_source(card(carrier), model, world)
    return FolderSource(
        spec, model.preprocess, class_names=class_names, on_error=on_error, limit=limit, seed=seed
    )


def check_source(spec: str) -> None:
    """Whether `open_source` will find it: asked before any weights are loaded.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `open_source`.
    """
    if _is_dataset(spec):
        _known(spec)
    else:
        image_files(Path(spec))


def triggered_source(facts: Mapping[str, Any], model: HookedCLIP, world: Shapes) -> ShapesSource:
    """Images of the world that carry the trigger which a bundled model's card describes.

    Raises:
        ValueError: the card is of a model without a backdoor.
    """
    backdoor = facts.get("backdoor")
    if not backdoor:
        raise ValueError(f"expected the card of a backdoored model; {facts.get('name')!r} has no backdoor")
    return ShapesSource(world, model.normalize, from_card(backdoor["trigger"]))


def open_classes(classes: str | Path | None, *specs: str) -> tuple[str, ...]:
    """Class names from a file; without one, those of the Shapes world if the images come from there.

    Raises:
        ValueError: no file where one is needed, or fewer than two classes.
        FileNotFoundError: there is no such file.
    """
    if classes is None:
        if not any(_is_dataset(spec) for spec in specs):
            raise ValueError(
                "expected --classes, a text file with one class a line; only bundled data sets do without"
            )
        return PROPERTIES["shape"]
    names = read_classes(classes)
    if len(names) < 2:
        raise ValueError(
            f"expected at least two classes to tell apart; {classes} names only {', '.join(names)}"
        )
    return names


def _is_dataset(spec: str) -> bool:
    return spec == WORLD or spec.startswith(f"{WORLD}:")


def _known(spec: str) -> str | None:
    known = datasets()
    if spec not in known:
        near = difflib.get_close_matches(spec, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"data set {spec!r} is not one of {', '.join(known)}{hint}; a folder of that name is ./{spec}"
        )
    return known[spec]
