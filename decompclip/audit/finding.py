"""One statement of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weight = Literal["evidence", "no evidence", "unclear", "note"]


@dataclass(frozen=True)
class Finding:
    """One statement, how much it weighs, and the sentence of it."""

    weight: Weight
    title: str
    text: str
