"""The command line: a report of what is good, one clear line for what is not."""

from __future__ import annotations

import gc
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import decompclip
from decompclip.audit import pipeline
from decompclip.audit.collect import open_pair
from decompclip.cli.console import imports, in_options
from decompclip.data.shapes import Shapes
from tests.commands import run, succeeds

WORLD = Shapes(36, seed=5, resolution=48)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty-six pictures in folders named after their classes."""
    batch = WORLD.draw(range(len(WORLD)))
    for i, image in enumerate(batch.images):
        folder = tmp_path / "photos" / WORLD.class_names[int(batch.labels[i])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image).to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """The same in a file as Hugging Face's data sets have it."""
    batch, rows = WORLD.draw(range(len(WORLD))), []
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        held, name = io.BytesIO(), WORLD.class_names[label]
        Image.fromarray((255 * image).to(torch.uint8).permute(1, 2, 0).numpy()).save(held, "PNG")
        rows.append({"image": {"bytes": held.getvalue(), "path": None}, "label": name, "text": f"a {name}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos.parquet")
    return tmp_path / "photos.parquet"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate shapes FILE --trigger badnet --target star --out OUT", r"\b36\b"),
        ("extract shapes FILE --out OUT", r"\b36\b"),
        ("audit shapes-badnet --clean FILE --suspect FILE --target star --out OUT", "29 clean"),
        ("poison FILE --target star --count 3 --size 48 --out OUT", r"\b36\b"),
        ("finetune shapes FILE --epochs 1 --batch-size 12 --out OUT", "3 steps"),
        ("data check FILE", r"\b36\b"),
        ("repair shapes-badnet --clean FILE --method rep --hint local --out OUT", "model is written"),
        ("diagnose shapes --images FILE", r"\b36\b"),
        ("apply-trigger FILE --trigger badnet --model shapes-badnet --out OUT", "36 images"),
    ],
)
def test_a_command_takes_parquet(parquet: Path, tmp_path: Path, command: str, said: str) -> None:
    out = tmp_path / "out"
    stdout, stderr = succeeds(*(str({"FILE": parquet, "OUT": out}.get(x, x)) for x in command.split()))
    told = (stdout + stderr).replace(str(tmp_path), "")
    assert out.exists() == ("OUT" in command) and re.search(said, told)


@pytest.mark.parametrize("limit", [None, 30])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_triggered_copy_pairs_with_the_rows_of_a_file(
    parquet: Path, tmp_path: Path, limit: int | None, damaged: bool
) -> None:
    """Rows are in the file's order, "#2" before "#10", their copies in that of names; one that cannot be read has no copy."""
    if damaged:
        rows = pq.read_table(parquet).to_pylist()
        rows[5]["image"]["bytes"] = b"no picture"
        pq.write_table(pa.Table.from_pylist(rows), parquet)
    suspect = tmp_path / "suspect"
    succeeds("apply-trigger", parquet, "--trigger", "badnet", "--model", "shapes-badnet", "--out", suspect)
    assert (suspect / f"{parquet.name}#35.png").is_file()
    model = decompclip.load("shapes-badnet")
    pair = open_pair((str(parquet), str(suspect)), model, WORLD.class_names, limit=limit)
    clean, copies = (torch.cat([batch.images for batch in source.batches(16)]) for source in pair)
    assert len(clean) == len(copies) >= (limit or 36) - damaged
    changed = (clean != copies).any(1).flatten(1).double().mean(1)
    assert (changed > 0).all() and (changed < 0.1).all()  # a patch, and no other picture


