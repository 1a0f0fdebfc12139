"""What a command shows on the terminal: errors and warnings in one line each, and progress."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import typer

from decompclip.display import Pace, meters, printable, silently

T = TypeVar("T")
EXPECTED_ERROR = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


_process = {"rank": 0}
"""Among the processes that share the command."""


def first_process() -> bool:
    """Whether this is the first, or the only one, of the processes that share the command."""
    return _process["rank"] == 0


def say(text: str, *, err: bool = False, lines: bool = False, everywhere: bool = False) -> None:
    """Print a line, or several; characters that cannot be seen are escaped. Of several processes the first one alone does, or all."""
    if everywhere or first_process():
        parts = text.split("\n") if lines else [text]
        typer.echo("\n".join(map(printable, parts)), err=err)


def skipped_files(skipped: Sequence[object]) -> None:
    """Say how many files a source of images or pairs left out, if any."""
    from decompclip.data.files import files_skipped

    if skipped:
        say(files_skipped(len(skipped)), err=True)


@contextmanager
def plain_errors(kept: Callable[[], str] | None = None, *, shared: bool = False) -> Iterator[ExitStack]:
    """Show warnings, and errors of bad input, in one line each; with DECOMPCLIP_DEBUG=1 as Python does.

    Ctrl-C and SIGTERM end it with a line on what is kept, and exit code 130 or 143.

    Args:
        kept: what a stopped command leaves, and how to go on; without it nothing is kept.
        shared: whether the command may be one of several processes (`torchrun`, `accelerate launch`): then the first one alone
            speaks, but for errors and of its end.

    Yields:
        A stack for what is held until the end, such as the lock of a folder.
    """
    where = ""
    try:
        # a RANK alone is left over from something else
        if shared and (count := _launched("WORLD_SIZE", 1)) > 1:
            _process["rank"] = rank = _launched("RANK", 0)
            where = f"process {rank} of {count}: "
        with ExitStack() as held, _ends_on_sigterm(), warnings.catch_warnings():
            if not os.environ.get("DECOMPCLIP_DEBUG"):
                warnings.showwarning = _one_line
            yield held
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        what = kept() if kept else "nothing was written; run the same again to start anew"
        say(f"{where}stopped by {number.name}: {what}", err=True, everywhere=True)
        raise typer.Exit(128 + number) from None
    except (ValueError, OSError, LookupError, ArithmeticError, ImportError, NotImplementedError) as error:
        if os.environ.get("DECOMPCLIP_DEBUG"):
            raise
        words = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        said = in_options(" ".join(words.split())) or type(error).__name__
        say(f"{where}error: {said}", err=True, everywhere=True)
        raise typer.Exit(EXPECTED_ERROR) from None
    finally:
        _process["rank"] = 0


def _launched(name: str, default: int) -> int:
    """What torchrun or accelerate launch says in an environment variable.

    Raises:
        ValueError: no whole number.
    """
    given = os.environ.get(name, str(default))
    if not given.strip().isdecimal():
        raise ValueError(
            f"expected a whole number in the environment variable {name}, as torchrun and accelerate launch set it; "
            f"received {given!r}; unset it to start one process"
        )
    return int(given)


_ARGUMENTS = re.compile(
    r"(?<![\w.-])(pretrained|checkpoint|activation|image_size|prefix|device|templates|on_error|batch_size|limit|seed)="
    r"(?P<value>[^\s,;.)])?"
)


def in_options(words: str) -> str:
    """A message of the library with options (`--image-size 64`) in place of arguments (`image_size=64`)."""
    words = re.sub(r"`load\('([^']+)'(?:, pretrained='([^']+)')?\)`", _as_command, words)
    return _ARGUMENTS.sub(
        lambda found: f"--{found[1].replace('_', '-')}{' ' + found['value'] if found['value'] else ''}", words
    )


def _as_command(found: re.Match[str]) -> str:
    return f"MODEL {found[1]}{f' with --pretrained {found[2]}' if found[2] else ''}"


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_line(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, UserWarning):  # others are for developers
        say(f"warning: {in_options(' '.join(str(message).split()))}", err=True)


@contextmanager
def imports(what: str = "") -> Iterator[None]:
    """Import without the garbage collector, which takes a third of the time of a short command; say that `what` is loading."""
    if what:  # seconds pass before anything else is seen
        say(f"{what}: loading", err=True)
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextmanager
def progress() -> Iterator[Any]:
    """A `Track` that shows on stderr what is done, and how long the rest takes; of images also how fast they go by, and how long they were waited for."""
    if not first_process():
        yield silently
        return
    with meters() as begin:

        def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
            update, pace = begin(description, total), Pace()
            for done, item in enumerate(pace.over(items), 1):
                yield item
                update(done, f"{description}{pace}")

        yield track
