"""Where an audit's images come from, by the words of the command line: a bundled data set, a folder, a table or shards."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from decompclip.attacks.registry import OWN, Attack, open_attack
from decompclip.data.images import ImageSource, OnError, ShapesSource, read_classes
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.data.sources import check_images, open_images
from decompclip.models.bundled import bundled, card
from decompclip.models.clip import HookedCLIP
from decompclip.models.folders import saved_class_names
from decompclip.models.names import known_name

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
    known: Sequence[Attack] = (),
    root: str | Path | None = None,
) -> ImageSource:
    """The images that `spec` names, as `model` takes them.

    Args:
        spec: a bundled data set (`shapes`, `shapes:badnet`, ...), or a folder, table or shards as `open_images` takes them;
            `./shapes` is always a folder.
        known: attacks that the audited model remembers, as `attack_in` takes them.
        limit: at most so many images (a random subset of a folder, seeded; equal folders give equal subsets).
        root: a folder that the images must lie in, links resolved.

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
        attack = attack_in(spec, known)
        return ShapesSource(world, model.normalize, attack and attack.trigger)
    return open_images(
        spec, model.preprocess, class_names, limit=limit, seed=seed, on_error=on_error, root=root
    )


def attack_in(spec: str, known: Sequence[Attack] = ()) -> Attack | None:
    """What triggers the images that `spec` names, where it is a bundled data set; None for clean images and folders.

    Args:
        spec: behind `shapes:` the kind of a twin, as `badnet`; or all that `open_attack` takes.
        known: attacks that the audited model remembers: one of that name comes before the twin's of the same kind.

    Raises:
        ValueError, FileNotFoundError: an unknown data set, or as `open_attack`.
    """
    if not _is_dataset(spec) or spec == WORLD:
        return None
    name, twins = spec.removeprefix(f"{WORLD}:"), datasets()
    if spec in twins and name not in [attack.trigger.name for attack in known]:
        return open_attack(twins[spec] or name)
    if name == OWN or name in bundled() or spec in twins or name.startswith("{") or Path(name).exists():
        return open_attack(name, known, model="the audited model")
    near = difflib.get_close_matches(spec, twins, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"data set {spec!r} is not one of {', '.join(twins)}{hint}; a folder of that name is ./{spec}"
    )


def check_source(spec: str, known: Sequence[Attack] = ()) -> None:
    """Whether `open_source` will find it: asked before any weights are loaded.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `open_source`.
    """
    if _is_dataset(spec):
        attack_in(spec, known)
    else:
        check_images(spec)


def check_model(model: str, checkpoint: str | Path | None = None) -> None:
    """Whether there is such a model and such a file of weights: asked before any is read.

    Raises:
        UnknownModelError: there is no model of that name.
        FileNotFoundError: there is no such file of weights.
    """
    if not Path(model).exists():
        known_name(model)
    if checkpoint is not None and not Path(checkpoint).exists():
        raise FileNotFoundError(f"expected local weights with --checkpoint; there is no file {checkpoint}")


def own_classes(model: str) -> tuple[str, ...]:
    """The classes that a bundled model knows, or a folder that `save_model` wrote; none of others."""
    return tuple(card(model)["class_names"]) if model in bundled() else saved_class_names(Path(model))


def open_classes(classes: str | Path | None, *specs: str, model: str | None = None) -> tuple[str, ...]:
    """Class names from a file; without one, those of the Shapes world if the images come from there, else the model's own.

    Raises:
        ValueError: no file where one is needed, or fewer than two classes.
        FileNotFoundError: there is no such file.
    """
    if classes is None:
        if not any(_is_dataset(spec) for spec in specs):
            if model is not None and (own := own_classes(model)):
                return own
            raise ValueError(
                "expected --classes, a text file with one class a line; received none, and only bundled and saved models and "
                "bundled data sets know theirs"
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
