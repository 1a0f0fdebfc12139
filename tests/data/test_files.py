"""Folders as they lie about: bookkeeping of systems, links in circles, FIFOs, names in several Unicode forms."""

from __future__ import annotations

import os
import socket
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from decompclip.data.datasets import folder_pairs
from decompclip.data.files import canonical, is_bookkeeping, walk
from decompclip.data.images import FolderSource, class_index
from decompclip.data.pixels import to_pixels
from decompclip.data.sources import open_pairs

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def paint(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(path)
    return path


def read(folder: Path, *names: str) -> list[tuple[str, int | None]]:
    """Paths and labels of all images."""
    found: list[tuple[str, int | None]] = []
    for batch in FolderSource(folder, to_pixels(8), class_names=names).batches():
        labels = [None] * len(batch.paths) if batch.labels is None else batch.labels.tolist()
        found += zip(batch.paths, labels, strict=True)
    return found


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    paint(tmp_path / "animals" / "cat" / "1.png")
    paint(tmp_path / "animals" / "dog" / "1.png")
    return tmp_path / "animals"


TWO = [("cat/1.png", 1), ("dog/1.png", 0)]


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/",
        ".ipynb_checkpoints/1-checkpoint.png",
        "dog/.ipynb_checkpoints/1-checkpoint.png",
        "__MACOSX/dog/._1.png",
        "__MACOSX/dog/1.png",
        "dog/._1.png",
        "._dog",
        ".DS_Store",
        "dog/.DS_Store",
        "dog/Thumbs.db",
        "dog/desktop.ini",
        "dog/@eaDir/1.png",
        ".git/objects/1.png",
        ".Trash-1000/files/1.png",
        "dog/.hidden.png",
    ],
)
def test_bookkeeping_of_systems_is_neither_class_nor_image(animals: Path, name: str) -> None:
    path = animals / name
    if name.endswith("/"):
        path.mkdir()
    elif name.endswith("png") and "._" not in name:
        paint(path, 9)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7" * 30)
    assert read(animals, "dog", "cat") == TWO
    assert [path for path, _ in read(animals)] == ["cat/1.png", "dog/1.png"]
    pairs = folder_pairs(animals, ["a {}"], to_pixels(8))
    assert (list(pairs.ids), pairs.class_names) == (["cat/1.png", "dog/1.png"], ("cat", "dog"))
    assert pairs.skipped == []
    assert FolderSource(animals, to_pixels(8)).skipped == []


def test_names_that_only_look_like_bookkeeping_are_data() -> None:
    assert not any(map(is_bookkeeping, ("_MACOSX", "thumbs.png", "1.DS_Store.png", "__init__", "a.b")))


