"""What the commands take for images: folders, tables, shards, and what `poison` wrote; targets that no pair has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from decompclip.data.pixels import encode_png
from decompclip.data.shapes import PROPERTIES, Shapes
from tests.commands import run, succeeds

CLASSES = PROPERTIES["shape"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of the world: as files with a table, and as poisoned shards."""
    folder = tmp_path_factory.mktemp("world")
    drawn = Shapes(60, seed=77).draw(range(60))
    lines = ["filepath\tlabel"]
    for place, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
        (folder / f"{place}.png").write_bytes(encode_png(image))
        lines.append(f"{place}.png\t{CLASSES[label]}")
    (folder / "table.tsv").write_text("\n".join(lines))
    succeeds("poison", "shapes:60", "--target", "star", "--count", 6, "--out", folder / "pairs")
    return folder


@pytest.mark.parametrize("images", ["table.tsv", "pairs"])
def test_evaluate_takes_tables_and_what_poison_wrote(world: Path, images: str) -> None:
    stdout, stderr = succeeds("evaluate", "shapes", world / images, "--json")
    cacc = json.loads(stdout)["cacc"]
    assert cacc["total"] == 60
    assert cacc["value"] > 0.8
    assert ("6 of the 60 pairs" in stderr) == (images == "pairs")


def test_poisoned_images_alone_have_no_labels_and_evaluate_says_so(world: Path) -> None:
    code, _, stderr = run("evaluate", "shapes", world / "pairs" / "poisons.json")
    assert code == 2
    assert "expected a class for every image" in stderr


def test_a_root_is_an_option(world: Path, tmp_path: Path) -> None:
    code, _, stderr = run("evaluate", "shapes", world / "table.tsv", "--root", tmp_path)
    assert code == 2
    assert "lies outside" in stderr
    succeeds("evaluate", "shapes", world / "table.tsv", "--root", world)


def table(folder: Path, *captions: str) -> Path:
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "t.csv").write_text("image,caption\n" + "".join(f"a.png,{text}\n" for text in captions))
    return folder / "t.csv"


def test_a_target_that_no_pair_has_is_asked_about(tmp_path: Path) -> None:
    pairs = table(tmp_path, "a dog", "a cat", "two dogs")
    given = ["poison", pairs, "--count", 1, "--out", tmp_path / "out", "--target"]
    code, _, stderr = run(*given, "bannana")
    assert code == 2
    assert "expected a --target that some pair shows or names; none of 3 does 'bannana'" in stderr
    assert "--also-called" in stderr and "--new-target" in stderr
    assert not (tmp_path / "out").exists()
    succeeds(*given, "bannana", "--new-target")
    succeeds(*given[:-2], tmp_path / "also", "--target", "puppy", "--also-called", "dog")


def test_a_class_of_the_list_that_no_pair_shows_is_asked_about_too(tmp_path: Path) -> None:
    pairs = table(tmp_path, "a dog", "a cat")
    (tmp_path / "classes.txt").write_text("dog\ncat\nemu\n")
    given = ["poison", pairs, "--count", 1, "--out", tmp_path / "out", "--classes", tmp_path / "classes.txt"]
    code, _, stderr = run(*given, "--target", "emu")
    assert code == 2
    assert "none of 2 does 'emu'" in stderr
    code, _, stderr = run(*given, "--target", "cow")
    assert code == 2
    assert "class 'cow' is not among the 3 classes" in stderr
    code, _, stderr = run(*given, "--target", "emu", "--trigger", "label-consistent", "--new-target")
    assert code == 2
    assert "expected at most 0 poisons, the pairs whose caption names the target 'emu'" in stderr
    succeeds(*given, "--target", "dog", "--trigger", "label-consistent")
