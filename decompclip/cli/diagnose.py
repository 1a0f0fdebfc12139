"""`decompclip diagnose`: mistakes that cost accuracy without an error."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from decompclip.cli import options
from decompclip.cli.console import EXPECTED_ERROR, imports, plain_errors, progress, say, skipped_files
from decompclip.display import printable_all, some


def diagnose(
    model: options.ModelOptions,
    images: Annotated[str, typer.Option(help=f"Labelled images: {options.IMAGES}.")],
    classes: options.Classes = None,
    limit: options.Limit = 500,
    root: options.Root = None,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Look for what silently costs accuracy: a wrong activation, normalisation, class order, ...

    Ends with exit code 1 if it finds an error, and with 2 if there are too few images to say.
    """
    with plain_errors():
        model.check()
        options.check_images(images)
        options.check_files(classes=classes)
        with imports(model.model):
            from decompclip.audit.collect import open_source
            from decompclip.data.files import WORLDS
            from decompclip.diagnosis.run import diagnose as run

        images, limit = options.sized(images, limit)
        names = options.known_classes(classes, model.model, images)
        if images not in WORLDS:
            _check_labels(images, names)
        clip = model.load()
        source = open_source(images, clip, names, limit=limit, seed=seed, root=root)
        with progress() as track:
            found = run(clip, source, class_names=names, batch_size=batch_size, track=track)
        say(json.dumps(printable_all(found.to_dict()), indent=1) if as_json else repr(found), lines=True)
        skipped_files(getattr(source, "skipped", ()))
    if any(fault.severity == "error" for fault in found.findings):
        raise typer.Exit(1)
    if not found.enough:
        raise typer.Exit(EXPECTED_ERROR)


def _check_labels(images: str, names: tuple[str, ...]) -> None:
    """Raises ValueError where no folder is named after a class; before seconds of loading."""
    from decompclip.data.pixels import to_pixels
    from decompclip.data.sources import open_images

    if not open_images(images, to_pixels(), names).labelled:
        raise ValueError(
            f"expected images with classes in --images, in a sub-folder for each class or a column of labels; received {images}, "
            f"where no folder is named after one and no image has a label; name them as the classes are: {some(names)}"
        )