def test_what_is_no_picture_is_listed(animals: Path) -> None:
    (animals / "labels.csv").write_text("1.png,dog\n")
    (animals / "dog" / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
    paint(animals / "1.png")
    for skipped in (
        FolderSource(animals, to_pixels(8), class_names=["dog", "cat"]).skipped,
        folder_pairs(animals, ["a {}"]).skipped,
    ):
        assert {skip.path for skip in skipped} == {"labels.csv", "dog/film.mp4", "1.png"}


def test_a_class_folder_without_images_is_named(animals: Path) -> None:
    (animals / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match="a sub-folder of images for each class in .*emu without any"):
        folder_pairs(animals, ["a {}"])
    paint(animals / "emu" / "1.png")
    flat = paint(animals.parent / "flat" / "1.png").parent
    with pytest.raises(FileNotFoundError, match="there is none"):
        folder_pairs(flat, ["a {}"])


def test_links_to_folders_are_followed_once_and_never_in_circles(animals: Path) -> None:
    elsewhere = paint(animals.parent / "elsewhere" / "1.png").parent
    (animals / "emu").symlink_to(elsewhere)
    (animals / "a second name").symlink_to(elsewhere)
    (animals / "cat" / "up").symlink_to(animals)
    (elsewhere / "round").symlink_to(elsewhere)
    (animals / "b").symlink_to(animals / "cat")  # sorts before the folder itself, which keeps its name
    (animals / "gone").symlink_to(animals / "nowhere")
    (animals / "itself").symlink_to(animals / "itself")
    (animals / "dog" / "2.png").symlink_to(elsewhere / "1.png")
    source = FolderSource(animals, to_pixels(8))
    paths = [path for batch in source.batches() for path in batch.paths]
    assert paths == ["a second name/1.png", "cat/1.png", "dog/1.png", "dog/2.png"]
    reasons = {skip.path: skip.reason for skip in source.skipped}
    assert set(reasons) == {"a second name/round", "b", "cat/up", "emu", "gone", "itself"}
    assert all(
        "leads to a folder that is read already" in reasons[name]
        for name in ("b", "cat/up", "emu", "a second name/round")
    )
    assert "No such file" in reasons["gone"]


def test_what_is_no_file_is_listed_and_never_waited_for(animals: Path) -> None:
    os.mkfifo(animals / "dog" / "pipe.png")
    os.mkfifo(animals / "dog" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(animals / "s.png"))
        (animals / "zero.png").symlink_to("/dev/zero")
        source = FolderSource(animals, to_pixels(8), class_names=["dog", "cat"], on_error="raise")
        assert [path for batch in source.batches() for path in batch.paths] == ["cat/1.png", "dog/1.png"]
    assert {skip.path: skip.reason for skip in source.skipped} == {
        "dog/pipe.png": "is a FIFO, no file",
        "dog/pipe": "is a FIFO, no file",
        "s.png": "is a socket, no file",
        "zero.png": "is a device, no file",
    }


def test_files_that_go_or_change_between_listing_and_reading_are_listed(animals: Path) -> None:
    source = FolderSource(animals, to_pixels(8))
    (animals / "cat" / "1.png").unlink()
    assert [path for batch in source.batches() for path in batch.paths] == ["dog/1.png"]
    os.mkfifo(animals / "cat" / "1.png")
    assert [path for batch in source.batches() for path in batch.paths] == ["dog/1.png"]
    assert [(skip.path, skip.reason) for skip in source.skipped] == [("cat/1.png", "is a FIFO, no file")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_listed(animals: Path) -> None:
    (animals / "cat").chmod(0)
    try:
        assert [skip.path for skip in walk(animals).left_out] == ["cat"]
    finally:
        (animals / "cat").chmod(0o700)


@pytest.mark.parametrize(
    ("held", "asked"), [(NFC, NFD), (NFD, NFC), (f" {NFD} ", NFC.upper()), ("CAFÉ", NFD)]
)
def test_classes_are_found_in_any_unicode_form(tmp_path: Path, held: str, asked: str) -> None:
    paint(tmp_path / held / "1.png")
    assert read(tmp_path, "dog", asked) == [(f"{held}/1.png", 1)]
    assert class_index(held, ["dog", asked]) == 1


def test_copies_of_a_folder_are_in_one_order_whatever_the_unicode_form(tmp_path: Path) -> None:
    words = ["cafe", "café", "caff", "e", "É", "z", "ёж", "한글"]
    for form in ("NFC", "NFD"):
        for place, word in enumerate(words):
            paint(tmp_path / form / f"{unicodedata.normalize(form, word)}.png", place)
    one, other = (
        [unicodedata.normalize("NFC", path) for path, _ in read(tmp_path / form)] for form in ("NFC", "NFD")
    )
    assert one == other == [f"{word}.png" for word in sorted(words)]


def test_one_name_has_one_form() -> None:
    assert canonical(f" {NFD.upper()} ") == canonical(NFC) == NFC
    assert canonical("STRASSE") == canonical("straße")
    assert canonical("a") != canonical("á")


def test_a_folder_of_classes_is_opened_by_its_path(animals: Path) -> None:
    (animals / ".DS_Store").touch()
    assert list(open_pairs(animals).captions) == ["a photo of a cat.", "a photo of a dog."]
