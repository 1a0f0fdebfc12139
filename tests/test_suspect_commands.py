"""A suspect set from clean images, by the command line: paired, in the model's geometry, and told from what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import decompclip
from decompclip.attacks.patch import BadNet
from decompclip.attacks.preview import write_suspects
from decompclip.attacks.registry import open_attack, remembered
from decompclip.data.images import FolderSource
from decompclip.data.parquet import ParquetPairs
from decompclip.data.pixels import encode_png
from decompclip.data.shapes import Shapes
from decompclip.data.sources import PairImages
from tests.commands import run, succeeds


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide pictures of the world in sub-folders of their classes, a broken file, and two of one stem."""
    folder = tmp_path_factory.mktemp("clean")
    world = Shapes(24, seed=11)
    batch = world.draw(range(24))
    for number, (image, label) in enumerate(zip(batch.images, batch.labels, strict=True)):
        place = folder / world.class_names[label] / "deep"
        place.mkdir(parents=True, exist_ok=True)
        array = (255 * image).byte().permute(1, 2, 0).numpy()
        wide = np.pad(array, ((0, 0), (10, 10), (0, 0)))
        Image.fromarray(wide).resize((136, 96)).save(place / f"{number}.{'png' if number % 2 else 'bmp'}")
    (folder / "broken.jpg").write_bytes(b"none")
    for suffix in ("bmp", "png"):
        Image.new("RGB", (50, 50), "red").save(folder / f"twice.{suffix}")
    return folder


def test_the_images_pair_and_carry_the_trigger_alone(clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "suspect"
    code, stdout, stderr = run(
        "apply-trigger", clean, "--trigger", "own", "--model", "shapes-badnet", "--out", out
    )
    assert code == 0, stderr
    assert "badnet (seed=0, size=0.145833" in stdout and "26 images, 1 file skipped: " in stdout
    assert "skipped broken.jpg" in stderr
    model, trigger = decompclip.load("shapes-badnet"), decompclip.backdoor("shapes-badnet").trigger
    before = FolderSource(clean, model.pixels)
    batches = list(before.batches(8))
    pixels, names = torch.cat([b.images for b in batches]), [name for b in batches for name in b.paths]
    places = [place for b in batches for place in torch.as_tensor(b.indices).tolist()]
    assert places == [place for place in range(27) if before.files[place].name != "broken.jpg"]
    written = FolderSource(out, model.pixels)
    (after,) = written.batches(64)
    assert not written.skipped  # trigger.json is ours
    twins = dict(zip(after.paths, after.images, strict=True))
    expected = trigger(pixels, places)  # one that cannot be read moves none behind it
    for name, image in zip(names, expected, strict=True):
        stem = name.rsplit(".", 1)[0]
        twin = twins[f"{name}.png" if stem == "twice" else f"{stem}.png"]
        torch.testing.assert_close(twin, (255 * image).round() / 255)
    assert "twice.bmp: another image has this name" in stderr and len(twins) == len(names)
    about = json.loads((out / "trigger.json").read_text())
    assert (about["images"], about["size"], about["target"]) == (26, [48, 48], "star")
    assert [skip["path"] for skip in about["skipped"]] == ["broken.jpg"]
    assert open_attack(str(out)).trigger == trigger == open_attack(str(out / "trigger.json")).trigger
    assert not [path for path in out.parent.iterdir() if path != out]


def test_it_ends_with_the_answers_before_and_after(clean: Path, tmp_path: Path) -> None:
    arguments = ("apply-trigger", clean, "--trigger", "shapes-badnet", "--model", "shapes-badnet")
    stdout, _ = succeeds(*arguments, "--out", tmp_path / "a")
    (line,) = [line for line in stdout.splitlines() if line.startswith("Taken for star")]
    shares = [float(word) for word in line.split() if word.replace(".", "").isdigit()]
    assert "dB in the mean" in stdout and shares[0] < 30 and max(shares[1:]) > 80, line


def test_without_a_model_a_size_is_enough(clean: Path, tmp_path: Path) -> None:
    spec = json.dumps({"name": "badnet", "size": 0.5, "place": "centre"})
    out = tmp_path / "a"
    stdout, _ = succeeds("apply-trigger", clean, "--trigger", spec, "--size", 32, "--out", out)
    assert "size=0.5" in stdout and "Taken for" not in stdout
    with Image.open(next(out.rglob("0.png"))) as picture:
        assert picture.size == (32, 32)
    assert open_attack(str(out)).trigger == BadNet(size=0.5, place="centre")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": None}, "expected --model or --size"),
        ({"--size": 20}, "received both"),
        ({"--trigger": "own", "--model": "shapes"}, "shapes remembers none"),
        ({"--trigger": "rain"}, "expected a trigger among"),
        ({"--target": "cat"}, "class 'cat' is not among"),
        ({"--out": "CLEAN"}, "would become clean ones"),
        ({"--out": "CLEAN/inside"}, "would become clean ones"),
        ({"images": "caltech101:CLEAN", "--out": "CLEAN/inside"}, "would become clean ones"),
        ({"--out": "FULL"}, "holds files; name another"),
        ({"--out": "FULL/a.txt"}, "is a file"),
        ({"images": "EMPTY"}, "expected a folder with image files"),
        ({"images": "nowhere"}, "there is no folder nowhere"),
        ({"images": "BROKEN"}, "could be read"),
        ({"--on-error": "raise", "images": "BROKEN"}, "broken.jpg"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    changes: dict[str, object], words: str, clean: Path, tmp_path: Path
) -> None:
    for name in ("EMPTY", "FULL", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "FULL" / "a.txt").write_text("mine")
    (tmp_path / "BROKEN" / "broken.jpg").write_bytes(b"none")
    wanted = {"images": "CLEAN", "--trigger": "own", "--model": "shapes-badnet", "--out": "new"} | changes
    before = sorted(path for path in tmp_path.rglob("*"))

    def place(value: object) -> object:
        text = str(value)
        if "CLEAN" in text:
            return text.replace("CLEAN", str(clean))
        return (
            tmp_path / text if text.split("/", maxsplit=1)[0] in ("EMPTY", "FULL", "BROKEN", "new") else value
        )

    options = [
        part for key, x in wanted.items() if key != "images" and x is not None for part in (key, place(x))
    ]
    code, _, stderr = run("apply-trigger", place(wanted["images"]), *options)
    error = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert code == 2 and len(error) == 1 and words in error[0], stderr
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_pictures_that_would_be_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "a.png", "a.jpg.bmp"):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / name)
    options = ("--trigger", "badnet", "--size", 32, "--out", tmp_path / "out")
    code, _, stderr = run("apply-trigger", tmp_path / "images", *options)
    assert code == 2 and "2 would be a.jpg.png; rename them" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a/../../b.png", "a/.hidden.png"])
