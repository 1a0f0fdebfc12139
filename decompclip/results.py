"""What results share: how they look in a notebook. Every room may import this."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import pandas as pd

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
