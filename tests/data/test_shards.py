"""WebDataset shards: read by place and as streams, broken ones kept as far as they stand, and written."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from decompclip.data.datasets import PairStream
from decompclip.data.pairs import Pair
from decompclip.data.pixels import encode_png
from decompclip.data.shapes import ShapesPairs
from decompclip.data.shards import ShardPairs, expand_shards, write_shards

SIZE = (40, 40)


def png(value: int) -> bytes:
    """A picture that no compression makes smaller than a tar's block."""
    noise = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(value))
    noise[:, 0, 0] = value / 255
    return encode_png(noise)


def pack(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, first: int, count: int = 3) -> Path:
    """Pairs as img2dataset writes them."""
    files = [
        (f"{n:05d}.{kind}", content)
        for n in range(first, first + count)
        for kind, content in (("png", png(n)), ("txt", f"caption {n}".encode()), ("json", b"{}"))
    ]
    return pack(path, files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        shard(tmp_path / f"{number:04d}.tar", 3 * number)
    return tmp_path


def values(pairs: ShardPairs | PairStream) -> list[int]:
    return [round(255 * pair.image[0, 0, 0].item()) for pair in pairs]


@pytest.mark.parametrize("spec", ["", "{0000..0002}.tar", "*.tar", "0000.tar::{0001..0002}.tar"])
def test_shards_are_named_in_many_ways(folder: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    pairs = ShardPairs(spec or folder)
    assert values(pairs) == list(range(9))
    assert list(pairs.captions) == [f"caption {n}" for n in range(9)]
    assert pairs.ids[4] == "0001/00004"
    assert pairs.labels is None
    assert pairs.skipped == []


def test_a_stream_and_places_give_the_same_pairs(folder: Path) -> None:
    placed, streamed = list(ShardPairs(folder)), list(PairStream(ShardPairs(folder)))
    for one, other in zip(placed, streamed, strict=True):
        assert torch.equal(one.image, other.image)
        assert (one.id, one.caption, one.label) == (other.id, other.caption, other.label)


def test_samples_of_a_webdataset_pipeline_have_the_same_ids(folder: Path) -> None:
    class Raw:
        """As open_clip's `tarfile_to_samples_nothrow` yields them."""

        def __iter__(self) -> Any:
            for path in sorted(folder.glob("*.tar")):
                with tarfile.open(path) as tar:
                    content = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore
                for key in sorted({name.split(".")[0] for name in content}):
                    yield {
                        "__key__": key,
                        "__url__": str(path),
                        "png": content[f"{key}.png"],
                        "txt": content[f"{key}.txt"],
                    }

    for ours, theirs in zip(ShardPairs(folder), PairStream(Raw()), strict=True):
        assert ours.id == theirs.id
        assert ours.caption == theirs.caption
        assert torch.equal(ours.image, theirs.image)


def test_a_broken_shard_is_kept_as_far_as_it_stands_and_counted(folder: Path) -> None:
    path = folder / "0001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        cut = tar.getmember("00004.png").offset_data + 600  # inside the second pair's image
    path.write_bytes(whole[:cut])
    pairs = ShardPairs(folder)
    assert values(pairs) == [0, 1, 2, 3, 6, 7, 8]
    (skip,) = pairs.skipped
    assert skip.path == str(path)
    assert skip.reason.startswith("broken shard, 1 pairs kept: ")
    with pytest.raises(ValueError, match=r"0001\.tar: broken shard, 1 pairs kept: .*; repair or remove it"):
        ShardPairs(folder, on_error="raise")


@pytest.mark.parametrize("cut", range(0, 25_000, 1777))
def test_wherever_a_shard_breaks_only_whole_pairs_are_kept(tmp_path: Path, cut: int) -> None:
    good, bad = shard(tmp_path / "0.tar", 0), tmp_path / "1.tar"
    whole = shard(tmp_path / "whole.tar", 3).read_bytes()
    assert len(whole) > 20_000
    bad.write_bytes(whole[:cut])
    pairs = ShardPairs([good, bad])
    found = values(pairs)
    assert found == list(range(len(found)))
    assert len(found) >= 3
    if len(found) < 6:
        assert pairs.skipped


def test_a_file_that_is_no_shard_is_skipped(folder: Path) -> None:
    (folder / "0001.tar").write_text("an error page, downloaded in its place")
    (folder / "0002.tar").write_bytes(b"")
    pairs = ShardPairs(folder)
    assert len(pairs) == 3
    assert [Path(skip.path).name for skip in pairs.skipped] == ["0001.tar", "0002.tar"]
    (folder / "0000.tar").unlink()
    with pytest.raises(ValueError, match=r"found none; .*0001\.tar: broken shard, 0 pairs kept: "):
        ShardPairs(folder)


def test_a_broken_image_inside_a_good_shard_is_skipped(tmp_path: Path) -> None:
    files = [("0.jpg", b"no picture"), ("0.txt", b"a cat"), ("1.jpg", png(5)), ("1.txt", b"a dog")]
    pairs = ShardPairs(pack(tmp_path / "0.tar", files))
    assert len(pairs) == 2  # shows only in reading
    assert pairs.read([0, 1]).captions == ("a dog", "a dog")
    assert [skip.path for skip in pairs.skipped] == ["0/0"]


def test_pairs_without_image_or_caption_are_skipped_and_counted(tmp_path: Path) -> None:
    files = [
        ("a/0.jpg", png(1)),
        ("a/0.txt", b" \n"),
        ("a/1.txt", b"alone"),
        ("a/2.jpg", png(2)),
        ("a/3.JPG", png(3)),
        ("a/3.txt", "caf\u00e9 ".encode()),
    ]
    pairs = ShardPairs(pack(tmp_path / "x.tar", files))
    assert list(pairs.ids) == ["x/a/3"]
    assert list(pairs.captions) == ["caf\u00e9"]
    assert [(skip.path, skip.reason.split(";")[0]) for skip in pairs.skipped] == [
        ("x/a/0", "has no caption (KEY.txt)"),
        ("x/a/1", "has no image, only ['txt']"),
        ("x/a/2", "has no caption (KEY.txt)"),
    ]


def test_classes_become_captions_from_templates(tmp_path: Path) -> None:
    files = [
        (f"{n}.{kind}", content)
        for n, cls in enumerate((b"1", b"0\n", b"7", b"dog"))
        for kind, content in (("png", png(n)), ("cls", cls))
    ]
    path = pack(tmp_path / "x.tar", files)
    pairs = ShardPairs(path, class_names=["cat", "dog"], templates=["a {}"])
    assert list(pairs.captions) == ["a dog", "a cat"]
    assert pairs.labels is not None
    assert pairs.labels.tolist() == [1, 0]
    assert pairs.skipped[0].reason == "class '7' is not one of the 2 classes, counted from 0"
    with pytest.raises(ValueError, match=re.escape("expected pairs of images (KEY.jpg, KEY.jpeg")):
        ShardPairs(path)


def test_shards_that_are_not_there_or_not_here(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected WebDataset shards \(\.tar\) at .*2\.tar; found none"
    ):
        shard(tmp_path / "1.tar", 0)
        expand_shards(f"{tmp_path}/{{1..2}}.tar")
    with pytest.raises(FileNotFoundError, match="received an empty list"):
        expand_shards([])
    for address in ("https://a.b/{00..11}.tar", "pipe:aws s3 cp x -"):
        with pytest.raises(ValueError, match="expected shards on this machine; received"):
            expand_shards(address)
    assert expand_shards(str(shard(tmp_path / "odd[1].tar", 0)))[0].name == "odd[1].tar"


def test_written_shards_are_read_back_in_8_bits(tmp_path: Path) -> None:
    pairs = ShapesPairs(5, seed=2)
    shards = write_shards(pairs, tmp_path / "out", per_shard=2)
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    again = ShardPairs(tmp_path / "out", class_names=pairs.class_names)
    taken, clean = again.read(range(5)), pairs.read(range(5))
    assert taken.captions == clean.captions
    assert torch.equal(taken.images, (clean.images * 255).round() / 255)
    assert taken.labels is not None
    assert clean.labels is not None
    assert torch.equal(taken.labels, clean.labels)
    write_shards(pairs, tmp_path / "again", per_shard=2)
    for path in shards:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(FileExistsError, match=r"holds 00000\.tar; name another"):
        write_shards(pairs, tmp_path / "out")


def test_no_half_shard_is_left(tmp_path: Path) -> None:
    def failing() -> Any:
        yield Pair("a", torch.zeros(3, 4, 4), "a cat")
        yield Pair("b", torch.zeros(2, 2), "no image")

    with pytest.raises(IndexError):
        write_shards(failing(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected pairs to write; received none"):
        write_shards([], tmp_path)
    with pytest.raises(ValueError, match="expected at least 1 pair a shard; received 0"):
        write_shards([], tmp_path, per_shard=0)


def test_pixels_come_back_from_a_png() -> None:
    image = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0))
    with Image.open(io.BytesIO(encode_png(image))) as picture:
        assert picture.size == (5, 7)
