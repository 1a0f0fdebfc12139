"""Families that a JSON file describes: the path that real models take, walked with small ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.paper import figure1, table3
from analyses.study.command import main
from analyses.study.files import FolderFamily
from decompclip.data.shapes import Shapes
from decompclip.models.bundled import load_bundled
from decompclip.models.folders import save_model

ROOT = Path(__file__).resolve().parents[3]
PATCH = {"name": "badnet", "size": 7 / 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved twin, and drawings in folders named after their classes."""
    root = tmp_path_factory.mktemp("family")
    save_model(load_bundled("shapes-badnet"), root / "badnet")
    world = Shapes(160, seed=77)
    names = load_bundled("shapes").class_names
    batch = world.draw(range(160))
    for i, (image, label) in enumerate(zip(batch.images, batch.labels.tolist(), strict=True)):
        path = root / "images" / names[label]
        path.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path / f"{i:03}.png")
    return root


def about(**changes: Any) -> dict[str, Any]:
    model = {"name": "badnet", "checkpoint": "badnet", "attack": "BadNet", "trigger": PATCH, "target": "star"}
    return {
        "name": "drawn",
        "title": "a twin on drawings",
        "architecture": "ViT-B-32",
        "clean": "badnet",
        "models": [model],
        "images": "images",
        "classes": None,
        "templates": None,
    } | changes


def test_analyses_run_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "family.json"
    path.write_text(json.dumps(about()))
    words = ["--model-family", str(path), "--images", "60", "--out", str(folder / "out"), "--formats", ""]
    for analysis in (figure1, table3):
        assert main(analysis, words) == 0, capsys.readouterr().err
    record = json.loads((folder / "out" / "drawn" / "figure1.json").read_text())
    assert len(record["models"]["badnet"]["weights"]) == 64
    report = record["found"]["models"]["badnet"]["as it is"]
    assert report["cacc"]["value"] > 0.9
    assert 0 < report["asr"]["total"] < 60  # target-class images are left out
    assert report["asr"]["value"] > 0.7


def test_fit_and_report_share_no_image_and_seeds_matter(folder: Path) -> None:
    family = FolderFamily(about(), folder)
    (member,) = family.members
    case, other = (family.case(member, images=50, seed=seed) for seed in (0, 1))
    assert not (case.fit[:, None] == case.clean[None]).flatten(2).all(2).any()
    assert not torch.equal(case.clean, other.clean)
    assert torch.equal(case.clean, family.case(member, images=50, seed=0).clean)
    assert case.class_names == tuple(sorted(case.class_names)) and case.class_names[case.target] == "star"
    with pytest.raises(ValueError, match=r"expected 400 labelled images .*; received 160 .*pass --images 80"):
        family.case(member, images=200)


def test_what_is_wrong_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECOMPCLIP_MODELS", raising=False)
    with pytest.raises(ValueError, match=r"of a family; images missing"):
        FolderFamily({key: value for key, value in about().items() if key != "images"}, folder)
    with pytest.raises(ValueError, match=r"received colour too"):
        FolderFamily(about(colour="red"), folder)
    with pytest.raises(
        ValueError, match=r"of the model 'badnet'; attack, checkpoint, target, trigger missing"
    ):
        FolderFamily(about(models=[{"name": "badnet"}]), folder)
    with pytest.raises(ValueError, match=r"expected a name of letters.*received 'a/b'"):
        FolderFamily(about(name="a/b"), folder)
    model = about()["models"][0]
    with pytest.raises(
        ValueError, match=r"expected a target among the 12 classes for 'badnet'; received 'kitten'"
    ):
        _ = FolderFamily(about(models=[model | {"target": "kitten"}]), folder).members
    missing = model | {"checkpoint": "$DECOMPCLIP_MODELS/badnet.pt"}
    with pytest.raises(FileNotFoundError, match=r"an environment variable in it is not set"):
        _ = FolderFamily(about(models=[missing]), folder).members
    with pytest.raises(FileNotFoundError, match=r"expected the JSON file of a family"):
        FolderFamily.read(folder / "none.json")
    (folder / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected an object of fields"):
        FolderFamily.read(folder / "list.json")


@pytest.mark.parametrize("name", ["imagenet1k", "caltech101", "oxford_pets"])
def test_families_of_the_paper_s_models_are_described(name: str) -> None:
    family = FolderFamily.read(ROOT / "analyses" / "families" / f"{name}.json")
    assert family.name == name
    from decompclip.attacks.registry import from_card

    for model in family.about["models"]:
        assert from_card(model["trigger"]).extent in ("local", "global")


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of photographs"
)
def test_photographs_of_caltech_walk_the_same_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that never saw them: the path, not the numbers."""
    photos = "$DECOMPCLIP_DATA/caltech-101/101_ObjectCategories"
    model = about()["models"][0] | {"target": "accordion"}
    path = folder / "caltech.json"
    path.write_text(json.dumps(about(name="caltech101", images=photos, models=[model])))
    words = ["--model-family", str(path), "--images", "120", "--out", str(folder / "out"), "--formats", ""]
    assert main(figure1, words) == 0, capsys.readouterr().err
    record = json.loads((folder / "out" / "caltech101" / "figure1.json").read_text())
    assert record["found"]["models"]["badnet"]["as it is"]["cacc"]["total"] == 120
