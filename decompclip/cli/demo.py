"""`decompclip demo`: an audit of the bundled backdoored models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decompclip.cli import options
from decompclip.cli.audit import finish
from decompclip.cli.console import imports, plain_errors, progress
from decompclip.files import alone_in


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    count: Annotated[int, typer.Option(min=50, help="Images of each set.")] = 1500,
    images: options.OldImages = None,
    seed: options.Seed = 0,
) -> None:
    """Audit the bundled backdoored models, each beside the clean model they were made from."""
    with plain_errors() as held:
        options.check_folder(out, "the report")
        with imports():
            from decompclip.audit import AuditConfig
            from decompclip.audit.pipeline import run_demo

        held.enter_context(alone_in(out))
        with progress() as track:
            results = run_demo(
                images=options.count_of(count, images),
                config=AuditConfig(batch_size=250, seed=seed),
                track=track,
            )
        finish(results, out, title="Two backdoored CLIPs beside their clean twin")
