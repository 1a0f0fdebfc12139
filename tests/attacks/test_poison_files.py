"""A poisoned set that was not finished is refused, and goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import PoisonedPairs, write_poisoned
from decompclip.data.datasets import PairStream
from decompclip.data.files import POISON_LIST
from decompclip.data.pairs import Pair
from decompclip.data.shards import UNFINISHED, ShardPairs
from decompclip.data.sources import open_pairs


def poisoned(*, count: int = 4, seed: int = 0) -> PoisonedPairs:
    return PoisonedPairs(open_pairs("shapes:50"), BadNet(), "star", count=count, seed=seed)


def stopped_after(most: int):
    def track(pairs: Iterable[Pair], words: str, total: int) -> Iterator[Pair]:
        for place, pair in enumerate(pairs):
            if place == most:
                raise KeyboardInterrupt
            yield pair

    return track


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 5, 25, 49])
def test_a_stopped_one_is_refused_and_goes_on(tmp_path: Path, after: int) -> None:
    write_poisoned(poisoned(), tmp_path / "whole", per_shard=10)
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        write_poisoned(poisoned(), half, per_shard=10, track=stopped_after(after))  # pyright: ignore[reportArgumentType]
    assert len(list(half.glob("*.tar"))) == after // 10
    assert not (half / POISON_LIST).exists()
    for spec in (half, half / "*.tar") if after >= 10 else (half,):
        with pytest.raises(ValueError, match="was not finished .* run the same `decompclip poison` again"):
            open_pairs(str(spec))
    with pytest.raises(FileExistsError, match="pairs and options that .* was begun with"):
        write_poisoned(poisoned(seed=1), half, per_shard=10)
    with pytest.raises(FileExistsError, match="was begun with"):
        write_poisoned(poisoned(), half, per_shard=20)
    before = {path: path.stat().st_mtime_ns for path in half.glob("*.tar")}
    found = write_poisoned(poisoned(), half, per_shard=10)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())  # not written again
    assert [path.name for path in found.shards] == [f"{n:05d}.tar" for n in range(5)]
    assert files(half) == files(tmp_path / "whole")
    assert UNFINISHED not in files(half)
    assert len(open_pairs(str(half))) == 50
    with pytest.raises(FileExistsError, match="without shards"):
        write_poisoned(poisoned(), half, per_shard=10)


def test_a_stream_poisoned_at_a_rate_goes_on_too(tmp_path: Path) -> None:
    write_poisoned(poisoned(count=1), tmp_path / "clean", per_shard=20)

    def stream() -> PoisonedPairs:
        base = PairStream(ShardPairs(tmp_path / "clean"))
        return PoisonedPairs(base, BadNet(), "star", rate=0.2)

    write_poisoned(stream(), tmp_path / "whole", per_shard=10)
    with pytest.raises(KeyboardInterrupt):
        write_poisoned(stream(), tmp_path / "half", per_shard=10, track=stopped_after(35))  # pyright: ignore[reportArgumentType]
    write_poisoned(stream(), tmp_path / "half", per_shard=10)
    assert files(tmp_path / "half") == files(tmp_path / "whole")
