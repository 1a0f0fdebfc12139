"""Parquet files of images: the forms they come in, damage that is named, and photographs of a world."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from decompclip.data import parquet
from decompclip.data.pairs import SubsetPairs
from decompclip.data.parquet import ParquetPairs
from decompclip.data.photos import PROMPTS, PhotoPairs, properties_of
from decompclip.data.pixels import to_pixels
from decompclip.data.sources import open_images, open_pairs

TEMPLATES = ("a photo of a {}",)
NAMES = ["cat", "dog", "bird"]


def encoded(value: int, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(held, kind)
    return held.getvalue()


def write(path: Path, columns: dict[str, pa.Array | list], *, metadata: Any = None) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=2, compression="none")
    return path


def structs(n: int) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": encoded(40 * i), "path": None} for i in range(n)], kind)


def test_a_struct_of_bytes_with_the_files_own_class_names(tmp_path: Path) -> None:
    about = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    write(tmp_path / "b.parquet", {"image": structs(3), "label": [2, 0, 1]}, metadata=about)
    write(tmp_path / "a.parquet", {"image": structs(2), "label": [1, 1]}, metadata=about)
    pairs = ParquetPairs(tmp_path, templates=TEMPLATES)
    assert pairs.class_names == tuple(NAMES)
    assert pairs.ids == ["a.parquet#0", "a.parquet#1", "b.parquet#0", "b.parquet#1", "b.parquet#2"]
    assert pairs.labels is not None and pairs.labels.tolist() == [1, 1, 2, 0, 1]
    assert pairs.captions[2] == "a photo of a bird"
    batch = pairs.read([4, 0, 3])
    assert [round(float(x.mean() * 255)) for x in batch.images] == [80, 0, 40]


def test_files_that_number_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    for file, names in (("a", NAMES), ("b", NAMES[::-1])):
        about = {"info": {"features": {"label": {"names": names}}}}
        write(tmp_path / f"{file}.parquet", {"image": structs(2), "label": [0, 1]}, metadata=about)
    with pytest.raises(
        ValueError, match="name their classes alike; .*a.parquet has cat, dog, bird, and .*b.parquet has bird"
    ):
        ParquetPairs(tmp_path)
    pairs = ParquetPairs(tmp_path, class_names=["dog", "cat", "bird"])
    assert pairs.labels is not None and pairs.labels.tolist() == [1, 0, 2, 0]  # each file by its own names


def test_files_that_need_no_names_of_their_own_need_not_agree(tmp_path: Path) -> None:
    about = {"info": {"features": {"label": {"names": NAMES}}}}
    for label, folder in (([0, 1], "numbers"), (["cat", "dog"], "names")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.parquet", {"image": structs(2), "label": label}, metadata=about)
        write(tmp_path / folder / "b.parquet", {"image": structs(2), "label": label})
    given = ParquetPairs(tmp_path / "numbers", class_names=["cow", *NAMES])
    assert given.labels is not None and given.labels.tolist() == [1, 2, 0, 1]  # b's are places in class_names
    named = ParquetPairs(tmp_path / "names")
    assert named.labels is not None and named.labels.tolist() == [0, 1, 0, 1]
    assert named.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "about",
    [
        [],
        {"info": []},
        {"info": {"features": []}},
        {"info": {"features": {"label": [{"names": NAMES}]}}},
        *({"info": {"features": {"label": {"names": names}}}} for names in ("abc", [1, 2], None, {"a": 0})),
        {"info": {"features": {"class": {"names": NAMES}}}},  # of another column than the one that is read
    ],
    ids=str,
)
def test_metadata_of_another_form_names_no_classes(tmp_path: Path, about: Any) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs(2), "label": [0, 1]}, metadata=about)
    assert ParquetPairs(path).class_names == ("0", "1")


@pytest.mark.parametrize(
    "kind, column", [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "image")]
)
def test_bytes_with_captions(tmp_path: Path, kind: str, column: str) -> None:
    images = pa.array([encoded(200, kind)] * 2, pa.binary())
    pairs = ParquetPairs(write(tmp_path / "x.parquet", {column: images, "caption": ["one", "two"]}))
    assert list(pairs.captions) == ["one", "two"] and pairs.labels is None
    assert pairs[1].image.mean() == pytest.approx(200 / 255, abs=0.01)


@pytest.mark.parametrize("label", [None, -1])
def test_a_test_part_without_labels_has_none(tmp_path: Path, label: int | None) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs(2), "label": pa.array([label] * 2, pa.int64())})
    assert ParquetPairs(path, need_captions=False).labels is None


def test_labels_that_are_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs(3), "cls": ["dog", "cat", "dog"]})
    pairs = ParquetPairs(path, templates=TEMPLATES)
    assert pairs.class_names == ("cat", "dog") and pairs.labels is not None
    assert pairs.labels.tolist() == [1, 0, 1]
    with pytest.raises(
        ValueError, match="expected labels among the 2 class names; .* has 'dog'; pass class_names"
    ):
        ParquetPairs(path, templates=TEMPLATES, class_names=["cat", "cow"])


def test_own_names_are_found_among_the_classifiers(tmp_path: Path) -> None:
    about = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    path = write(tmp_path / "x.parquet", {"image": structs(3), "label": [2, 0, 1]}, metadata=about)
    found = open_images(path, to_pixels(8), ["dog", "bird", "cat", "cow"])
    labels = [label for batch in found.batches(2) for label in batch.labels.tolist()]  # pyright: ignore[reportOptionalMemberAccess]
    assert labels == [1, 2, 0]
    with pytest.raises(ValueError, match="expected labels among the 2 class names; .* has 'bird'"):
        open_images(path, to_pixels(8), ["dog", "cat"])
    assert open_pairs(tmp_path).captions[0] == "a photo of a bird."


def test_what_is_no_image_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a parquet file"):
        ParquetPairs(tmp_path)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"text\.parquet is no parquet file that can be read"):
        ParquetPairs(tmp_path / "text.parquet")
    bare = write(tmp_path / "bare.parquet", {"image": ["a.png", "b.png"], "label": [0, 1]})
    with pytest.raises(
        ValueError, match=r"expected a column of image bytes called .*; .* has image \(string\), label"
    ):
        ParquetPairs(bare)
    odd = write(tmp_path / "odd.parquet", {"image": structs(2), "label": [0.5, 1.0]})
    with pytest.raises(ValueError, match="expected labels that are whole numbers or names; .* has float"):
        ParquetPairs(odd, templates=TEMPLATES)
    missing = write(tmp_path / "missing.parquet", {"image": structs(2), "label": pa.array([0, None])})
    with pytest.raises(ValueError, match="has NoneType, int; every row needs one"):
        ParquetPairs(missing, templates=TEMPLATES)
    plain = write(tmp_path / "plain.parquet", {"image": structs(2)})
    bare_images = ParquetPairs(plain, need_captions=False)
    assert bare_images.labels is None and bare_images.image(1) is not None
    assert [batch.labels for batch in open_images(plain, to_pixels(8), ()).batches(2)] == [None]
    with pytest.raises(
        ValueError, match=r"expected rows with an image and a caption in .*#0: has no caption"
    ):
        ParquetPairs(plain)
    large = write(tmp_path / "large.parquet", {"image": structs(2), "label": [0, 10**12]})
    with pytest.raises(
        ValueError, match=r"expected labels 0\.\.99999, .* has 0\.\.1000000000000; pass class_names"
    ):
        ParquetPairs(large)
    none = write(tmp_path / "none.parquet", {"image": structs(0), "label": pa.array([], pa.int32())})
    with pytest.raises(ValueError, match="expected rows with images; .* has none"):
        ParquetPairs(none)


def test_a_damaged_row_group_is_left_out_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs(6), "label": [0, 1, 2, 0, 1, 2]})
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    pairs = ParquetPairs(path, class_names=NAMES, templates=TEMPLATES)
    assert [pair.id for pair in pairs] == [f"x.parquet#{row}" for row in (0, 1, 4, 5)]
    assert [skip.path for skip in pairs.skipped] == ["x.parquet#2", "x.parquet#3"]
    assert all("row group 1 of x.parquet cannot be read" in skip.reason for skip in pairs.skipped)


@pytest.mark.parametrize("column", ["label", "caption"])
def test_a_damaged_column_of_labels_or_captions_is_named(tmp_path: Path, column: str) -> None:
    columns = {"image": structs(6), "label": [0, 1, 2, 0, 1, 2], "caption": list("abcdef")}
    path = write(tmp_path / "x.parquet", columns)
    group = pq.ParquetFile(path).metadata.row_group(1)
    (chunk,) = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column]
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(content))
    with pytest.raises(
        ValueError, match=f"x.parquet: column '{column}' cannot be read: .*; get the file again"
    ):
        ParquetPairs(path, class_names=NAMES, templates=TEMPLATES)


def test_a_damaged_or_missing_image_is_left_out_and_named(tmp_path: Path) -> None:
    images = pa.array([encoded(1), b"no picture", None], pa.binary())
    pairs = ParquetPairs(write(tmp_path / "x.parquet", {"png": images, "text": ["a", "b", "c"]}))
    assert [pair.caption for pair in pairs] == ["a"]
    assert [skip.path for skip in pairs.skipped] == ["x.parquet#1", "x.parquet#2"]


def test_row_groups_beyond_the_bound_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs(6), "label": [0] * 6})
    whole = ParquetPairs(path, class_names=NAMES, templates=TEMPLATES).read(range(6)).images
    monkeypatch.setattr(parquet, "HELD", 1)
    pairs = ParquetPairs(path, class_names=NAMES, templates=TEMPLATES)
    assert torch.equal(pairs.read([5, 0, 3, 1, 4, 2]).images, whole[[5, 0, 3, 1, 4, 2]])


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="needs Tiny ImageNet: DECOMPCLIP_DATA is not set"
)
def test_photographs_tell_what_their_captions_say() -> None:
    pairs = PhotoPairs("test")
    assert len(pairs) == 5_000 and len(pairs.class_names) == 200
    known = pairs.properties
    assert set(PROMPTS["kind"][0]) == set(known["kind"])
    tells = {"colour": r"mostly (\w+)$", "brightness": r"^an? (dark|bright) ", "size": r" an? (small|large) "}
    for name, pattern in tells.items():
        told = [
            (re.search(pattern, text), value) for text, value in zip(pairs.captions, known[name], strict=True)
        ]
        found = [(match[1], value) for match, value in told if match]
        assert len(found) > 500 and all(word == value for word, value in found), name
    again = PhotoPairs("test", caption_seed=1)
    assert list(PhotoPairs("test").captions) == list(pairs.captions) != list(again.captions)
    plain = PhotoPairs("test", templates=("a {}!",))
    assert plain.captions[0] == f"a {plain.class_names[int(plain.known_labels[0] or 0)]}!"
    part = SubsetPairs(pairs, [7, 3])
    assert properties_of(part)["colour"] == [known["colour"][7], known["colour"][3]]


def test_photographs_that_are_not_there_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected test-\*\.parquet and classes\.json in"):
        PhotoPairs("test", tmp_path)
    with pytest.raises(ValueError, match="expected split of .*; received 'all'"):
        PhotoPairs("all", tmp_path)  # pyright: ignore[reportArgumentType]
    monkeypatch.delenv("DECOMPCLIP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DECOMPCLIP_DATA is not set"):
        open_pairs("tiny-imagenet")
