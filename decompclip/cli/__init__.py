"""The command line. Heavy imports wait inside the commands, so that --help is instant."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer

from decompclip import __version__
from decompclip.cli.apply_trigger import apply_trigger
from decompclip.cli.audit import audit, finish
from decompclip.cli.bench import bench
from decompclip.cli.console import EXPECTED_ERROR, imports, plain_errors, progress, say
from decompclip.cli.evaluate import evaluate
from decompclip.cli.finetune import finetune
from decompclip.cli.options import (
    MAX_SEED,
    Activation,
    BatchSize,
    Checkpoint,
    Device,
    ImageSize,
    Model,
    Prefix,
    Pretrained,
    Root,
    check_folder,
    usable_device,
)
from decompclip.cli.poison import poison
from decompclip.cli.repair import repair
from decompclip.cli.zoo import zoo
from decompclip.files import alone_in
from decompclip.printable import printable_all

app = typer.Typer(
    name="decompclip",
    help="Take a CLIP's image encoder apart, and audit it for backdoors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"decompclip {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take a CLIP's image encoder apart, and audit it for backdoors."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    images: Annotated[int, typer.Option(min=50, help="Images of each set.")] = 1500,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of images and splits.")] = 0,
) -> None:
    """Audit the bundled backdoored models, each beside the clean model they were made from."""
    with plain_errors() as held:
        with imports():
            from decompclip.audit import AuditConfig
            from decompclip.audit.pipeline import run_demo

        check_folder(out, "the report")
        held.enter_context(alone_in(out))
        config = AuditConfig(batch_size=250, seed=seed)
        with progress() as track:
            results = run_demo(images=images, config=config, track=track)
        finish(results, out, title="Two backdoored CLIPs beside their clean twin")


@app.command()
def diagnose(
    model: Model,
    images: Annotated[
        str,
        typer.Option(
            help="Labelled images: a folder with a sub-folder a class, a table (.csv, .tsv), WebDataset shards, or a bundled data set (shapes)."
        ),
    ],
    classes: Annotated[
        Path | None, typer.Option(help="File with one class a line; bundled and saved models know theirs.")
    ] = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = None,
    image_size: ImageSize = None,
    pretrained: Pretrained = None,
    activation: Annotated[
        Activation, typer.Option(help="Of the MLPs, where the checkpoint does not say.")
    ] = Activation.auto,
    limit: Annotated[int, typer.Option(min=0, help="Most images (a seeded subset); 0 takes all.")] = 500,
    root: Root = None,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the subset.")] = 0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, as JSON.")] = False,
) -> None:
    """Look for what silently costs accuracy: a wrong activation, normalisation, class order, ...

    Ends with exit code 1 if it finds an error, and with 2 if there are too few images to say.
    """
    with plain_errors():
        import json

        say(f"{model}: loading", err=True)  # seconds pass before anything else is seen
        with imports():
            from decompclip.audit.collect import open_source
            from decompclip.cli.diagnosis import check_text, class_names
            from decompclip.data.files import files_skipped
            from decompclip.diagnosis.run import diagnose as run_diagnosis
            from decompclip.models.loading import load

        names = class_names(model, classes, images)
        weights = {
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "prefix": prefix,
            "image_size": image_size,
            "activation": activation.value,
        }
        clip = load(model, **weights, device=usable_device(device))
        check_text(clip)
        source = open_source(images, clip, names, limit=limit or None, seed=seed, root=root)
        with progress() as track:
            found = run_diagnosis(clip, source, class_names=names, batch_size=batch_size, track=track)
        say(json.dumps(printable_all(found.to_dict()), indent=1) if as_json else repr(found), lines=True)
        if skipped := len(source.skipped):
            say(files_skipped(skipped), err=True)
    if any(fault.severity == "error" for fault in found.findings):
        raise typer.Exit(1)
    if not found.enough:
        raise typer.Exit(EXPECTED_ERROR)


def main() -> None:
    """The entry point of the console script."""
    try:
        app()
    finally:
        gc.freeze()  # at the end Python would go through all that was imported, once more and again


for command in (audit, apply_trigger, repair, poison, finetune, evaluate, bench):
    app.command()(command)
app.add_typer(zoo, name="zoo")
