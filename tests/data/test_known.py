"""The paper's data sets: facts that agree with torchvision's and open_clip's, layouts, parts, and what is missing."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from decompclip.cli import app
from decompclip.data.files import KNOWN, parse_source
from decompclip.data.images import class_index
from decompclip.data.known import CALTECH, DATASETS, PETS, imagenet_folders, known_pairs
from decompclip.data.sources import check_data, classes_of, open_images, open_labelled, open_pairs
from decompclip.evaluation.evaluate import evaluate
from decompclip.models.loading import load

DATA = os.environ.get("DECOMPCLIP_DATA")

Draw = Callable[[Path], None]


@pytest.fixture
def draw() -> Draw:
    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (len(path.name), 90, 30)).save(path)

    return picture


@pytest.fixture
def imagenet(tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of four photographs, in torchvision's layout."""
    keys, names = imagenet_folders()[:3], DATASETS["imagenet"].class_names()[:3]
    few = replace(DATASETS["imagenet"], keys=lambda: keys, class_names=lambda: names, images=12)
    monkeypatch.setitem(DATASETS, "imagenet", few)
    for key in keys:
        for number in range(4):
            draw(tmp_path / "imagenet" / "val" / key / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path / "imagenet"


@pytest.fixture
def pets(tmp_path: Path, draw: Draw) -> Path:
    """Two photographs of each breed, one a list."""
    folder = tmp_path / "pets" / "oxford-iiit-pet"
    lines: dict[str, list[str]] = {"trainval": ["#Image CLASS-ID SPECIES BREED ID"], "test": []}
    for label, breed in enumerate(PETS, 1):
        for number, name in enumerate(lines, 1):
            draw(folder / "images" / f"{breed}_{number}.jpg")
            lines[name].append(f"{breed}_{number} {label} {1 + breed[0].islower()} 1")
    (folder / "annotations").mkdir()
    for name, rows in lines.items():
        (folder / "annotations" / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return folder.parent


def test_facts_fit_together() -> None:
    assert set(DATASETS) == set(KNOWN)
    for word, number in (("imagenet", 1000), ("caltech101", 101), ("pets", 37)):
        about = DATASETS[word]
        assert len(set(about.keys())) == len(about.class_names()) == number
        assert len(set(map(str.casefold, about.class_names()))) == number
    assert class_index("banana", classes_of("imagenet:x")) == 954  # the paper's
    assert list(CALTECH) == sorted(CALTECH) and sorted(PETS, key=str.casefold) == list(PETS)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="DECOMPCLIP_DATA is not set")
def test_wordnet_ids_stand_at_open_clips_names() -> None:
    """The photographs of the archive are called after both, by somebody else."""
    with zipfile.ZipFile(Path(str(DATA), "photos", "imagenet1000_short256.zip")) as archive:
        known = dict(name.removesuffix(".JPEG").split("_", 1) for name in archive.namelist())
    names = dict(zip(imagenet_folders(), classes_of("imagenet:x"), strict=True))
    assert set(names) == set(known)
    same = [key for key, name in names.items() if name.casefold() == known[key].replace("_", " ").casefold()]
    assert len(same) > 500  # open_clip's names differ in wording, and a shift by one would leave none


def test_folders_give_the_labels(imagenet: Path) -> None:
    pairs = known_pairs(parse_source(f"imagenet:{imagenet}"))
    assert pairs.class_names == ("tench", "goldfish", "great white shark")
    assert pairs.labels is not None and pairs.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert all(
        name in caption
        for name, caption in zip(["tench"] * 4 + ["goldfish"] * 4, pairs.captions, strict=False)
    )
    assert pairs.ids[0] == "n01440764/ILSVRC2012_val_00000000.JPEG"


def test_classes_asked_for_are_found_by_their_names(imagenet: Path) -> None:
    source = open_images(f"imagenet:{imagenet}", load("shapes").preprocess, ("goldfish", "tench"))
    (batch,) = source.batches()
    assert batch.labels is not None and batch.labels.tolist() == [1] * 4 + [0] * 4
    assert {skip.reason for skip in source.skipped} == {"is of a class that is not among those asked for"}
    assert len(source.skipped) == 4
    with pytest.raises(ValueError, match="expected classes of ImageNet-1K's .* received circle, square"):
        open_images(f"imagenet:{imagenet}", load("shapes").preprocess, ("circle", "square"))


def test_parts_are_of_all_classes_whichever_are_asked_for(pets: Path) -> None:
    whole, rest = (known_pairs(parse_source(f"pets:{pets}@{part}")) for part in ("validation", "evaluation"))
    assert whole.labels is not None
    asked = [whole.class_names[label] for label in whole.labels[:2].tolist()]
    few = known_pairs(parse_source(f"pets:{pets}@validation"), class_names=asked)
    assert few.ids and set(few.ids) < set(whole.ids) and not set(few.ids) & set(rest.ids)
    assert len(few.skipped) == len(whole) - len(few)


def test_the_parts_are_a_fifth_and_the_rest_the_same_each_time(pets: Path) -> None:
    parts = {part: known_pairs(parse_source(f"pets:{pets}@{part}")) for part in ("validation", "evaluation")}
    again = known_pairs(parse_source(f"pets:{pets}@validation"))
    whole = known_pairs(parse_source(f"pets:{pets}"))
    assert list(parts["validation"].ids) == list(again.ids)
    assert [len(part) for part in parts.values()] == [round(0.2 * 37), 37 - round(0.2 * 37)]
    assert sorted([*parts["validation"].ids, *parts["evaluation"].ids]) == sorted(whole.ids)


@pytest.mark.parametrize("split", ["train", "test"])
def test_pets_are_torchvisions(pets: Path, split: Any) -> None:
    from torchvision.datasets import OxfordIIITPet

    path = pets / "oxford-iiit-pet" / "annotations" / "trainval.txt"  # torchvision knows no comment
    path.write_text("".join(line for line in path.read_text().splitlines(True) if line[0] != "#"))
    theirs = OxfordIIITPet(pets, split="trainval" if split == "train" else "test")
    ours = known_pairs(parse_source(f"pets:{pets}"), split=split)
    assert [Path(name).name for name in ours.ids] == [path.name for path in theirs._images]
    assert ours.labels is not None and ours.labels.tolist() == theirs._labels
    assert [name.casefold() for name in ours.class_names] == [name.casefold() for name in theirs.classes]


def test_pairs_to_train_on_are_those_of_the_list_for_training(pets: Path) -> None:
    assert all(name.endswith("_1.jpg") for name in open_pairs(f"pets:{pets}").ids)
    labelled: Any = open_labelled(f"pets:{pets}", (32, 32), classes_of("pets:x"))
    assert all(name.endswith("_2.jpg") for batch in labelled.batches() for name in batch.paths)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Abyssinian_1 1 1", "in line 3: Abyssinian_1 1 1"),
        ("Abyssinian_1 2 1 1", "in line 3: Abyssinian_1 2 1 1"),
        ("wolf_1 1 1 1", "in line 3: wolf_1"),
    ],
)
def test_a_broken_list_is_named_with_its_line(pets: Path, line: str, words: str) -> None:
    path = pets / "oxford-iiit-pet" / "annotations" / "test.txt"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:2], line, *rows[3:]]))
    with pytest.raises(ValueError, match=words):
        known_pairs(parse_source(f"pets:{pets}"))


