"""Progress on stderr: bars on a terminal, elsewhere a line now and then. Every room may import this."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

from decompclip.display import printable

FIRST, MOST = 5.0, 60.0
"""Seconds until the first line where there is no terminal, and between two of the later ones."""

Update = Callable[[int, str], None]
"""Takes how much is done, and of what."""

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """Shows progress: passes `items` through while it says what is being done and how many there are."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterator[T]: ...


def silently(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The `Track` that shows nothing."""
    del description, total
    yield from items


def span(seconds: float) -> str:
    """`0:45`, `12:05`, `3:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """How fast images go by, and what share of the time whoever uses them waits for them; `str` says so."""

    def __init__(self) -> None:
        self.images, self.waited, self._began = 0, 0.0, 0.0

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Passes the items through; batches are counted by their `images`, pairs one by one."""
        source, self._began = iter(items), self._began or time.perf_counter()
        while True:
            asked = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            self.images += len(getattr(item, "images", ())) or hasattr(item, "image")
            yield item

    def __str__(self) -> str:
        took = time.perf_counter() - self._began
        if not self.images:
            return ""
        return f" ({self.images / took:.3g} images/s, {self.waited / took:.0%} of the time waiting for them)"


@contextmanager
def meters() -> Iterator[Callable[[str, int], Update]]:
    """A function that begins a piece of work (description, steps) and returns its `Update`; shows the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bars:

        def begin(description: str, total: int) -> Update:
            # the description may hold brackets, which rich would take for markup
            task = bars.add_task(printable(description).replace("[", r"\["), total=total)

            def update(done: int, words: str) -> None:
                bars.update(task, completed=done, description=printable(words).replace("[", r"\["))

            return update

        yield begin


def _lines(description: str, total: int) -> Update:
    print(printable(description), file=sys.stderr, flush=True)
    began = last = time.monotonic()
    wait, before = FIRST, None

    def update(done: int, words: str) -> None:
        nonlocal last, wait, before
        now = time.monotonic()
        if before is None:
            before = done - 1  # what an earlier run had done
        if done >= total:
            print(f"{printable(words)}: all {total} in {span(now - began)}", file=sys.stderr, flush=True)
            return
        if now - last < wait:
            return
        left = (now - began) / max(1, done - before) * (total - done)
        print(f"{printable(words)}: {done} of {total}, {span(left)} left", file=sys.stderr, flush=True)
        last, wait = now, min(MOST, 2 * wait)

    return update
