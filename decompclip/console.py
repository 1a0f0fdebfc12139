"""What a command shows on the terminal: errors and warnings in one line each, and progress."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

T = TypeVar("T")
EXPECTED_ERROR = 2


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
def imports() -> Iterator[None]:
    """For imports of many thousand objects that all stay: without the garbage collector, which walks them again and
    again (a third of the time of a short command)."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


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