def test_what_is_not_laid_out_as_it_should_be_is_refused(tmp_path: Path, pets: Path, draw: Draw) -> None:
    draw(tmp_path / "other" / "cat" / "a.png")
    for word in KNOWN:
        with pytest.raises(FileNotFoundError, match=r"expected .* in .*other.*; found cat; get .*"):
            known_pairs(parse_source(f"{word}:{tmp_path / 'other'}"))
        with pytest.raises(FileNotFoundError, match="which is no folder; get"):
            known_pairs(parse_source(f"{word}:{tmp_path / 'nowhere'}"))
    draw(tmp_path / "flat" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match="photographs that are not sorted into classes yet"):
        known_pairs(parse_source(f"imagenet:{tmp_path / 'flat'}"))
    (pets / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the list .*test\.txt beside"):
        known_pairs(parse_source(f"pets:{pets}"))


def test_a_missing_class_is_no_smaller_data_set(imagenet: Path) -> None:
    for file in (imagenet / "val" / "n01443537").iterdir():
        file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"there are none of n01443537; see decompclip data check imagenet:"
    ):
        known_pairs(parse_source(f"imagenet:{imagenet}"))
    found = check_data(f"imagenet:{imagenet}")
    assert (found.missing, found.images, found.expected, found.whole) == (("n01443537",), 8, 12, False)


