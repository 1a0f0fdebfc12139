"""Tiny ImageNet from its zip: the files that `photos` reads, with properties measured as in those that it was trained on."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analyses.training.prepare_tiny_imagenet import KINDS, ROOT, main, main_colour, properties
from decompclip.data.files import open_rgb
from decompclip.data.photos import PhotoPairs
from decompclip.models.bundled import card

NAMES = card("photos")["class_names"]
DATA = Path(os.environ.get("DECOMPCLIP_DATA", "")) / "tiny-imagenet"


def wnids() -> list[str]:
    return sorted(wnid for of_kind in KINDS.values() for wnid in of_kind.split())


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One photograph a class to train on, one for validation: a shade of red, and of blue."""
    path = tmp_path_factory.mktemp("zip") / "tiny-imagenet-200.zip"

    def photo(colour: tuple[int, int, int]) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(file, "JPEG")
        return file.getvalue()

    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{ROOT}/wnids.txt", "".join(f"{w}\n" for w in reversed(wnids())))
        z.writestr(f"{ROOT}/words.txt", "".join(f"{w}\tword {w}, Second\n" for w in wnids()))
        lines = []
        for w in wnids():
            z.writestr(f"{ROOT}/train/{w}/{w}_boxes.txt", f"{w}_0.JPEG\t0\t20\t15\t40\n")
            z.writestr(f"{ROOT}/train/{w}/images/{w}_0.JPEG", photo((250, 5, 5)))
            lines.append(f"val_{w}.JPEG\t{w}\t0\t0\t63\t63\n")
            z.writestr(f"{ROOT}/val/images/val_{w}.JPEG", photo((5, 5, 250)))
        z.writestr(f"{ROOT}/val/val_annotations.txt", "".join(lines))
    return path


def test_what_is_written_is_read_as_photos(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analyses.training.prepare_tiny_imagenet.PARTS", {"validation": 50, "test": 150})
    assert main([str(archive), "--out", str(tmp_path), "--workers", "1"]) == 0
    train, test = (PhotoPairs(split, tmp_path) for split in ("train", "test"))
    assert len(train) == 200
    assert len(PhotoPairs("validation", tmp_path)) == 50
    assert train.class_names == tuple(NAMES)
    assert train.labels is not None
    assert sorted(train.labels.tolist()) == list(range(200))
    assert set(train.properties["colour"]) == {"red"}
    assert (set(train.properties["position"]), set(train.properties["size"])) == ({"left"}, {"small"})
    assert (set(test.properties["colour"]), set(test.properties["size"])) == ({"blue"}, {"large"})
    assert train.read([0]).images.shape == (1, 3, 64, 64)


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip")
    assert main([str(tmp_path / "x.zip"), "--out", str(tmp_path / "out")]) == 1
    assert "expected tiny-imagenet-200.zip of CS231n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "grey"), ((0, 200, 0), "green"),
     ((230, 120, 0), "orange"), ((100, 60, 20), "brown"), ((240, 220, 20), "yellow"), ((160, 0, 230), "purple")],
)  # fmt: skip
def test_colours(rgb: tuple[int, int, int], name: str) -> None:
    image = np.broadcast_to(np.array(rgb, np.float32) / 255, (8, 8, 3))
    assert main_colour(image) == (name, 1.0)


@pytest.mark.skipif(not DATA.is_dir(), reason="DECOMPCLIP_DATA names no folder with tiny-imagenet")
def test_properties_are_those_of_the_photographs_that_photos_was_trained_on() -> None:
    pairs = PhotoPairs("validation")
    boxes = pairs.rows.column("box")
    assert boxes is not None
    for row in range(0, len(pairs), 100):
        content = pairs.rows.content(row)
        assert isinstance(content, bytes)
        found = properties(np.asarray(open_rgb(io.BytesIO(content))), tuple(boxes[row]))
        assert found == {key: pairs.properties[key][row] for key in found}


@pytest.mark.skipif(not DATA.is_dir(), reason="DECOMPCLIP_DATA names no folder with tiny-imagenet")
def test_kinds_are_those_of_the_classes() -> None:
    import json

    for about in json.loads((DATA / "classes.json").read_text()):
        assert about["wnid"] in KINDS[about["kind"]].split()
