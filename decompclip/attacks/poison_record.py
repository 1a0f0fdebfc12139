"""What was poisoned: a list that can be saved, read back and checked."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompclip.files import write_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Poison:
    """One poisoned pair.

    Attributes:
        id: what the pair is called in its source.
        index: given to the trigger, whose draws follow from it.
        caption, was: what the caption says now, and what it said.
    """

    id: str
    index: int
    caption: str
    was: str


@dataclass(frozen=True)
class PoisonRecord:
    """Everything that was poisoned, and what it takes to poison it again.

    Attributes:
        trigger: its card.
        target, also_called: the class, and its other names.
        seed: of the choice and of the captions.
        pairs, candidates: how many there are, and how many of them the attack may poison; of a stream that has
            been gone through once, else None.
        source: digest of the ids and captions of all pairs, clean; None where `pairs` is.
        poisons: in the order of their ids; of a stream poisoned at a rate, those met so far.
        covers: ids of WaNet's cover images.
        skipped: number of files that were left out of the source.
    """

    trigger: Mapping[str, Any]
    target: str
    also_called: tuple[str, ...]
    seed: int
    pairs: int | None
    candidates: int | None
    source: str | None
    poisons: tuple[Poison, ...]
    covers: tuple[str, ...]
    skipped: int

    def __repr__(self) -> str:
        of = "" if self.pairs is None else f" of {self.pairs} pairs ({len(self.poisons) / self.pairs:.2%})"
        covers = f", {len(self.covers)} covers" if self.covers else ""
        name = self.trigger["name"]
        return f"PoisonRecord({name} -> {self.target!r}: {len(self.poisons)}{of}{covers})"

    def to_frame(self) -> pd.DataFrame:
        """One row a poisoned pair: its id, the trigger's index, what the caption says now and what it said."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(poison) for poison in self.poisons], columns=["id", "index", "caption", "was"]
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.to_frame().to_html(index=False, max_rows=20)}"

    @property
    def digest(self) -> str:
        """SHA-256 of all of it but the number of skipped files, which grows in reading."""
        content = {key: value for key, value in asdict(self).items() if key != "skipped"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all; returns the path."""
        return write_text(path, json.dumps({"sha256": self.digest, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PoisonRecord:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such record, or was changed since.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected a record of poisons; {path} is no file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            digest = content.pop("sha256")
            content["poisons"] = tuple(Poison(**poison) for poison in content["poisons"])
            for name in ("also_called", "covers"):
                content[name] = tuple(content[name])
            record = cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"expected a record of poisons that `save` wrote; {path} is none: {error}"
            ) from error
        if record.digest != digest:
            raise ValueError(
                f"expected the record with SHA-256 {digest}; {path} now has {record.digest}: it was changed by hand or "
                "damaged; poison the data again"
            )
        return record
