"""How things are shown: results in a notebook; names that somebody else chose, safe to show; progress. Every room may import this.

A file name need not be UTF-8, may turn the direction of the text around it, or break its line. Characters that cannot be seen
are escaped here, for the report, JSON, CSV and the console. Progress goes to stderr: bars on a terminal, elsewhere a line now and then.
"""

from __future__ import annotations

import html
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import pandas as pd


# controls, formats (bidi, no width), halves of characters, line separators
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # spell words of some scripts, and emoji
_BYTE = range(0xDC80, 0xDD00)  # how Python keeps a byte of a file name that is no UTF-8


def printable(text: str) -> str:
    r"""The text in one line. Escaped are bytes that are no UTF-8 (`\xff`), new lines (`\n`) and what cannot be seen."""
    if text.isprintable():
        return text
    shown, before = [], ""
    for sign in text:
        joins = sign in _JOINERS and ord(before or "a") > 127
        shown.append(_escaped(sign) if unicodedata.category(sign) in _HIDDEN and not joins else sign)
        before = sign
    return "".join(shown)


def printable_all(value: Any) -> Any:
    """`printable` of every text, and key, of nested lists and mappings."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_all(key): printable_all(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [printable_all(item) for item in value]
    return value


def _escaped(sign: str) -> str:
    if (number := ord(sign)) in _BYTE:
        return f"\\x{number - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode("ascii")


def shown(value: Any) -> Any:
    """Jinja's `finalize`: texts printable; markup, which is ours, as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def inert(text: str) -> str:
    """`printable`, and no formula in a spreadsheet; a plain number stays one."""
    text = printable(text)
    if re.match(r"\s*[=+\-@＝＋－＠]", text) and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def some(names: Sequence[str], most: int = 3, *, comma: str = ", ") -> str:
    """The first few names of a list in words, and how many more there are.

    Args:
        names: all of them; of an empty list "none" is said.
        most: how many are said.
        comma: between two of them.
    """
    return (comma.join(names[:most]) or "none") + f" and {len(names) - most} more" * (len(names) > most)


ROWS = 20
"""Rows that a notebook shows."""


class Result:
    """A result with a table: a notebook shows its `repr`, and the first rows.

    Attributes:
        largest: the column by which rows are sorted, the largest size first, where not all fit; "" keeps their order.
    """

    largest: ClassVar[str] = ""

    def to_frame(self) -> pd.DataFrame:
        raise NotImplementedError

    def _shown(self) -> pd.DataFrame:
        """The table that a notebook shows."""
        return self.to_frame()

    def _repr_html_(self) -> str:
        frame, caption = self._shown(), repr(self)
        if len(frame) > ROWS:
            if self.largest:
                frame = frame.sort_values(self.largest, key=abs, ascending=False)
            caption += f"; {ROWS} of {len(frame)} rows" + (
                f", the largest {self.largest} first" * bool(self.largest)
            )
        table: str = frame.head(ROWS).to_html(index=False, float_format="{:.4g}".format, na_rep="")
        return f"<p>{html.escape(caption)}</p>{table}"


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
