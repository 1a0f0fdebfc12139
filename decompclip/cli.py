"""The command line. Heavy imports wait inside the commands, so that --help is instant."""

from __future__ import annotations

import gc
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decompclip import __version__
from decompclip.bench_command import bench
from decompclip.command_options import (
    MAX_SEED,
    Activation,
    BatchSize,
    Checkpoint,
    Device,
    Model,
    OnError,
    Pretrained,
    check_folder,
    usable_device,
)
from decompclip.console import EXPECTED_ERROR, imports, plain_errors, progress
from decompclip.evaluate_command import evaluate
from decompclip.finetune_command import finetune
from decompclip.poison_command import poison
from decompclip.zoo_command import zoo

if TYPE_CHECKING:
    from decompclip.audit import AuditResult

app = typer.Typer(
    name="decompclip",
    help="Take a CLIP's image encoder apart, and audit it for backdoors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Convention(str, Enum):
    centred = "centred"
    paper = "paper"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"decompclip {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it, and stop.")
    ] = False,
) -> None:
    """Take a CLIP's image encoder apart, and audit it for backdoors."""


@app.command()
def audit(
    model: Model,
    clean: Annotated[str, typer.Option(help="Folder of clean images, or a bundled data set (shapes).")],
    suspect: Annotated[
        str, typer.Option(help="Folder of suspect images, or one of shapes:badnet, shapes:blended, ...")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    classes: Annotated[
        Path | None, typer.Option(help="File with one class a line; bundled data sets know theirs.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The class that the attacker wants; inferred if not given.")
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    activation: Annotated[
        Activation, typer.Option(help="Of the MLPs, also the reference's, where the checkpoint does not say.")
    ] = Activation.auto,
    reference: Annotated[
        str | None, typer.Option(help="A model to show beside it, as a clean twin; like MODEL.")
    ] = None,
    reference_pretrained: Annotated[str | None, typer.Option(help="Its tag of weights.")] = None,
    reference_checkpoint: Annotated[Path | None, typer.Option(help="Its local weights.")] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Most images of each set (a seeded subset); 0 takes all of a folder.")
    ] = 2000,
    on_error: Annotated[OnError, typer.Option(help="What to do with unreadable images.")] = OnError.skip,
    convention: Annotated[
        Convention, typer.Option(help="Bookkeeping of means and biases.")
    ] = Convention.centred,
    epsilon: Annotated[float, typer.Option(help="Fixed threshold of Decomp-Rep and Decomp-Det.")] = 0.002,
    quantile: Annotated[float, typer.Option(help="Clean quantile of their other threshold.")] = 0.05,
    zeta: Annotated[
        int, typer.Option(min=0, help="Decomp-Det: suspicious with more flagged heads than this.")
    ] = 5,
    examples: Annotated[int, typer.Option(min=0, max=12, help="Images to draw maps over.")] = 3,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of subsets and splits.")] = 0,
    device: Device = None,
) -> None:
    """Audit MODEL for a backdoor: one HTML report that opens offline, and a JSON with every number."""
    with plain_errors():
        with imports():
            from decompclip.audit import AuditConfig, Names, run_audit
            from decompclip.audit.sources import open_classes, open_source
            from decompclip.models.loading import load

        check_folder(out, "the report")
        if reference is None and (reference_pretrained or reference_checkpoint):
            raise ValueError(
                "expected --reference NAME with --reference-pretrained and --reference-checkpoint"
            )
        class_names = open_classes(classes, clean, suspect)
        if target is not None:
            _check_target(target, class_names, classes)
        config = AuditConfig(
            convention=convention.value,
            epsilon=epsilon,
            quantile=quantile,
            zeta=zeta,
            examples=examples,
            batch_size=batch_size,
            seed=seed,
        )
        device = usable_device(device)
        audited = load(
            model, pretrained=pretrained, checkpoint=checkpoint, activation=activation.value, device=device
        )
        loaded = [(model, audited)]
        if reference is not None:
            twin = load(
                reference,
                pretrained=reference_pretrained,
                checkpoint=reference_checkpoint,
                activation=activation.value,
                device=device,
            )
            loaded.append((f"{reference} (reference)" if reference == model else reference, twin))
        results: list[AuditResult] = []
        with progress() as track:
            for name, clip in loaded:
                options = {"limit": limit or None, "seed": seed, "on_error": on_error.value}
                result = run_audit(
                    clip,
                    open_source(clean, clip, class_names, **options),
                    open_source(suspect, clip, class_names, **options),
                    class_names,
                    target=results[0].target if results else target,  # the same for both
                    names=Names(name, clean, suspect),
                    config=config,
                    track=track,
                )
                results.append(result)
        _finish(results, out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    images: Annotated[int, typer.Option(min=50, help="Images of each set.")] = 1500,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of images and splits.")] = 0,
) -> None:
    """Audit the bundled backdoored models, each beside the clean model they were made from."""
    with plain_errors():
        with imports():
            from decompclip.audit import AuditConfig
            from decompclip.audit.demo import run_demo

        check_folder(out, "the report")
        config = AuditConfig(batch_size=250, seed=seed)
        with progress() as track:
            results = run_demo(images=images, config=config, track=track)
        _finish(results, out, title="Two backdoored CLIPs beside their clean twin")


@app.command()
def diagnose(
    model: Model,
    images: Annotated[
        str, typer.Option(help="Folder with a sub-folder of images a class, or a bundled data set (shapes).")
    ],
    classes: Annotated[
        Path | None, typer.Option(help="File with one class a line; bundled models know theirs.")
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    activation: Annotated[
        Activation, typer.Option(help="Of the MLPs, where the checkpoint does not say.")
    ] = Activation.auto,
    limit: Annotated[int, typer.Option(min=0, help="Most images (a seeded subset); 0 takes all.")] = 500,
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

        typer.echo(f"{model}: loading", err=True)  # seconds pass before anything else is seen
        with imports():
            from decompclip.audit.diagnose import diagnose as run_diagnosis
            from decompclip.audit.diagnosis.command import check_text, class_names
            from decompclip.audit.sources import open_source
            from decompclip.models.loading import load

        names = class_names(model, classes, images)
        weights = {"pretrained": pretrained, "checkpoint": checkpoint, "activation": activation.value}
        clip = load(model, **weights, device=usable_device(device))
        check_text(clip)
        source = open_source(images, clip, names, limit=limit or None, seed=seed)
        with progress() as track:
            found = run_diagnosis(clip, source, class_names=names, batch_size=batch_size, track=track)
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else repr(found))
        if skipped := len(source.skipped):
            typer.echo(f"{skipped} file{'s' if skipped > 1 else ''} skipped", err=True)
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


def _check_target(target: str, class_names: tuple[str, ...], classes: Path | None) -> None:
    from decompclip.data.images import class_index

    try:
        class_index(target, class_names)
    except ValueError as error:
        where = f" (class file {classes})" if classes else ""
        raise ValueError(f"--target: {error}{where}") from error


def _finish(results: list[AuditResult], out: Path, *, title: str | None = None) -> None:
    from decompclip.audit import findings
    from decompclip.report import write_report

    path = write_report(results, out, title=title)
    for result in results:
        skipped = sum(map(len, result.skipped.values()))
        counts = f"{result.counts['clean']} clean and {result.counts['suspect']} suspect images"
        typer.echo(
            f"{result.name}: {counts}{f'; {skipped} files skipped, see the report' if skipped else ''}",
            err=True,
        )
        typer.echo(f"{result.name} on {result.suspect_name}: {findings(result)[0].title}")
    typer.echo(f"Report: {path.resolve()}")


for command in (poison, finetune, evaluate, bench):
    app.command()(command)
app.add_typer(zoo, name="zoo")

if __name__ == "__main__":
    main()
