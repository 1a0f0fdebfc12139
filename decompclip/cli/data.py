"""`decompclip data`: whether a data set is whole, what is missing or broken, and how to get it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decompclip.cli import options
from decompclip.cli.console import imports, plain_errors, progress, say
from decompclip.display import some
from decompclip.files import check_folder, write_json

data = typer.Typer(no_args_is_help=True, help="Data sets on the disk.")
SHOWN = 10


@data.command()
def check(
    path: Annotated[
        str,
        typer.Argument(
            help="imagenet:PATH, caltech101:PATH, pets:PATH or cc3m:PATH; or a path alone, whose layout tells."
        ),
    ],
    decode: Annotated[
        bool, typer.Option(help="Open every picture, or only look whether it is there.")
    ] = True,
    split: Annotated[
        Path | None,
        typer.Option(
            help="Write the pictures of the validation part (20 %, seeded) and of the rest to this JSON file."
        ),
    ] = None,
) -> None:
    """Say what a data set holds, and what of it is missing or broken; exit code 1 where something is.

    ImageNet-1K's validation photographs, Caltech-101 and Oxford-IIIT Pet are compared with what they should hold. Of all else, such as CC3M
    in shards or a table, every picture is opened.
    """
    with plain_errors():
        if split is not None:
            check_folder(split.parent, "the parts")
        options.check_images(path)
        with imports():
            from decompclip.data.files import KNOWN
            from decompclip.data.known import parts_of
            from decompclip.data.sources import check_data, known_source

        source = known_source(path)
        if split is not None and source.kind not in KNOWN:
            raise ValueError(
                f"expected {', '.join(f'{word}:PATH' for word in KNOWN)} with --split; received {path}"
            )
        with progress() as track:
            found = check_data(path, decode=decode, track=track)
        of = "" if found.expected is None else f" of {found.expected:,}"
        say(f"{found.title}: {found.images:,}{of} pictures{'' if decode else ', none opened'}")
        if found.missing:
            say(f"without a picture: {some(found.missing, SHOWN)}")
        if found.skipped:
            say(
                f"{len(found.skipped)} left out: {some([f'{one.path}: {one.reason}' for one in found.skipped], SHOWN, comma='; ')}"
            )
        if split is not None:
            parts = parts_of(source)
            write_json(split, parts)
            say(f"{split}: {', '.join(f'{len(names)} for {part}' for part, names in parts.items())}")
        if not found.whole:
            say(f"to get the rest: {found.get}" if found.get else "repair or remove what is left out")
            raise typer.Exit(1)
