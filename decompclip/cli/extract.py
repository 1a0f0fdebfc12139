"""`decompclip extract`: a data set decomposed once, into a store that everything reads, or into moments alone."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import imports, plain_errors, progress, say
from decompclip.files import check_folder


class StoredAs(str, Enum):
    """As `StoredType`, whose module imports torch."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def extract(
    model: options.ModelOptions,
    images: Annotated[
        str, typer.Argument(help=f"Images: {options.IMAGES}, cifar10 or tiny-imagenet (their test part).")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the store: a new one, or that of the same run, which goes on.")
    ],
    dtype: Annotated[
        StoredAs, typer.Option(help="Of the stored terms; its error is measured and written down.")
    ] = StoredAs.fp32,
    moments_only: Annotated[
        bool,
        typer.Option(
            "--moments-only",
            help="Keep means and second moments alone: as much on disk and in memory whatever the number of images.",
        ),
    ] = False,
    convention: Annotated[
        options.Convention,
        typer.Option(help="paper shares constants and the stream's mean out among the terms."),
    ] = options.Convention.centred,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize", help="Terms that sum to features of length 1, as most detectors want them."
        ),
    ] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 1024,
    classes: options.Classes = None,
    limit: options.Limit = None,
    on_error: options.OnError = options.Unreadable.skip,
    root: options.Root = None,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
) -> None:
    """Decompose IMAGES once, into a folder that `decompclip.Store` opens.

    A run that is stopped, by whatever, goes on with the same command and ends with the same bytes; shards that are damaged are
    named and built anew. torchrun and accelerate launch spread it over processes that share the folder.
    """
    again = f"what is whole stays in {out}; the same command goes on from there"
    with plain_errors(lambda: again, shared=True) as held:
        check_folder(out, "the store")
        model.check()
        options.check_images(images)
        options.check_files(classes=classes)
        with imports(model.model):
            from decompclip.audit.collect import own_classes
            from decompclip.data.sources import classes_of, open_labelled
            from decompclip.operators.extract import extract as run

        known = classes_of(images) or own_classes(model.model)
        names = known if classes is None else options.known_classes(classes, model.model, images)
        accelerator, device = held.enter_context(options.joined(model.device))
        model = replace(model, device=device)
        clip = model.load(text=False)
        source = open_labelled(
            images,
            clip.image_size,
            names,
            preprocess=clip.pixels,
            limit=limit,
            seed=seed,
            on_error=on_error.value,
            root=root,
        )
        with progress() as track:
            found: Any = run(
                clip,
                source,
                out,
                dtype=dtype.value,
                moments_only=moments_only,
                convention=convention.value,
                normalize=normalize,
                shard_size=shard_size,
                batch_size=batch_size,
                class_names=names,
                source=images,
                accelerator=accelerator,
                track=track,
                log=lambda text: say(text, err=True),
            )
        say(repr(found))
        say(f"{'Moments' if moments_only else 'Store'}: {out.resolve()}")