def test_a_check_finds_what_is_broken_and_what_is_gone(imagenet: Path, pets: Path) -> None:
    assert check_data(f"imagenet:{imagenet}").whole
    assert check_data(imagenet).title == DATASETS["imagenet"].title  # by its layout
    file = imagenet / "val" / "n01440764" / "ILSVRC2012_val_00000002.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    found = check_data(f"imagenet:{imagenet}")
    assert [skip.path for skip in found.skipped] == ["n01440764/ILSVRC2012_val_00000002.JPEG"]
    assert (found.images, found.whole) == (11, False)
    assert check_data(f"imagenet:{imagenet}", decode=False).whole
    (pets / "oxford-iiit-pet" / "images" / "pug_2.jpg").unlink()
    (skip,) = check_data(pets).skipped
    assert (skip.path, skip.reason) == ("pug_2.jpg", "is in test.txt, and not there")
    for path in (pets / "oxford-iiit-pet" / "annotations").iterdir():
        path.unlink()  # COCO's folders are called alike
    assert check_data(pets).title == str(pets)


def test_the_command_says_what_is_there_and_how_to_get_the_rest(imagenet: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    whole = run(app, ["data", "check", f"imagenet:{imagenet}", "--split", str(tmp_path / "parts.json")])
    assert whole.exit_code == 0, whole.output
    assert "12 of 12 pictures" in whole.output and "2 for validation, 10 for evaluation" in whole.output
    (imagenet / "val" / "n01443537" / "ILSVRC2012_val_00000001.JPEG").unlink()
    less = run(app, ["data", "check", str(imagenet)])
    assert less.exit_code == 1
    assert "11 of 12 pictures" in less.output and "https://image-net.org" in less.output
    other = run(
        app, ["data", "check", str(imagenet / "val" / "n01443537"), "--split", str(tmp_path / "x.json")]
    )
    assert other.exit_code == 2 and "expected imagenet:PATH" in other.output
    gone = run(app, ["data", "check", str(tmp_path / "gone")])
    assert gone.exit_code == 2 and "error: " in gone.output


def test_cc3m_is_read_as_the_shards_or_the_table_that_it_is(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "cc3m.tsv").write_text("filepath\ttitle\na.png\ta cat\nb.png\ta dog\n")
    source = parse_source(f"cc3m:{tmp_path / 'cc3m.tsv'}")
    assert (source.kind, source.path) == ("table", tmp_path / "cc3m.tsv")
    assert list(open_pairs(f"cc3m:{tmp_path / 'cc3m.tsv'}").captions) == ["a cat", "a dog"]
    found = check_data(f"cc3m:{tmp_path / 'cc3m.tsv'}")
    assert (found.images, found.expected, len(found.skipped)) == (1, 3_318_333, 1)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="DECOMPCLIP_DATA is not set")
def test_caltech_runs_on_the_real_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Caltech101

    (tmp_path / "caltech101").symlink_to(Path(str(DATA), "caltech-101"))
    theirs = Caltech101(tmp_path)
    ours = known_pairs(parse_source("caltech101:"))  # in the folder that DECOMPCLIP_DATA names
    assert list(CALTECH) == theirs.categories
    assert ours.labels is not None and ours.labels.tolist() == theirs.y
    assert [skip.path for skip in ours.skipped] == ["BACKGROUND_Google"]
    model, names = load("photos"), classes_of("caltech101:")
    found = evaluate(
        model,
        open_labelled("caltech101:", model.image_size, names, preprocess=model.pixels, limit=60),
        model.zero_shot_classifier(names, ["a photo of a {}."]),
    )
    assert found.cacc.total == 60 and found.cacc.value > 3 / 101  # by chance 1 in 101
    assert torch.equal(found.labels, found.labels.sort().values)
