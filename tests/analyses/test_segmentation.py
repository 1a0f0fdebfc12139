"""Maps as segmentations of photographs: what is committed is what the page says, and a run on a few photographs."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.questions import segmentation
from analyses.study.results import RESULTS
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.models.bundled import load_bundled
from decompclip.operators.mask_scores import segment

PAGE = (RESULTS.parent / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_was_measured() -> None:
    said = json.loads((RESULTS / "segmentation" / "segmentation.json").read_text(encoding="utf-8"))
    assert segmentation.finding(said) in PAGE
    assert said["images"] == 200 * said["config"]["images_a_class"]


def test_the_record_is_that_of_the_scores() -> None:
    draws = torch.Generator().manual_seed(0)
    masks = torch.rand(9, 8, 8, generator=draws) > 0.5
    found = segment(
        {segmentation.OURS: masks.double(), "rollout": torch.rand(9, 4, 4, generator=draws)}, masks
    )
    said = json.loads(json.dumps(segmentation.record(found, segmentation.Config())))
    own = said["scores"][segmentation.OURS]
    assert all(x["value"] == x["low"] == x["high"] == 1 for x in own.values())
    value, low, high = said["contribution less"]["rollout"]["mean AP"]
    assert low < value < high and value == pytest.approx(1 - said["scores"]["rollout"]["mean AP"]["value"])
    assert "On 9 photographs contribution maps reach pixel accuracy 100.0 %" in segmentation.finding(said)


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of photographs"
)
def test_boxes_are_those_of_the_photographs() -> None:
    """Size and position in words were made of the boxes: the boxes of small objects have the smallest areas."""
    from decompclip.data.photos import PhotoPairs

    pairs = PhotoPairs("validation")
    boxes = torch.tensor(pairs.boxes)
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1) / 64**2
    sizes = pairs.properties["size"]
    assert [("small" if x < 0.25 else "large" if x > 0.75 else "medium") for x in area.tolist()] == sizes


def outlined(n: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Drawings with their class and the object's outline: where the pixel is unlike the corner."""
    batch = Shapes(n, seed=5).draw(range(n))
    pictures = batch.images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    found = []
    for picture, label in zip(pictures, batch.labels.tolist(), strict=True):
        far = np.abs(picture.astype(int) - np.median(picture.reshape(-1, 3), axis=0)).sum(2) > 90
        found.append((PROPERTIES["shape"][label], picture, far))
    return found


def in_folders(
    root: Path, drawings: list[tuple[str, np.ndarray, np.ndarray]], *, by_class: bool = True
) -> None:
    for number, (name, picture, mask) in enumerate(drawings):
        for kind, pixels, mode in (("images", picture, "RGB"), ("masks", mask.astype(np.uint8) * 255, "L")):
            path = root / kind / (name if by_class else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(path)


def test_folders_of_photographs_and_masks_are_scored_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawings = outlined(10)
    in_folders(tmp_path, drawings)
    words = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--model", "shapes"]
    monkeypatch.setattr("sys.argv", ["segmentation", *words, "--out", str(tmp_path / "out")])
    segmentation.main()
    said = json.loads((tmp_path / "out" / "segmentation.json").read_text(encoding="utf-8"))
    assert said["images"] == 10 and (tmp_path / "out" / "segmentation.png").stat().st_size > 0
    assert segmentation.finding(said) in capsys.readouterr().out
    model = load_bundled("shapes")
    found = segmentation.folders(tmp_path / "images", tmp_path / "masks", model.image_size, ())
    again = segmentation.record(segmentation.run(model, *found), segmentation.Config("shapes"))
    assert said["scores"] == json.loads(json.dumps(again["scores"]))
    assert said["scores"][segmentation.OURS]["mean AP"]["value"] > 0.8  # 0.5 by chance


def test_classes_are_the_folders_or_what_the_model_says(tmp_path: Path) -> None:
    drawings = outlined(4)
    for by_class in (True, False):
        root = tmp_path / str(by_class)
        in_folders(root, drawings, by_class=by_class)
        names, samples = segmentation.folders(root / "images", root / "masks", (24, 30), ["a", "b"])
        found = list(samples)
        assert {x.pixels.shape for x in found} == {(3, 24, 30)} and {x.mask.shape for x in found} == {
            (24, 30)
        }
        if by_class:
            assert list(names) == sorted({name for name, *_ in drawings})
            assert sorted(names[x.label] for x in found if x.label is not None) == sorted(
                n for n, *_ in drawings
            )
        else:
            assert list(names) == ["a", "b"] and [x.label for x in found] == [None] * 4
            whole = list(segmentation.folders(root / "images", root / "masks", (48, 48), ["a"])[1])
            for x, (_, picture, mask) in zip(whole, drawings, strict=True):
                assert torch.equal(x.mask, torch.from_numpy(mask))
                assert torch.equal(x.pixels, torch.from_numpy(picture).permute(2, 0, 1) / 255)
    model = load_bundled("shapes")
    said = segmentation.run(model, model.class_names, iter(whole))
    known = [
        x._replace(label=PROPERTIES["shape"].index(n)) for x, (n, *_) in zip(whole, drawings, strict=True)
    ]
    torch.testing.assert_close(said.scores, segmentation.run(model, model.class_names, iter(known)).scores)


class Stored(dict[str, np.ndarray]):
    """What h5py's open file is to a reader: arrays by name, or by what a cell holds."""

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *error: object) -> None: ...


