"""Folders of pictures, good and bad, and the Shapes world behind the same protocol."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from decompclip.data.images import FolderSource, ImageSource, class_index, read_classes
from decompclip.data.shapes import Shapes, ShapesSource

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def small(picture: Image.Image) -> Tensor:
    """Stands for a model's preprocessing."""
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture.resize((8, 8)))).permute(2, 0, 1) / 255


def paint(path: Path, colour: tuple[int, ...] = RED, size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)
    return path


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def names(source: ImageSource, batch_size: int = 3) -> list[str]:
    return [path for batch in source.batches(batch_size) for path in batch.paths]


def labels(source: ImageSource) -> list[int] | None:
    found = [batch.labels for batch in source.batches(3)]
    return None if found[0] is None else torch.cat([part for part in found if part is not None]).tolist()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures of three kinds, and a text."""
    for path in ("Teddy_Bear/1.png", "Teddy_Bear/2.JPG", "cat/deep/1.bmp", "cat/2.webp", "cat/3.gif"):
        paint(tmp_path / path)
    paint(tmp_path / "dog" / "1.tif")
    paint(tmp_path / "dog" / "2.ppm")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


CLASSES = ("dog", "teddy bear", "Cat")


def test_a_folder_is_read_in_order_and_in_full_batches(photos: Path) -> None:
    source = FolderSource(photos, small)
    batches = list(source.batches(3))
    assert [tuple(batch.images.shape) for batch in batches] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    assert len(source) == 7
    assert names(source) == sorted(names(source))
    assert names(source) == names(source, batch_size=100)
    assert labels(source) is None
    assert [skip.path for skip in source.skipped] == ["notes.txt"]
    assert "is no picture of a kind that is read (PNG, JPEG, WEBP, AVIF" in source.skipped[0].reason


def test_labels_come_from_folders_named_after_classes(photos: Path) -> None:
    source = FolderSource(photos, small, class_names=CLASSES)
    assert names(source)[:2] == ["Teddy_Bear/1.png", "Teddy_Bear/2.JPG"]
    assert labels(source) == [1, 1, 2, 2, 2, 0, 0]


def test_the_nearest_folder_gives_the_label(tmp_path: Path) -> None:
    paint(tmp_path / "cat" / "dog" / "1.png")
    assert labels(FolderSource(tmp_path, small, class_names=CLASSES)) == [0]


def test_folders_that_name_no_class_give_no_labels(photos: Path) -> None:
    assert labels(FolderSource(photos, small, class_names=("zebra",))) is None


def test_files_without_a_class_are_left_out_and_listed(photos: Path) -> None:
    source = FolderSource(photos, small, class_names=("cat", "dog"))
    assert labels(source) == [0, 0, 0, 1, 1]
    assert len(source) == 5
    assert [file.path for file in source.skipped] == ["notes.txt", "Teddy_Bear/1.png", "Teddy_Bear/2.JPG"]
    assert "lies in no folder that is named after a class" in source.skipped[1].reason
    with pytest.raises(ValueError, match=r"Teddy_Bear.1\.png: lies in no folder that is named after a class"):
        FolderSource(photos, small, class_names=("cat", "dog"), on_error="raise")


def test_broken_files_are_left_out_and_listed_once(photos: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cat/4.png", "cat/5.jpg"):
        Image.fromarray(noise).save(photos / name)
        truncate(photos / name)
    (photos / "cat" / "6.jpg").write_text("no picture")
    (photos / "cat" / "7.jpg").touch()
    source = FolderSource(photos, small, class_names=CLASSES)
    assert len(source) == 11
    for _ in range(2):
        assert labels(source) == [1, 1, 2, 2, 2, 0, 0]
    assert [file.path for file in source.skipped[1:]] == [
        f"cat/{name}" for name in ("4.png", "5.jpg", "6.jpg", "7.jpg")
    ]
    assert "truncated" in source.skipped[2].reason
    assert "is no picture" in source.skipped[3].reason
    assert str(photos) not in str(source.skipped)


def test_a_broken_file_stops_on_request(photos: Path) -> None:
    (photos / "cat" / "6.jpg").write_text("no picture")
    with pytest.raises(
        ValueError, match=r'6\.jpg: is no picture.*; repair or remove it, or .*on_error="skip"'
    ):
        names(FolderSource(photos, small, on_error="raise"))


def test_a_fault_of_the_preprocessing_is_no_broken_file(photos: Path) -> None:
    def fail(picture: Image.Image) -> Tensor:
        raise RuntimeError("the preprocessing's own fault")

    with pytest.raises(RuntimeError, match="own fault"):
        names(FolderSource(photos, fail))


def test_a_limit_takes_a_seeded_subset_in_order(photos: Path) -> None:
    whole = names(FolderSource(photos, small))
    some = [names(FolderSource(photos, small, limit=4, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert some[0] == some[1]
    assert len({tuple(chosen) for chosen in some}) > 1
    for chosen in some:
        assert chosen == [name for name in whole if name in chosen]
        assert len(chosen) == 4
    assert names(FolderSource(photos, small, limit=100)) == whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "a limit of at least 1 image; received 0; None takes all"),
        ({"on_error": "ignore"}, "expected on_error of ('skip', 'raise'); received 'ignore'"),
        (
            {"class_names": ("cat", "CAT")},
            "expected 'cat' to stand for one class; it could be any of the classes [0, 1]",
        ),
    ],
)
def test_wrong_options_are_named(
    photos: Path, monkeypatch: pytest.MonkeyPatch, options: dict, words: str
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=re.escape(words)):
        FolderSource(photos, small, **options)


def test_folders_without_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\.jpeg, \.jpg.*there is no folder .*missing"):
        FolderSource(tmp_path / "missing", small)
    file = tmp_path / "notes.txt"
    file.write_text("no picture")
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file"):
        FolderSource(file, small)
    with pytest.raises(ValueError, match=r"\.jpg.* and its sub-folders hold 1 files, none of them such"):
        FolderSource(tmp_path, small)


def test_a_folder_of_broken_pictures_is_no_empty_success(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.png"):
        (tmp_path / name).write_text("no picture")
    source = FolderSource(tmp_path, small)
    with pytest.raises(ValueError, match="none of its 2 images could be read, the last: is no picture"):
        names(source)
    assert len(source.skipped) == 2


def test_shapes_come_through_transform_and_normalisation() -> None:
    world = Shapes(50, seed=3, resolution=16)

    def darken(images: Tensor, indices: Sequence[int]) -> Tensor:
        return images * torch.tensor([index / 50 for index in indices])[:, None, None, None]

    source = ShapesSource(world, normalise=lambda x: x * 2 - 1, transform=darken)
    drawn = world.draw(range(50))
    images = torch.cat([batch.images for batch in source.batches(16)])
    torch.testing.assert_close(images, darken(drawn.images, range(50)) * 2 - 1)
    assert labels(source) == drawn.labels.tolist()
    assert names(source)[:2] == ["shapes/3/0", "shapes/3/1"]
    assert len(source) == 50
    assert source.skipped == ()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.txt",
            "\ufeff# animals\ncat\n\n  teddy bear \r\ndog # brown\n",
            ("cat", "teddy bear", "dog # brown"),
        ),
        ("a.json", '["cat", "#1"]', ("cat", "#1")),
        ("a.txt", ' ["cat", "dog"]', ("cat", "dog")),
    ],
)
def test_class_files_are_read(tmp_path: Path, name: str, text: str, expected: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_classes(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# nothing\n\n", "one class a line, or a JSON list of names; .* names no class"),
        (b"[]", "names no class"),
        (b"cat\ndog\ncat\n", "each class once; .* names again: 'cat'"),
        (b'["cat", 3]', "holds other JSON"),
        (b'["cat", ', "is neither: Expecting value"),
        (b"\xff\xd8\xff\xe0", "is neither: 'utf-8' codec"),
    ],
)
def test_bad_class_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_classes(tmp_path / "classes.txt")


def test_a_missing_class_file_and_another_kind_of_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one class a line.*there is no file .*missing\.txt"):
        read_classes(tmp_path / "missing.txt")
    (tmp_path / "classes.json").write_text(json.dumps({"0": "cat"}))
    with pytest.raises(ValueError, match="holds other JSON"):
        read_classes(tmp_path / "classes.json")


@pytest.mark.parametrize("name", ["teddy bear", "Teddy_Bear", "TEDDY-BEAR", "teddybear"])
def test_a_class_is_found_however_it_is_written(name: str) -> None:
    assert class_index(name, CLASSES) == 1


@pytest.mark.parametrize(
    ("name", "class_names", "words"),
    [
        ("teddy bar", CLASSES, "class 'teddy bar' is not among the 3 classes; nearest: 'teddy bear'"),
        (
            "zyzzyva",
            CLASSES,
            "class 'zyzzyva' is not among the 3 classes; they begin ['dog', 'teddy bear', 'Cat']",
        ),
        ("cat", ("cat", "dog", "Cat"), "it could be any of the classes [0, 2]"),
    ],
)
def test_a_class_that_is_not_there_is_named(name: str, class_names: Sequence[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        class_index(name, class_names)


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of photographs"
)
def test_real_photos_are_read_and_labelled() -> None:
    folder = Path(os.environ["DECOMPCLIP_DATA"], "caltech-101", "101_ObjectCategories")
    classes = sorted(
        path.name.replace("_", " ") for path in folder.iterdir() if "BACKGROUND" not in path.name
    )
    source = FolderSource(folder, small, class_names=classes, limit=24, on_error="skip")
    assert [classes[label] for label in labels(source) or []] == [
        Path(name).parent.name.replace("_", " ") for name in names(source)
    ]
    assert len(names(source)) == 24
    assert {Path(file.path).parent.name for file in source.skipped} == {"BACKGROUND_Google"}