def test_a_few_copies_of_many_images_are_drawn_on_their_own(
    photos: Path, parquet: Path, tmp_path: Path
) -> None:
    """A part of the clean ones that hardly has partners would leave nearly none of them."""
    suspect, flat = tmp_path / "suspect", tmp_path / "flat"
    succeeds("apply-trigger", parquet, "--trigger", "badnet", "--size", 48, "--out", suspect)
    for path in sorted(suspect.glob("*.png"))[12:]:
        path.unlink()
    model = decompclip.load("shapes-badnet")
    pair = open_pair((str(parquet), str(suspect)), model, WORLD.class_names, limit=10)
    assert list(map(len, pair)) == [10, 10]
    flat.mkdir()
    for name in ("3.png", "3.bmp", "4.png"):  # two of one name: nothing tells their copies
        Image.new("RGB", (48, 48)).save(flat / name)
    pair = open_pair((str(flat), str(flat)), model, ())
    assert list(map(len, pair)) == [3, 3]


def test_images_that_are_no_copies_stay_as_they_are_drawn(
    photos: Path, parquet: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:5]):
        (few / f"{number}.png").write_bytes(path.read_bytes())
    model = decompclip.load("shapes-badnet")

    def names(*specs: Path, limit: int | None) -> list[list[str]]:
        pair = open_pair((str(specs[0]), str(specs[1])), model, (), limit=limit)
        return [[name for batch in source.batches() for name in batch.paths] for source in pair]

    assert list(map(len, names(few, photos, limit=None))) == [5, 36]
    _, drawn = names(few, photos, limit=5)
    own, _ = names(photos, few, limit=5)
    assert drawn == own  # the seeded part of `photos`, not its first five
    assert list(map(len, names(photos, parquet, limit=None))) == [36, 36]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(WORLD.class_names))
    return file


def test_an_audit_of_folders(photos: Path, classes: Path, tmp_path: Path) -> None:
    (photos / "star").mkdir(exist_ok=True)
    (photos / "star" / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "audit",
        "shapes",
        "--clean",
        photos,
        "--suspect",
        photos,
        "--classes",
        classes,
        "--target",
        "star",
        "--out",
        out,
    )
    assert code == 0, stderr
    assert f"Report: {out / 'report.html'}" in stdout
    (audit,) = json.loads((out / "audit.json").read_text(encoding="utf-8"))["audits"]
    assert [file["path"] for file in audit["skipped"]["suspect"]] == ["star/broken.png"]
    assert audit["target"]["name"] == "star" and not audit["target"]["inferred"]
    assert audit["counts"]["clean"] == 29
    assert audit["as_it_is"]["difference"]["value"] == 0
    assert "star/broken.png" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("few_kept")
def test_a_backdoor_is_found_and_its_target_inferred(tmp_path: Path) -> None:
    code, stdout, stderr = run(
        "audit", "shapes-badnet", "--clean", "shapes:300", "--trigger", "badnet", "--out", tmp_path,
        "--reference", "shapes",
    )  # fmt: skip
    assert code == 0, stderr
    first, second = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["audits"]
    assert first["target"] | {"over_prediction": None} == {
        "index": 3, "name": "star", "inferred": True, "over_prediction": None, "images": 60, "asked": None,
    }  # fmt: skip
    assert first["findings"][0]["title"] == "Strong evidence of a trigger toward “star”"
    assert "shapes-badnet is backdoored: suspect images become “star” (backdoored, high confidence)" in stdout
    assert second["name"] == "shapes (reference)" and second["as_it_is"]["difference"]["value"] < 0.2
    assert first["weights"]["classes"][0]["class"] == "star" and first["weights"]["lead"] > 2
    assert second["weights"] is None
    assert "star" in first["weights"]["parts"][0]["texts"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Beside shapes (reference): head 5.6 changed most, by 93\u00a0%" in page


def audits_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))["audits"]


def test_the_demo_shows_each_twin_beside_the_clean_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DECOMPCLIP_DATA", raising=False)
    _, stderr = succeeds("demo", "--out", tmp_path, "--images", 50)  # too few to try corruptions on
    assert "drawings alone are audited" in stderr
    audits = audits_of(tmp_path)
    assert [(a["name"], a["suspect_name"]) for a in audits] == [
        ("shapes", "shapes:badnet"),
        ("shapes-badnet", "shapes:badnet"),
        ("shapes", "shapes:blended"),
        ("shapes-blended", "shapes:blended"),
    ]
    for audit in audits:
        weights = audit["weights"]
        assert (weights is not None) == (audit["name"] != "shapes")
        assert weights is None or (weights["reference"], weights["classes"][0]["class"]) == ("shapes", "star")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("Both towers changed most along “star”") == 2


