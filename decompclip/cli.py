"""The command line: `decompclip audit`, `decompclip demo`. Heavy imports wait inside the commands."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from decompclip import __version__

if TYPE_CHECKING:
    from decompclip.audit import AuditResult

T = TypeVar("T")
EXPECTED_ERROR = 2
MAX_SEED = 2**32 - 1  # the largest that scikit-learn takes

app = typer.Typer(
    name="decompclip",
    help="Take a CLIP's image encoder apart, and audit it for backdoors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class OnError(str, Enum):
    skip = "skip"
    stop = "raise"


class Activation(str, Enum):
    auto = "auto"
    gelu = "gelu"
    quick_gelu = "quick_gelu"


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
    model: Annotated[
        str, typer.Argument(help="open_clip's name (ViT-B-32, ...) or a bundled model (shapes, ...).")
    ],
    clean: Annotated[str, typer.Option(help="Folder of clean images, or a bundled data set (shapes).")],
    suspect: Annotated[
        str, typer.Option(help="Folder of suspect images, or one of shapes:badnet, shapes:blended.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    classes: Annotated[
        Path | None, typer.Option(help="File with one class a line; bundled data sets know theirs.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The class that the attacker wants; inferred if not given.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Local weights for MODEL; code in them is never run.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip's tag of weights for MODEL, as openai.")
    ] = None,
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of subsets and splits.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; by default the first GPU, else the CPU.")
    ] = None,
) -> None:
    """Audit MODEL for a backdoor: one HTML report that opens offline, and a JSON with every number."""
    with plain_errors():
        import torch

        from decompclip.audit import AuditConfig, Names, run_audit
        from decompclip.audit.sources import open_classes, open_source
        from decompclip.models.loading import load

        _check_out(out)
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
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_device(device)
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
        from decompclip.audit import AuditConfig
        from decompclip.audit.demo import run_demo

        _check_out(out)
        config = AuditConfig(batch_size=250, seed=seed)
        with progress() as track:
            results = run_demo(images=images, config=config, track=track)
        _finish(results, out, title="Two backdoored CLIPs beside their clean twin")


def main() -> None:
    """The entry point of the console script."""
    app()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Warnings, and errors that bad input causes, become one line each; DECOMPCLIP_DEBUG=1 shows where they
    come from."""
    try:
        with warnings.catch_warnings():
            if not os.environ.get("DECOMPCLIP_DEBUG"):
                warnings.showwarning = _one_line
            yield
    except (ValueError, OSError, LookupError, ArithmeticError, ImportError, NotImplementedError) as error:
        if os.environ.get("DECOMPCLIP_DEBUG"):
            raise
        words = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        typer.echo(f"error: {' '.join(words.split()) or type(error).__name__}", err=True)
        raise typer.Exit(EXPECTED_ERROR) from None


def _one_line(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, UserWarning):  # others are for developers
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


@contextmanager
def progress() -> Iterator[Any]:
    """A `Track` that draws bars on stderr, and leaves one line a finished step where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
            if not console.is_terminal:
                print(description, file=sys.stderr)
            # the description may hold brackets, which rich would take for markup
            task = bars.add_task(description.replace("[", r"\["), total=total)
            for item in items:
                yield item
                bars.advance(task)

        yield track


def _check_out(out: Path) -> None:
    """Said before the work, not after it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"expected a folder to write the report to with --out; {out} is a file")
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(
            f"expected a folder to write the report to with --out; {above} cannot be written to"
        )


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device!r} cannot be used here: {reason}; take cpu") from error


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


if __name__ == "__main__":
    main()
