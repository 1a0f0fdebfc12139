"""A poisoned data set on disk: shards to train on, the list of what was poisoned, and a look at it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from decompclip.attacks.poison_record import PoisonRecord
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.data.pairs import Pair
from decompclip.data.shard_writer import encode_png, write_shards
from decompclip.data.shards import UNFINISHED
from decompclip.data.streams import PairStream
from decompclip.files import digest, write_json

RECORD = "poisons.json"


@dataclass(frozen=True)
class PoisonFiles:
    """What was written: the shards, the list of poisons, and its content."""

    shards: tuple[Path, ...]
    record_path: Path
    record: PoisonRecord


def write_poisoned(
    pairs: PoisonedPairs,
    folder: str | Path,
    *,
    shards: bool = True,
    per_shard: int = 1000,
    track: Callable[[Iterable[Pair], str, int], Iterator[Pair]] | None = None,
) -> PoisonFiles:
    """Write all pairs, poisoned ones among them, as WebDataset shards, and the list of poisons as `poisons.json`.

    The list comes last. Until then the folder holds `poisons.unfinished.json`, with which it is refused where pairs are read;
    the same call goes on after the shards that are whole, and ends with the same bytes.

    Args:
        shards: False writes the list alone; of a stream poisoned at a rate it is known only after going through it.
        per_shard: pairs in each.
        track: shows progress: of the pairs, what is done, and how many there are.

    Raises:
        FileExistsError: there are shards in the folder already, or those of an unfinished run of other pairs or options.
    """
    folder = Path(folder)
    mark, written = folder / UNFINISHED, []
    if shards:
        same = {"identity": _identity(pairs, per_shard)}
        resume = mark.exists()
        if resume and _read(mark) != same:
            raise FileExistsError(
                f"expected the pairs and options that {folder} was begun with, to go on; received others; finish that one with "
                f"its own command, delete the folder, or name another"
            )
        of_stream = isinstance(pairs.base, PairStream)
        total = (pairs.record.pairs or 0) if of_stream else len(pairs)
        if not resume and not any(folder.glob("*.tar")):
            write_json(mark, same)
        run = iter(pairs) if track is None else track(pairs, "poisoning", total)
        written = write_shards(run, folder, per_shard=per_shard, resume=resume)
    record = pairs.record
    path = record.save(folder / RECORD)
    if shards:
        mark.unlink(missing_ok=True)
    return PoisonFiles(tuple(written), path, record)


def _identity(pairs: PoisonedPairs, per_shard: int) -> str:
    """What tells one run from another: trigger, target, seeds, clean pairs, and the first pair, pixel by pixel."""
    about = [pairs.identity, per_shard]  # before a pair is read: a stream's record grows
    first = next(iter(pairs), None)
    pixels = (
        b"" if first is None else encode_png(first.image) + first.caption.encode("utf-8", "backslashreplace")
    )
    return digest([*about, sha256(pixels).hexdigest()])


def _read(mark: Path) -> Any:
    try:
        return json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        return None