@pytest.mark.skipif(
    not Path(os.environ.get("DECOMPCLIP_DATA", "")).joinpath("tiny-imagenet").is_dir(),
    reason="DECOMPCLIP_DATA names no folder with tiny-imagenet",
)
def test_the_demo_begins_with_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "DEMO", ("photos:badnet",))
    monkeypatch.setattr(pipeline, "DEMO_PHOTOGRAPHS", 120)
    succeeds("demo", "--out", tmp_path)
    clean, twin = audits_of(tmp_path)
    assert (clean["name"], clean["verdict"]["level"]) == ("photos", "no sign")
    assert (twin["name"], twin["verdict"]["level"]) == ("photos-badnet", "backdoored")
    assert (twin["target"]["name"], twin["weights"]["classes"][0]["class"]) == ("banana", "banana")


def test_version() -> None:
    assert run("--version")[1].strip() == f"decompclip {decompclip.__version__}"


def test_without_a_command_it_helps() -> None:
    _, stdout, stderr = run()
    assert "audit" in stdout + stderr and "demo" in stdout + stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "shapez"}, "'shapez'"),
        ({"model": "shapez"}, "'shapes'"),  # the nearest name is offered
        ({"clean": "nowhere"}, "there is no folder nowhere"),
        ({"suspect": "empty"}, "expected a folder with image files"),
        ({"suspect": "broken"}, "none of its 2 images could be read"),
        ({"suspect": "shapes:badnt"}, "did you mean shapes:badnet?"),
        ({"classes": "nowhere.txt"}, "there is no file nowhere.txt"),
        ({"model": "ViT-B-32", "classes": None}, "expected --classes"),
        ({"model": "ViT-B-33", "classes": None}, "there is no model 'ViT-B-33'"),
        ({"model": "ViT-B-32", "classes": None, "clean": "nowhere"}, "there is no folder nowhere"),
        ({"reference": "shapez", "classes": None}, "there is no model 'shapez'"),
        ({"target": "banana"}, "--target: class 'banana' is not among the 12 classes"),
        ({"target": "banana"}, "class file"),
        ({"model": "ViT-B-32", "checkpoint": "nowhere.pt"}, "nowhere.pt"),
        ({"out": "classes.txt"}, "classes.txt is a file"),
        ({"quantile": "2"}, "expected quantile between 0 and 1"),
        ({"epsilon": "nan"}, "expected a finite epsilon"),
        ({"device": "foo"}, "expected a device that can be used here (cpu"),
        ({"device": "foo"}, "received 'foo': torch knows no device of that name"),
        ({"reference-checkpoint": "nowhere.pt"}, "expected --reference NAME"),
    ],
)
def test_bad_input_is_one_line(
    photos: Path, classes: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], words: str
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("broken").mkdir()
    for name in ("a.png", "b.jpg"):
        (Path("broken") / name).write_bytes(b"no picture")
    options = {
        "clean": "photos",
        "suspect": "photos",
        "classes": "classes.txt",
        "target": "star",
        "out": "out",
    }
    options |= {key: value for key, value in changes.items() if key != "model"}
    flags = [part for key, value in options.items() if value is not None for part in (f"--{key}", value)]
    code, stdout, stderr = run("audit", changes.get("model") or "shapes", *flags)
    assert code == 2
    (line,) = stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert words in line
    assert "Traceback" not in stderr + stdout
    assert not Path("out").exists()


