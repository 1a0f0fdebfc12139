"""From clean pairs to a backdoored model and its measurement, by the command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import decompclip
from decompclip.attacks.patch import BadNet
from decompclip.data.shapes import Shapes
from decompclip.data.sources import open_labelled
from decompclip.evaluation.evaluate import evaluate
from tests.commands import refused, run, succeeds


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shapes`, fine-tuned for a few steps on poisoned shards."""
    folder = tmp_path_factory.mktemp("work")
    succeeds("poison", "shapes:96", "--target", "star", "--rate", 0.1, "--out", folder / "pairs")
    stdout, _ = succeeds(*_finetune(folder))
    assert "3 steps" in stdout and "cacc" in stdout and "asr" in stdout
    return folder


def _finetune(folder: Path) -> list[object]:
    return [
        "finetune", "shapes", folder / "pairs", "--out", folder / "mine", "--epochs", 1, "--batch-size", 32,
        "--lr", 1e-4, "--images", "shapes:40", "--trigger", "badnet", "--target", "star", "--every", 2,
    ]  # fmt: skip


def test_the_fine_tuned_model_is_taken_for_a_model(tuned: Path) -> None:
    mine = decompclip.load(tuned / "mine")
    assert mine.class_names == decompclip.load("shapes").class_names
    history = json.loads((tuned / "mine" / "history.json").read_text())
    assert [entry["step"] for entry in history["history"]] == [2, 3]
    assert history["recipe"]["lr"] == 1e-4
    assert "plotly" in (tuned / "mine" / "history.html").read_text()[:5_000_000]


def test_the_same_command_again_ends_with_the_same_bytes(tuned: Path) -> None:
    path = tuned / "mine" / "open_clip_model.safetensors"
    before = path.read_bytes()
    assert run(*_finetune(tuned))[0] == 0
    assert path.read_bytes() == before


def test_another_command_in_that_folder_is_refused(tuned: Path) -> None:
    for option in (("--optimizer", "muon"), ("--warmup", 0.5)):
        code, _, stderr = run(*_finetune(tuned), *option)
        assert code == 2 and "another recipe; delete it to start anew" in stderr
    code, _, stderr = run(*_finetune(tuned), "--precision", "bf16")
    assert code == 2 and "delete it to start anew" in stderr


