"""Shards as they come: with foreign files, doubles, files apart, and called like others.

The expected pairs are those that webdataset 1.0 reads, which stops at doubles.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.data.datasets import PairStream
from decompclip.data.pixels import encode_png
from decompclip.data.shards import ShardPairs, expand_shards, shard_names

JUNK = b"\0\5\x16\7" + bytes(60)


def png(grey: int) -> bytes:
    return encode_png(torch.full((3, 16, 16), grey / 255))


def pack(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, word: str, *, broken: bool = False, count: int = 4) -> Path:
    files = []
    for n in range(count):
        files += [
            (f"{n:05d}.png", b"no picture" if broken else png(n)),
            (f"{n:05d}.txt", f"{word} {n}".encode()),
        ]
    return pack(path, files)


@pytest.mark.parametrize(
    "foreign",
    [
        [("._00000.png", JUNK), ("._00000.txt", JUNK)],
        [("./._00000.png", JUNK)],
        [(".DS_Store", JUNK)],
        [("__MACOSX/._00000.png", JUNK)],
        [("SHA256SUMS", JUNK)],
        [("README", b"read me"), ("sub/LICENSE", b"free")],
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_foreign_files_are_no_part_of_a_pair_wherever_they_stand(
    tmp_path: Path, foreign: list[tuple[str, bytes]], at: int
) -> None:
    own = [("00000.png", png(1)), ("00000.txt", b"a dog"), ("00001.png", png(2)), ("00001.txt", b"a cat")]
    pairs = ShardPairs(pack(tmp_path / "a.tar", own[:at] + foreign + own[at:]))
    assert [(pair.id, pair.caption) for pair in pairs] == [("a/00000", "a dog"), ("a/00001", "a cat")]
    told = [name for name, _ in foreign if "._" not in name and "DS_Store" not in name]
    assert [skip.path for skip in pairs.skipped] == (
        [f"{tmp_path / 'a.tar'}: {', '.join(told)}"] if told else []
    )


def test_links_inside_a_shard_are_told(tmp_path: Path) -> None:
    with tarfile.open(shard(tmp_path / "a.tar", "a"), "a") as tar:
        link = tarfile.TarInfo("00009.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    pairs = ShardPairs(tmp_path / "a.tar")
    assert (len(pairs), len(pairs.skipped)) == (4, 1)
    assert "00009.png" in pairs.skipped[0].path


def test_of_doubles_the_first_is_read_and_the_others_are_told(tmp_path: Path) -> None:
    files = [
        ("a.png", png(1)),
        ("a.txt", b"a dog"),
        ("a.png", png(2)),
        ("a.txt", b"a cat"),
        ("b.png", png(3)),
        ("b.txt", b"b"),
    ]
    pairs = ShardPairs(pack(tmp_path / "s.tar", [*files, ("a.txt", b"a cow")]))
    assert [(pair.id, pair.caption, round(255 * float(pair.image.max()))) for pair in pairs] == [
        ("s/a", "a dog", 1),
        ("s/b", "b", 3),
    ]
    assert [skip.path for skip in pairs.skipped] == ["s/a again (1)", "s/a again (2)"]


@pytest.mark.parametrize("seed", range(5))
def test_files_apart_are_put_together_and_told(tmp_path: Path, seed: int) -> None:
    files = [
        (f"{n}.{kind}", png(n) if kind == "png" else f"text {n}".encode())
        for n in range(5)
        for kind in ("png", "txt")
    ]
    random.Random(seed).shuffle(files)
    with pytest.warns(UserWarning, match="pairs lie apart, and were put together by their keys"):
        pairs = ShardPairs(pack(tmp_path / "s.tar", files))
    assert {pair.id: (pair.caption, round(255 * float(pair.image.max()))) for pair in pairs} == {
        f"s/{n}": (f"text {n}", n) for n in range(5)
    }
    assert pairs.skipped == []


def test_captions_in_another_encoding_and_endless_ones_are_told(tmp_path: Path) -> None:
    files = [
        ("a.png", png(1)),
        ("a.txt", "café".encode("latin-1")),
        ("b.png", png(1)),
        ("b.txt", b"x" * (2**20 + 1)),
    ]
    pairs = ShardPairs(pack(tmp_path / "s.tar", [*files, ("c.png", png(1)), ("c.txt", b"\xef\xbb\xbfc")]))
    assert list(pairs.captions) == ["c"]
    assert [skip.path for skip in pairs.skipped] == ["s/a", "s/b"]
    assert "no UTF-8" in pairs.skipped[0].reason


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x/00000.tar", "x/00001.tar"], ["00000", "00001"]),
        (["x/a.1.tar"], ["a"]),
        (["x/a.1.tar", "x/a.2.tar"], ["a.1", "a.2"]),
        (["cc3m/00000.tar", "cc12m/00000.tar", "cc12m/00001.tar"], ["cc3m/00000", "cc12m/00000", "00001"]),
        (["a/x/0.tar", "b/x/0.tar", "c/y/0.tar"], ["a/x/0", "b/x/0", "y/0"]),
        (["x/a.1.tar", "y/a.1.tar"], ["x/a.1", "y/a.1"]),
    ],
)
def test_shards_are_called_by_the_least_that_tells_them_apart(paths: list[str], expected: list[str]) -> None:
    shards = [Path("/data", path) for path in paths]
    assert list(shard_names(shards).values()) == expected
    assert shard_names(shards[::-1]) == shard_names(shards)


def test_every_pair_of_shards_called_alike_has_an_id_of_its_own(tmp_path: Path) -> None:
    paths = [shard(tmp_path / "cc3m/00000.tar", "dog"), shard(tmp_path / "cc12m/00000.tar", "cat")]
    pairs, stream = ShardPairs(paths), PairStream(ShardPairs(paths))
    assert len(set(pairs.ids)) == 8
    assert [pair.id for pair in stream] == list(pairs.ids)
    turned = ShardPairs(paths[::-1])
    chosen = [
        PoisonedPairs(some, BadNet(), "cow", count=3).record.poisons for some in (pairs, turned, stream)
    ]
    assert chosen[0] == chosen[1] == chosen[2]


def test_broken_images_are_told_for_each_shard(tmp_path: Path) -> None:
    paths = [shard(tmp_path / f"{name}/0.tar", name, broken=name != "c") for name in "abc"]
    pairs, stream = ShardPairs(paths), PairStream(ShardPairs(paths))
    assert (len(list(pairs)), len(list(stream))) == (4, 4)
    for _ in range(2):
        assert len({skip.path for skip in pairs.skipped}) == len(pairs.skipped) == 8
        assert len(stream.skipped) == 8


def test_a_shard_given_twice_is_read_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", "a")
    (tmp_path / "link.tar").symlink_to(path)
    pairs = ShardPairs([path, tmp_path / "." / "0.tar", tmp_path / "link.tar"])
    assert (len(pairs), len(set(pairs.ids))) == (4, 4)
    assert ["given more than once" in skip.reason for skip in pairs.skipped] == [True]


def test_a_stream_of_webdataset_samples_says_that_two_shards_are_called_alike() -> None:
    samples = [
        {"__url__": f"{folder}/0.tar", "__key__": "0", "png": png(1), "txt": b"a"}
        for folder in ("x", "x", "y")
    ]
    assert len(list(PairStream(samples[:2]))) == 2
    with pytest.raises(
        ValueError, match=r"received x/0\.tar and y/0\.tar, whose pairs would have the same ids"
    ):
        list(PairStream(samples))


def test_patterns_stand_for_shards_and_never_for_a_macs_bookkeeping(tmp_path: Path) -> None:
    for name in ("train-09.tar", "train-10.tar", "val-1.tar"):
        shard(tmp_path / name, "a")
    (tmp_path / "._train-09.tar").write_bytes(JUNK)

    def named(spec: str) -> list[str]:
        return [path.name for path in expand_shards(f"{tmp_path}{spec}")]

    assert named("") == ["train-09.tar", "train-10.tar", "val-1.tar"]
    assert named("/train-{09..10}.tar") == ["train-09.tar", "train-10.tar"]
    assert named("/train-{10..09}.tar") == ["train-10.tar", "train-09.tar"]
    assert sorted(named("/{train-{09..10},val-1}.tar")) == ["train-09.tar", "train-10.tar", "val-1.tar"]
    assert named("/{val,train}-*.tar") == ["val-1.tar", "train-09.tar", "train-10.tar"]
    with pytest.raises(ValueError, match="expected at most 1000000 shards"):
        expand_shards(f"{tmp_path}/{{0..99999999999}}.tar")
    pack(tmp_path / "a{1..2}.tar", [("0.png", png(1)), ("0.txt", b"a")])
    assert named("/a{1..2}.tar") == ["a{1..2}.tar"]


def test_a_fifo_among_shards_is_told_and_never_waited_for(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", "a")
    os.mkfifo(tmp_path / "1.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = ShardPairs(tmp_path)
    assert len(pairs) == 4
    assert "is a FIFO, no file" in pairs.skipped[0].reason
