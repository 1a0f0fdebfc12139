"""How things are shown: results in a notebook; names that somebody else chose, safe to show. Every room may import this.

A file name need not be UTF-8, may turn the direction of the text around it, or break its line. Characters that cannot be seen
are escaped here, for the report, JSON, CSV and the console.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
