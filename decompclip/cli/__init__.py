"""The command line, a file for each command. Heavy imports wait inside the commands, so that --help is instant."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from decompclip import __version__
from decompclip.cli.apply_trigger import apply_trigger
from decompclip.cli.audit import audit, demo
from decompclip.cli.bench import bench
from decompclip.cli.data import data
from decompclip.cli.diagnose import diagnose
from decompclip.cli.evaluate import evaluate
from decompclip.cli.extract import extract
from decompclip.cli.finetune import finetune
from decompclip.cli.options import grouped
from decompclip.cli.poison import poison
from decompclip.cli.repair import repair
from decompclip.cli.zoo import zoo

app = typer.Typer(
    name="decompclip", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
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


for command in (demo, apply_trigger, poison, bench):
    app.command()(command)
for command in (audit, diagnose, evaluate, extract, finetune, repair):
    app.command()(grouped(command))
app.add_typer(zoo, name="zoo")
app.add_typer(data, name="data")


def main() -> None:
    """The entry point of the console script."""
    try:
        app()
    finally:
        gc.freeze()  # at the end Python would go through all that was imported, once more and again
