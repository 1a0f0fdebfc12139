"""A poisoned data set on disk: shards to train on, the list of what was poisoned, and a look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from decompclip.attacks.poison_record import PoisonRecord
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.data.pairs import Pair
from decompclip.data.shard_writer import write_shards
from decompclip.data.streams import PairStream

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

    Args:
        shards: False writes the list alone; of a stream poisoned at a rate it is known only after going through it.
        per_shard: pairs in each.
        track: shows progress: of the pairs, what is done, and how many there are.

    Raises:
        FileExistsError: there are shards in the folder already.
    """
    folder = Path(folder)
    written: list[Path] = []
    if shards:
        of_stream = isinstance(pairs.base, PairStream)
        total = (pairs.record.pairs or 0) if of_stream else len(pairs)
        run = iter(pairs) if track is None else track(pairs, "poisoning", total)
        written = write_shards(run, folder, per_shard=per_shard)
    record = pairs.record
    return PoisonFiles(tuple(written), record.save(folder / RECORD), record)