def test_evaluate_says_what_the_library_says(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "evaluation.json"
    code, stdout, stderr = run(
        "evaluate", tuned / "mine", "shapes:60", "--trigger", "badnet", "--target", "star", "--out", out
    )
    assert code == 0, stderr
    model = decompclip.load(tuned / "mine")
    data = open_labelled("shapes:60", model.image_size, model.class_names)
    found = evaluate(model, data, model.zero_shot_classifier(), BadNet(), 3, class_names=model.class_names)
    assert str(found) in stdout
    written = json.loads(out.read_text())
    assert written["asr"] == json.loads(json.dumps(found.to_dict()))["asr"]
    assert (written["target_class"], written["trigger"]["name"]) == ("star", "badnet")
    code, stdout, _ = run("evaluate", "shapes", "shapes:60", "--json")
    assert code == 0 and json.loads(stdout)["asr"] is None


def test_a_saved_model_knows_its_classes(tuned: Path, tmp_path: Path) -> None:
    model = decompclip.load("shapes")
    batch = model_images()
    for name, image in zip(("star", "ring"), batch, strict=True):
        (tmp_path / name).mkdir()
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(tmp_path / name / "a.png")
    stdout, _ = succeeds("evaluate", tuned / "mine", tmp_path, "--json")
    assert len(json.loads(stdout)["per_class"]) == len(model.class_names)


def model_images() -> torch.Tensor:
    return Shapes(2, seed=4).draw(range(2)).images


def test_a_twin_s_own_trigger_is_taken_from_its_card() -> None:
    code, stdout, _ = run("evaluate", "shapes-sig", "shapes:60", "--trigger", "own", "--json")
    found = json.loads(stdout)
    assert code == 0
    assert (found["trigger"]["name"], found["target_class"]) == ("sig", "star")
    assert found["asr"]["value"] > 0.85


def test_a_list_of_poisons_beside_no_shards_is_of_other_pairs(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tuned / "pairs")  # which has one
    given = (
        "finetune",
        "shapes",
        "shapes:64",
        "--out",
        tmp_path / "a",
        "--images",
        "shapes:20",
        "--trigger",
        "own",
    )
    assert "expected a model that remembers its backdoor" in refused(*given)


def test_fine_tuning_says_how_many_images_it_could_not_measure_on(tmp_path: Path) -> None:
    (tmp_path / "images" / "star").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "star" / "a.png")
    (tmp_path / "images" / "star" / "b.png").write_bytes(b"none")
    given = ("shapes", "shapes:16", "--out", tmp_path / "a", "--epochs", 1, "--batch-size", 16)
    _, stderr = succeeds("finetune", *given, "--images", tmp_path / "images")
    assert "1 file skipped" in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("evaluate", "shapes", "shapes", "--trigger", "own"),
            "expected a model that remembers its backdoor with --trigger own",
        ),
        (("evaluate", "shapes", "shapes", "--trigger", "badnet"), "--target is missing"),
        (("evaluate", "shapes", "shapes", "--target", "star"), "--trigger is missing"),
        (
            ("evaluate", "shapes", "shapes", "--trigger", "rain", "--target", "star"),
            "expected a trigger among",
        ),
        (("evaluate", "shapes", "shapes", "--trigger", "badnet", "--target", "cat"), "cat"),
        (("evaluate", "ViT-B-32", str(Path(__file__).parent)), "expected --classes"),
        (("evaluate", "shapes", "no/folder"), "no/folder"),
        (("finetune", "shapes", "no/pairs", "--out", "OUT"), "there is no folder no/pairs"),
        (("finetune", "shapes", "shapes:20", "--out", "OUT"), "at least one batch of 128 pairs; received 20"),
        (("finetune", "shapes", "shapes:200", "--out", "OUT", "--trigger", "badnet"), "expected --images"),
        (
            ("finetune", "shapes", "shapes:200", "--out", "OUT", "--classes", __file__),
            "with --trigger, --target and --classes; received none",
        ),
        (
            ("finetune", "shapes", "shapes:200", "--out", "OUT", "--images", "shapes", "--trigger", "badnet"),
            "expected --trigger and --target together",
        ),
        (
            (
                "finetune",
                "shapes",
                "shapes:200",
                "--out",
                "OUT",
                "--images",
                "shapes",
                "--trigger",
                "badnet",
                "--target",
                "cat",
            ),
            "cat",
        ),
        (("finetune", "shapes", "shapes:200", "--out", "OUT", "--warmup", "1.5"), "a warm-up in [0, 1)"),
        (("finetune", "shapes", "shapes:200", "--out", __file__), "is a file"),
        (("evaluate", "shapes", "shapes:20", "--out", str(Path(__file__).parent)), "is a folder"),
        (("evaluate", "shapes", "shapes:20", "--out", f"{__file__}/x.json"), "is a file"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, _, stderr = run(*(tmp_path / "out" if a == "OUT" else a for a in arguments))
    error = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert code == 2 and len(error) == 1 and message in error[0]


def test_a_card_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text("{not json")
    code, _, stderr = run("evaluate", "shapes", "shapes", "--trigger", file, "--target", "star")
    assert code == 2 and "expected a trigger's card" in stderr
    file.write_text(json.dumps(BadNet(size=0.2).card()))
    assert run("evaluate", "shapes", "shapes:20", "--trigger", file, "--target", "star")[0] == 0


# The zoo


def test_the_zoo_is_listed_with_what_its_cards_say() -> None:
    code, stdout, _ = run("zoo", "list", "--json")
    rows = {row["name"]: row for row in json.loads(stdout)}
    assert code == 0 and {"shapes", "cifar10", "shapes-sig"} <= set(rows)
    assert rows["shapes"]["trigger"] is None
    assert (rows["shapes-sig"]["kind"], rows["shapes-sig"]["target"]) == ("global, structured", "star")
    plain = run("zoo", "list")[1]
    assert len(plain.splitlines()) == len(rows) + 1
    card = json.loads(run("zoo", "card", "shapes-sig")[1])
    assert f"{100 * card['backdoor']['results']['asr']['value']:.1f}" == rows["shapes-sig"]["asr"]


def test_unknown_models_are_named_with_those_there_are(tmp_path: Path) -> None:
    code, _, stderr = run("zoo", "card", "shapes-rain")
    assert code == 2 and "there are:" in stderr and "shapes-badnet" in stderr
    code, _, stderr = run("zoo", "build", "shapes-rain", "--out", tmp_path)
    assert code == 2 and "expected a twin among shapes-badnet" in stderr