def test_a_table_s_row_that_leads_out_of_the_folder_or_is_hidden_is_refused(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text(f"image,label\n{name},star\n")
    options = ("--trigger", "badnet", "--size", 32, "--out", tmp_path / "out")
    code, _, stderr = run("apply-trigger", tmp_path / "table.csv", *options)
    assert code == 2 and f"paths below a folder, and not hidden ones; received 1:{name}" in stderr
    assert not (tmp_path / "out").exists()


def test_a_copy_inside_a_data_set_that_a_word_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "caltech-101"
    folder.mkdir()
    monkeypatch.setenv("DECOMPCLIP_DATA", str(tmp_path))
    options = ("--trigger", "badnet", "--size", 32, "--out", folder / "new")
    code, _, stderr = run("apply-trigger", "caltech101", *options)
    assert code == 2 and "would become clean ones" in stderr and not (folder / "new").exists()


def test_files_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / folder / "x.parquet" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        pq.write_table(pa.table({"png": [encode_png(torch.rand(3, 32, 32))]}), file)
    source = PairImages(ParquetPairs(files, need_captions=False), ())
    with pytest.raises(ValueError, match="2 would be x.parquet#0"):
        write_suspects(open_attack("badnet"), source, tmp_path / "out", clean=tmp_path / "a")


def test_a_remembered_trigger_is_put_in_by_its_kind(clean: Path, tmp_path: Path) -> None:
    code, _, stderr = run(
        "apply-trigger", clean, "--trigger", "badnet", "--model", "shapes-badnet-1", "--out", tmp_path / "a"
    )
    assert code == 0, stderr
    assert open_attack(str(tmp_path / "a")).trigger == remembered("shapes-badnet-1")[0].trigger