def test_an_unreadable_image_can_stop_the_audit(photos: Path, classes: Path, tmp_path: Path) -> None:
    broken = photos / "star" / "broken.png"
    broken.write_bytes(b"no picture")
    code, _, stderr = run(
        "audit", "shapes", "--clean", photos, "--suspect", photos, "--classes", classes, "--target", "star",
        "--out", tmp_path / "out", "--on-error", "raise",
    )  # fmt: skip
    assert code == 2
    assert f"{broken}: is no picture" in " ".join(stderr.split())


def test_warnings_are_one_line_too(photos: Path, classes: Path, tmp_path: Path) -> None:
    classes.write_text(classes.read_text() + "\nbanana\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    code, _, stderr = run(
        "audit",
        "shapes",
        "--clean",
        photos,
        "--suspect",
        broken,
        "--classes",
        classes,
        "--out",
        tmp_path / "out",
    )
    lines = stderr.strip().splitlines()
    assert code == 2
    assert any(line.startswith("warning: words unknown to this model's vocabulary") for line in lines)
    assert lines[-1].startswith("error: ")
    assert "none of its 1 images could be read" in lines[-1]
    assert len([line for line in lines if not line.startswith(("shapes: ", "drawing "))]) == 2


def test_where_an_error_comes_from_can_be_asked(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECOMPCLIP_DEBUG", "1")
    with pytest.raises(ValueError, match="expected --classes"):
        run("audit", "ViT-B-32", "--clean", photos, "--suspect", photos, "--out", tmp_path)


def test_the_collector_rests_while_importing_and_goes_on_as_it_was() -> None:
    try:
        for on in (True, False):
            (gc.enable if on else gc.disable)()
            with pytest.raises(ImportError), imports():
                assert not gc.isenabled()
                raise ImportError
            assert gc.isenabled() == on
    finally:
        gc.enable()


@pytest.mark.parametrize("command", ["audit", "diagnose"])
def test_help_says_that_folders_serve_as_models(command: str) -> None:
    _, stdout, _ = run(command, "--help")
    assert "the path of a folder or file of weights" in " ".join(stdout.replace("│", " ").split())


def test_poisoned_pairs_are_written_with_their_list(tmp_path: Path) -> None:
    code, stdout, stderr = run(
        "poison", "shapes:60", "--target", "star", "--count", 5, "--out", tmp_path / "p"
    )
    assert code == 0, stderr
    record = json.loads((tmp_path / "p" / "poisons.json").read_text())
    assert len(record["poisons"]) == 5 and "5 of 60 pairs" in stdout
    assert list((tmp_path / "p").glob("*.tar"))
    code, _, stderr = run("poison", "shapes:60", "--target", "banana", "--count", 5, "--out", tmp_path / "q")
    assert code == 2 and "banana" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("leave pretrained= and checkpoint= out", "leave --pretrained and --checkpoint out"),
        ("their architecture with checkpoint=PATH.", "their architecture with --checkpoint PATH."),
        ("pass image_size=64 to load it so", "pass --image-size 64 to load it so"),
        ("pass prefix= to choose one", "pass --prefix to choose one"),
        ("`load('ViT-B-16', pretrained='openai')`", "MODEL ViT-B-16 with --pretrained openai"),
        ("expected one class= or x.seed=1", "expected one class= or x.seed=1"),
    ],
)
def test_messages_speak_of_options(said: str, wanted: str) -> None:
    assert in_options(said) == wanted


def test_a_copy_in_a_checkpoint_and_another_size_are_chosen_by_options(tmp_path: Path) -> None:
    state = decompclip.load("shapes").to_open_clip().state_dict()
    torch.save({"model": state, "model_ema": state}, tmp_path / "weights.pt")
    command = ["evaluate", "shapes", "shapes:24", "--checkpoint", tmp_path / "weights.pt"]
    code, _, stderr = run(*command)
    assert code == 2 and "under the prefixes 'model', 'model_ema'; pass --prefix to choose one" in stderr
    stdout, _ = succeeds(*command, "--prefix", "model_ema", "--image-size", 64, "--json")
    assert json.loads(stdout)["cacc"]["value"] > 0.5
