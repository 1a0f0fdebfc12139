"""A repaired model, by the command line: what is written is what was measured, and opens again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import decompclip
from decompclip.cli.repair import Method, costly
from decompclip.data.images import FolderSource
from decompclip.data.pixels import encode_png, to_pixels
from decompclip.data.shapes import PROPERTIES, Shapes, ShapesPairs
from decompclip.defenses import inversion
from decompclip.defenses.guard import Guard
from decompclip.intervals import Rate
from tests.commands import run, succeeds

module = import_module("decompclip.cli.repair")  # not the function of that name


def repaired(out: Path, *options: object) -> dict:
    stdout, _ = succeeds("repair", "shapes-badnet", "--out", out, *options)
    assert "badnet (seed=0, size=0.145833" in stdout
    return json.loads((out / "repair.json").read_text())["results"]


@torch.no_grad()
def test_a_guarded_model_opens_again_and_is_the_one_measured(tmp_path: Path) -> None:
    out = tmp_path / "a"
    found = repaired(out, "--method", "agnostic", "--clean", "shapes:300", "--budget", 0.02)
    assert found["before"]["asr"]["value"] > 0.9 and found["after"]["asr"]["value"] < 0.2
    assert found["after"]["cacc"]["value"] > found["before"]["cacc"]["value"] - 0.05
    assert found["after"]["own_class"]["value"] > found["before"]["own_class"]["value"] + 0.2
    assert (found["before"]["touched"]["value"], found["after"]["touched"]["value"] < 0.15) == (0, True)
    assert found["control"]["asr"]["value"] > found["after"]["asr"]["value"]
    guard = decompclip.load(out)
    assert isinstance(guard, Guard)
    model, batch = decompclip.load("shapes-badnet"), Shapes(8, seed=5).draw(range(8))
    images = model.normalize(decompclip.backdoor("shapes-badnet").trigger(batch.images, range(8)))
    assert torch.equal(decompclip.load(out / "model").encode_image(images), model.encode_image(images))
    assert not torch.allclose(guard.encode_image(images), model.encode_image(images))
    with pytest.raises(ValueError, match="a model with its repair"):
        from decompclip.models.loading import load

        load(out)
    file = out / "AgnosticRep.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="changed since"):
        decompclip.load(out)


def test_patches_are_filled_in_front_of_another_repair(tmp_path: Path) -> None:
    out = tmp_path / "a"
    found = repaired(out, "--method", "token-agnostic", "--clean", "shapes:400", "--budget", 0.02)
    assert found["before"]["asr"]["value"] > 0.9 and found["after"]["asr"]["value"] < 0.1
    assert found["after"]["own_class"]["value"] > 0.7 > found["control"]["own_class"]["value"]
    guard = decompclip.load(out)
    assert repr(guard).count("TokenRep(fpr=0.02") == 1 and "AgnosticRep(budget=0.02" in repr(guard)


def test_a_repair_of_another_model_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a"
    repaired(out, "--method", "rep", "--clean", "shapes:80", "--no-control")
    decompclip.save_model(decompclip.load("shapes"), out / "model")
    with pytest.raises(ValueError, match="another one"):
        decompclip.load(out)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "rep", "--hint", "global", "--clean", "shapes:60"),
        (
            "--method",
            "par",
            "--clean",
            "shapes:64",
            "--epochs",
            1,
            "--lr",
            0.001,
            "--batch-size",
            16,
            "--no-control",
        ),
        ("--method", "inversion", "--clean", "shapes:64", "--epochs", 1, "--no-control"),
    ],
)
def test_what_folds_into_weights_is_an_ordinary_model(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIGGERS", 1)
    out = tmp_path / "a"
    found = repaired(out, *options)
    again = decompclip.load(out)
    assert isinstance(again, decompclip.HookedCLIP) and (out / "open_clip_config.json").is_file()
    assert found["after"]["touched"]["value"] > 0.9 and ("control" in found) == (
        "--no-control" not in options
    )
    assert [backdoor["target"] for backdoor in again.backdoors] == ["star"]
    # what nobody gave is not kept: a repair begun before there was such an option goes on
    assert "suspect" not in json.loads((out / "repair.json").read_text())["options"]


def test_a_killed_repair_goes_on_and_ends_with_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = ("--method", "par", "--clean", "shapes:64", "--epochs", 1, "--lr", 0.001, "--batch-size", 16)
    repaired(tmp_path / "whole", *tuning)
    out = tmp_path / "killed"

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for where in ("decompclip.models.folders.save_model", "decompclip.evaluation.evaluate.evaluate"):
        with monkeypatch.context() as patch:
            patch.setattr(where, killed)
            code, _, stderr = run("repair", "shapes-badnet", "--out", out, *tuning)
        assert code == 130 and "the same command goes on from there" in stderr
        refused = run("repair", "shapes-badnet", "--out", out, *tuning, "--seed", 1)[2]
        assert "holds an unfinished one with seed 0" in refused
    found = repaired(out, *tuning)
    assert found == json.loads((tmp_path / "whole" / "repair.json").read_text())["results"]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in out.iterdir()} == names and ".repair" not in names
    weights = [(folder / "open_clip_model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_repair_that_goes_on_has_the_triggers_that_were_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = decompclip.load("shapes-badnet"), tmp_path / "triggers.safetensors"
    monkeypatch.setattr(module, "TRIGGERS", 2)
    monkeypatch.setattr(inversion, "invert_trigger", partial(inversion.invert_trigger, steps=2, images=4))
    given = (model, ShapesPairs(64, seed=4), model.class_names, 3, path, 5)
    first = module._searched(*given)
    kept = load_file(path)
    label = model.class_names[3]
    assert all(torch.equal(kept[f"pattern {5 + i} of {label}"], x.pattern) for i, x in enumerate(first))
    assert [x.name for x in first] == [model.class_names[3]] * 2 and first[0].digest != first[1].digest
    save_file({name: x / 2 for name, x in kept.items()}, path)  # told from a new search by its size
    assert all(
        torch.equal(x.pattern, y.pattern / 2) for x, y in zip(module._searched(*given), first, strict=True)
    )
    other = module._searched(*given[:3], 2, *given[4:])
    assert not {x.digest for x in other} & {x.digest for x in module._searched(*given)}


def test_a_repair_that_fails_before_it_wrote_anything_leaves_nothing(tmp_path: Path) -> None:
    code, _, stderr = run(
        "repair", "shapes-badnet", "--out", tmp_path / "a", "--method", "agnostic", "--clean", "shapes:20"
    )
    assert code == 2 and "clean images" in stderr and not (tmp_path / "a").exists()


def test_a_repair_that_costs_accuracy_says_so_and_what_to_take_instead(tmp_path: Path) -> None:
    out = tmp_path / "a"
    code, stdout, stderr = run(
        *(
            "repair",
            "shapes-badnet",
            "--method",
            "rep",
            "--hint",
            "global",
            "--clean",
            "shapes:100",
            "--out",
            out,
        )
    )
    assert code == 0 and "control: as many MLPs of earlier layers" in stdout
    rows = json.loads((out / "repair.json").read_text())["results"]
    lost = rows["before"]["cacc"]["value"] - rows["after"]["cacc"]["value"]
    assert ("warning: this repair costs" in stderr) == (lost > 0.02)


def test_two_points_of_accuracy_are_what_a_repair_may_cost_without_a_word() -> None:
    def rows(before: float, after: float) -> dict[str, dict[str, dict[str, float]]]:
        return {"before": {"cacc": {"value": before}}, "after": {"cacc": {"value": after}}}

    assert costly(rows(0.99, 0.97), Method.rep) is None and costly(rows(0.9, 0.95), Method.par) is None
    said = costly(rows(0.99, 0.61), Method.rep)
    assert said is not None and "costs 38.0 points" in said and "--method agnostic" in said
    for method in Method:
        assert f"--method {method.value}" not in (costly(rows(0.99, 0.61), method) or "")


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_half_has_the_images_of_its_places_and_no_others_are_read(tmp_path: Path, unreadable: bool) -> None:
    pixels = Shapes(10, seed=3).draw(range(10)).images
    for place, image in enumerate(pixels):
        (tmp_path / f"{place}.png").write_bytes(encode_png(image))
    if unreadable:
        (tmp_path / "3.png").write_bytes(b"none")
    read: list[int] = []

    class Folder(FolderSource):
        def _images(self, items: Sequence[Path]) -> list[torch.Tensor | str]:
            read.extend(int(item.stem) for item in items)
            return super()._images(items)

    half = module.KeptImages(Folder(tmp_path, to_pixels()), places := [1, 3, 4, 6, 9], None)
    parts = list(half.batches(2))
    assert read == places and len(half) == len(places)
    there = [place for place in places if not (unreadable and place == 3)]
    assert torch.cat([part.indices for part in parts]).tolist() == there
    assert torch.allclose(torch.cat([part.images for part in parts]), pixels[there], atol=1 / 255)
    assert [len(part.images) for part in parts] == ([2, 2] if unreadable else [2, 2, 1])


def test_what_could_not_be_read_is_said_once(tmp_path: Path) -> None:
    drawn = Shapes(60, seed=3).draw(range(60))
    for place, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
        (folder := tmp_path / "clean" / PROPERTIES["shape"][label]).mkdir(parents=True, exist_ok=True)
        (folder / f"{place}.png").write_bytes(b"none" if place in (5, 6) else encode_png(image))
    given = ("--method", "rep", "--no-control", "--clean", tmp_path / "clean", "--out", tmp_path / "a")
    assert "2 files skipped" in succeeds("repair", "shapes-badnet", *given)[1]


def test_a_model_of_several_backdoors_is_told_which(tmp_path: Path) -> None:
    model = decompclip.load("shapes-badnet")
    model.backdoors = (*model.backdoors, *decompclip.load("shapes-blended").backdoors)
    folder = decompclip.save_model(model, tmp_path / "twice")
    given = ("--method", "rep", "--no-control", "--clean", "shapes:80", "--out", tmp_path / "a")
    stdout, stderr = succeeds("repair", folder, *given)
    assert "remembers 2 backdoors: " in stderr and "name one with --trigger to measure it" in stderr
    assert "Trigger: none chosen, so no attack success is measured" in stdout


def test_a_rate_of_no_images_is_an_empty_cell(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"cacc": Rate(1, 2).to_dict(), "asr": Rate(0, 0).to_dict()}
    module._say_results({"before": rates}, "none known", Method.rep, module.Hint.none)
    lines = capsys.readouterr().out.splitlines()
    assert "50.0" in lines[1] and lines[2].split(", %")[1].strip() == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--method": "magic"}, "magic"),
        ({"--clean": "nowhere"}, "nowhere"),
        ({"--clean": "EMPTY"}, "EMPTY"),
        ({"--target": "cat"}, "class 'cat' is not among"),
        ({"--out": "FULL"}, "holds files; name another"),
        ({"--images": "shapes:100"}, "leave --images out"),
        ({"--hint": "local"}, "expected --method rep with --hint"),
        ({"--epochs": 3}, "expected a --method of cleanclip, par, inversion with --epochs"),
        (
            {"--method": "par", "--budget": 0.05},
            "expected a --method of agnostic, token, token-agnostic with --budget; received par",
        ),
        ({"--method": "rep", "--budget": 0.05}, "with --budget; received rep"),
        ({"--suspect": "star"}, "expected --method inversion with --suspect; received agnostic"),
        ({"MODEL": "shapes", "--method": "inversion"}, "`decompclip audit shapes --clean IMAGES` names one"),
        ({"--method": "inversion", "--suspect": "cat"}, "class 'cat' is not among"),
        ({"MODEL": "ViT-B-32", "--clean": "EMPTY"}, "expected --classes"),
        ({"--clean": "shapes:20"}, "clean images"),
    ],
)
def test_bad_input_says_what_to_do(options: dict[str, object], words: str, tmp_path: Path) -> None:
    for name in ("EMPTY", "FULL"):
        (tmp_path / name).mkdir()
    (tmp_path / "FULL" / "a.txt").write_text("mine")
    wanted = {"--method": "agnostic", "--clean": "shapes:100", "--out": "new"} | options
    model = wanted.pop("MODEL", "shapes-badnet")
    places = ("EMPTY", "FULL", "new")
    given = [part for key, x in wanted.items() for part in (key, tmp_path / str(x) if x in places else x)]
    code, _, stderr = run("repair", model, *given)
    assert code == 2 and words in stderr, stderr