def as_mat(drawings: list[tuple[str, np.ndarray, np.ndarray]], ids: list[str]) -> Stored:
    """Cells as MATLAB 7.3 writes them: names of arrays whose axes are reversed; `gt` is a cell of cells."""
    stored, cells = Stored(), defaultdict(list)
    for number, (_, picture, mask) in enumerate(drawings):
        code = np.array([[ord(letter)] for letter in ids[number]], dtype=np.uint16)
        arrays = {"img": picture.T, "gt": np.array([[f"m{number}"]], dtype=object), "id": code}
        stored[f"m{number}"] = mask.astype(np.uint8).T
        for kind, array in arrays.items():
            stored[f"{kind}{number}"] = array
            cells[f"value/{kind}"].append([f"{kind}{number}"])
    stored.update({name: np.array(cell, dtype=object) for name, cell in cells.items()})
    return stored


def write_mat(path: Path, stored: Stored) -> None:
    """The same as a file, its names as references."""
    h5py: Any = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in stored.items():
            if array.dtype != object:
                file.create_dataset(name, data=array)
        for name, array in sorted(stored.items(), key=lambda item: item[0].startswith("value/")):
            if array.dtype == object:
                cell = file.create_dataset(name, array.shape, dtype=h5py.ref_dtype)
                for row, (key,) in enumerate(array):
                    cell[row, 0] = file[key].ref


@pytest.mark.parametrize("library", ["stand-in", "h5py"])
def test_the_file_of_imagenet_segmentation_is_read(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings, path = outlined(3), tmp_path / "gt.mat"
    drawings[1] = (drawings[1][0], drawings[1][1][:40], drawings[1][2][:40])  # no square
    stored = as_mat(drawings, ["n01440764_36", "n01443537_1", "n99999999_1"])
    if library == "h5py":
        write_mat(path, stored)
    else:
        path.touch()
        monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=lambda path, mode: stored))
    names, samples = segmentation.imagenet_segmentation(path, (48, 48))
    found = list(samples)
    assert names[0] == "tench" and [x.label for x in found] == [0, 1, None]
    assert torch.equal(found[0].mask, torch.from_numpy(drawings[0][2]))
    assert torch.equal(found[0].pixels, torch.from_numpy(drawings[0][1]).permute(2, 0, 1) / 255)
    _, samples = segmentation.imagenet_segmentation(path, (40, 48))
    assert torch.equal(list(samples)[1].mask, torch.from_numpy(drawings[1][2]))
    with pytest.raises(FileNotFoundError, match="gtsegs_ijcv"):
        segmentation.imagenet_segmentation(tmp_path / "none.mat", (48, 48))
    if library == "stand-in":
        del stored["value/gt"]
        with pytest.raises(ValueError, match="it has no value/gt"):
            segmentation.imagenet_segmentation(path, (48, 48))


def test_what_cannot_be_scored_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install h5py; or .*--images and --masks"):
        segmentation.imagenet_segmentation(tmp_path / "gt.mat", (48, 48))
    in_folders(tmp_path, outlined(2))
    other = next((tmp_path / "masks").rglob("1.png"))
    Image.new("L", (5, 7)).save(other)
    _, samples = segmentation.folders(tmp_path / "images", tmp_path / "masks", (48, 48), [])
    with pytest.raises(ValueError, match=r"\(48, 48\); received \(7, 5\)"):
        list(samples)
    other.unlink()
    with pytest.raises(ValueError, match=r"found none for .*1\.png \(1 in all\)"):
        segmentation.folders(tmp_path / "images", tmp_path / "masks", (48, 48), [])
    model = load_bundled("shapes")
    with pytest.raises(ValueError, match="received none; check the folder"):
        segmentation.run(model, model.class_names, iter([]))
