"""One parser of sources for every command: folders, tables, shards, and what `poison` writes."""

from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import PoisonedPairs, write_poisoned
from decompclip.data.images import ImageSource
from decompclip.data.pixels import to_pixels
from decompclip.data.shapes import ShapesPairs
from decompclip.data.sources import check_images, open_images, open_labelled, open_pairs

CLASSES = ("dog", "teddy bear")


def png(grey: int) -> bytes:
    held = io.BytesIO()
    Image.new("L", (8, 8), grey).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def everywhere(tmp_path: Path) -> dict[str, Path]:
    """The same three images, labelled 1, 0, 1, as each kind of source."""
    rows = [("a", "Teddy_Bear", 10), ("b", "dog", 20), ("c", "teddy bear", 30)]
    for name, label, grey in rows:
        path = tmp_path / "folder" / label / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(grey))
    for name, column, value in (("labels", "class", str), ("captions", "title", str)):
        lines = [f"folder/{label}/{key}.png\t{value(label)}" for key, label, _ in rows]
        (tmp_path / f"{name}.tsv").write_text("\n".join([f"filepath\t{column}", *lines]))
    for name, files in {
        "cls": [("cls", lambda label: str(CLASSES.index(label.lower().replace("_", " "))).encode())],
        "txt": [("txt", lambda label: label.encode())],
    }.items():
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            for key, label, grey in rows:
                for kind, content in [("png", png(grey)), *((kind, made(label)) for kind, made in files)]:
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {
        "folder": tmp_path / "folder",
        "labels": tmp_path / "labels.tsv",
        "captions": tmp_path / "captions.tsv",
        "cls": tmp_path / "cls",
        "txt": tmp_path / "txt" / "{0..0}.tar",
    }


def read(source: ImageSource) -> dict[int, int | None]:
    """The label of each image by its grey."""
    found: dict[int, int | None] = {}
    for batch in source.batches(2):
        labels = [None] * len(batch.images) if batch.labels is None else batch.labels.tolist()
        found |= {
            round(255 * float(image.max())): label for image, label in zip(batch.images, labels, strict=True)
        }
    return found


@pytest.mark.parametrize("kind", ["folder", "labels", "captions", "cls", "txt"])
def test_the_same_images_come_from_every_kind_of_source(everywhere: dict[str, Path], kind: str) -> None:
    spec = str(everywhere[kind])
    check_images(spec)
    source = open_labelled(spec, (8, 8), CLASSES)
    assert read(source) == {10: 1, 20: 0, 30: 1}  # pyright: ignore[reportArgumentType]
    some = [read(open_images(spec, to_pixels(8), CLASSES, limit=2, seed=seed)) for seed in (0, 0)]
    assert some[0] == some[1]
    assert len(some[0]) == 2
    pairs = open_pairs(spec, to_pixels(8), class_names=CLASSES)
    assert len(pairs.captions) == 3


def test_images_without_labels_are_taken_and_that_is_said(
    everywhere: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "bare.csv").write_text("image\nfolder/dog/b.png\n")
    for spec in (tmp_path / "bare.csv", everywhere["txt"]):
        with pytest.warns(UserWarning, match="have no labels: no column or file of classes"):
            source = open_images(spec, to_pixels(8), ("cat", "cow"))
        assert set(read(source).values()) == {None}


def test_images_without_a_class_among_others_are_listed(everywhere: dict[str, Path]) -> None:
    for kind in ("labels", "captions", "txt"):
        source = open_images(everywhere[kind], to_pixels(8), ("dog", "cow"))
        assert read(source) == {20: 0}
        assert ["has no class" in skip.reason for skip in source.skipped] == [True, True]


def test_a_root_holds_for_folders_and_tables(everywhere: dict[str, Path], tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(40))
    (tmp_path / "folder" / "dog" / "link.png").symlink_to(outside)
    for spec in (everywhere["folder"], everywhere["labels"]):
        source = open_images(spec, to_pixels(8), CLASSES, root=tmp_path / "folder")
        assert read(source) == {10: 1, 20: 0, 30: 1}
    (skip,) = open_images(everywhere["labels"], to_pixels(8), CLASSES).skipped or [None]
    assert skip is None
    with pytest.raises(ValueError, match="none of its 3 images could be read, the last: lies outside"):
        read(open_images(everywhere["labels"], to_pixels(8), CLASSES, root=tmp_path / "cls"))


def test_what_poison_writes_is_read_and_its_poisons_alone(tmp_path: Path) -> None:
    base = ShapesPairs(30, seed=5)
    write_poisoned(PoisonedPairs(base, BadNet(), "star", count=4), tmp_path / "out", per_shard=8)
    record = tmp_path / "out" / "poisons.json"
    with pytest.warns(UserWarning, match=r"4 of the 30 pairs in .* are poisoned, .*poisons\.json stands for"):
        whole = open_images(tmp_path / "out", to_pixels(), base.class_names)
    assert sum(len(batch.images) for batch in whole.batches()) == 30
    (batch,) = open_images(record, to_pixels(), base.class_names).batches()
    assert batch.labels is None
    places = [int(path.rpartition("/")[2]) for path in batch.paths]
    poisoned = PoisonedPairs(base, BadNet(), "star", count=4)
    assert [base.ids[place] for place in places] == sorted(
        (poison.id for poison in poisoned.record.poisons), key=list(base.ids).index
    )
    assert (batch.images * 255).round().equal((poisoned.read(places).images * 255).round())
    with pytest.warns(UserWarning, match=r"pairs in .*00000\.tar are poisoned"):
        open_images(shard := tmp_path / "out" / "00000.tar", to_pixels(), base.class_names)
    shard.write_bytes(shard.read_bytes()[:-4_000])
    with pytest.warns(
        UserWarning, match="pairs in .* are poisoned"
    ):  # what stands whole before the cut is read
        open_images(tmp_path / "out", to_pixels(), base.class_names)
    record.write_text("{}")
    with pytest.raises(ValueError, match=r"poisons\.json is none: KeyError"):
        open_images(record, to_pixels(), base.class_names)


@pytest.mark.parametrize("spec", ["none", "none.csv", "none.tar", "none/{0..3}.tar", "none/poisons.json"])
def test_what_is_not_there_is_said_before_a_model_is_loaded(tmp_path: Path, spec: str) -> None:
    with pytest.raises(FileNotFoundError):
        check_images(tmp_path / spec)
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / spec, to_pixels(8), CLASSES)


@pytest.mark.parametrize("kind", ["shards", "parquet"])
@pytest.mark.parametrize("place", ["a.png", "dog/a.png"])
def test_pictures_beside_files_of_many_pairs_are_left_out_with_a_warning(
    everywhere: dict[str, Path], kind: str, place: str
) -> None:
    folder = everywhere["txt"].parent
    if kind == "parquet":
        (folder / "0.tar").unlink()
        rows = {"image": [png(10), png(20), png(30)], "caption": ["dog", "teddy bear", "dog"]}
        pq.write_table(pa.table(rows), folder / "0.parquet")
    readers = (
        lambda: open_images(folder, to_pixels(8), CLASSES),
        lambda: open_pairs(folder, to_pixels(8), class_names=CLASSES),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [len(read()) for read in readers] == [3, 3]
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(png(0))
    said = f"is read as {kind}, and the pictures in it are left out, as {place};"
    for read in readers:
        with pytest.warns(UserWarning, match=said):
            assert len(read()) == 3
