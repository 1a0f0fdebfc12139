"""Cues: the ablation is that of terms, images and groups are what they are said to be, and the page says what was measured."""

from __future__ import annotations

import csv
import json
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.questions import cues
from analyses.study.results import RESULTS
from decompclip.data.shapes import PROPERTIES
from decompclip.decomposition.components import heads
from decompclip.decomposition.moments import Moments
from decompclip.evaluation.metrics import predict
from decompclip.operators.ablation import MeanAblate

PAGE = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
NAMES = ("--classes", "circle,square", "--words", ",".join(PROPERTIES["background"]))


@pytest.fixture(scope="module")
def waterbirds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Waterbirds' form, with drawings under noise in place of birds; validation and test, a dozen a group."""
    folder = tmp_path_factory.mktemp("waterbirds")
    rows = [["img_id", "img_filename", "y", "split", "place", "place_filename"]]
    for split in (1, 2):
        pairs, part = cues.drawn(2_000, seed=split, noise=0.5, untied=1)
        for group in range(4):
            label, cue = divmod(group, 2)
            places = ((part.labels == label) & (part.cues == cue)).nonzero()[:12, 0].tolist()
            for place, image in zip(places, pairs.read(places).images, strict=True):
                path = f"{split}/{label}-{cue}-{place}.png"
                (folder / path).parent.mkdir(exist_ok=True)
                Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(folder / path)
                rows.append([str(len(rows)), path, str(label), str(split), str(cue), ""])
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_the_command_runs_the_protocol_on_a_folder_of_waterbirds_form(
    waterbirds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--world",
        "waterbirds",
        "--folder",
        str(waterbirds),
        "--model",
        "shapes",
        *NAMES,
        "--control",
        "20",
    ]
    monkeypatch.setattr("sys.argv", ["cues", *words, "--out", str(tmp_path)])
    cues.main()
    said = json.loads((tmp_path / "waterbirds.json").read_text(encoding="utf-8"))
    assert (tmp_path / "waterbirds.png").stat().st_size > 0 and cues.finding(said) in capsys.readouterr().out
    assert said["images"] == {"validation": 48, "test": 48}
    assert [(g["class"], g["cue"], g["total"]) for g in said["before"]["groups"]] == [
        ("circle", "land background", 12), ("circle", "water background", 12),
        ("square", "land background", 12), ("square", "water background", 12),
    ]  # fmt: skip
    assert said["chosen"] == said["heads"][: int(np.argmax(said["curve"]))]
    assert len(said["control"]) == (20 if said["chosen"] else 0)


@pytest.mark.parametrize(
    "words", [["--world", "waterbirds"], ["--world", "shapes", "--folder", "x"], ["--by", "x"]]
)
def test_worlds_and_folders_go_together(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["cues", *words])
    with pytest.raises(SystemExit):
        cues.main()
    assert "or of waterbirds, celeba with its --folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def world(waterbirds: Path) -> cues.World:
    config = cues.Config("waterbirds", "shapes", classes=cues.SHAPES, words=PROPERTIES["background"])
    return cues.table_world(config, waterbirds)


@torch.no_grad()
def test_scores_without_heads_are_those_of_ablated_terms(world: cues.World) -> None:
    model, (test, d) = world.model, cues.scores(world, world.test, terms=True)
    batches = [model.normalize(pixels) for pixels, _ in world.validation.pixels()]
    moments = Moments.fit(model, batches, normalize=True)
    mean = cues.scores(world, world.validation)[0].heads.mean(0)
    for chosen in ([45], [3, 20, 41, 46], list(range(40, 48))):
        components = reduce(or_, (heads[i // 8, i % 8] for i in chosen))
        expected = predict(MeanAblate(components, moments)(d).features, world.classifier)
        found = test.without(chosen, mean)
        assert torch.equal(found.right, expected == world.test.labels)
    torch.testing.assert_close(test.whole, d.features @ world.classifier.T, rtol=0, atol=1e-6)


def test_numbers_come_of_test_images_and_choices_of_validation_images(world: cues.World) -> None:
    config = cues.Config(control=30, most=6)
    said = cues.run(config, world)
    own, mean = cues.scores(world, world.validation)[0], cues.scores(world, world.validation)[0].heads.mean(0)
    order = [int(a) * 8 + int(b) for a, b in (name[6:-1].split(", ") for name in said["heads"])]
    assert said["curve"] == [own.without(order[:k], mean).worst for k in range(7)]
    test = cues.scores(world, world.test)[0]
    k = len(said["chosen"])
    assert said["after"]["worst"]["value"] == test.without(order[:k], mean).worst
    assert said["before"]["worst"]["value"] == test.without([], mean).worst
    assert said["gain"]["value"] == pytest.approx(
        said["after"]["worst"]["value"] - said["before"]["worst"]["value"]
    )
    flat = {**said, "chosen": []}
    assert "so none is ablated" in cues.finding(flat)
    plot: Any = cues.plot({**said, "baked": None, "control": []})
    assert list(plot.data[0].x) == [100 * said[way]["worst"]["value"] for way in ("before", "after")]


def test_baked_heads_answer_as_the_causal_edit(world: cues.World) -> None:
    from decompclip.defenses.bake import average_over_tokens

    model, chosen = world.model, [33, 45]
    found = cues.baked(world, chosen)
    batches = [model.normalize(pixels) for pixels, _ in world.validation.pixels()]
    edit = average_over_tokens(MeanAblate(heads[4, 1] | heads[5, 5], Moments.fit(model, batches)), model)
    with torch.no_grad(), model.hooks(edit):
        said = torch.cat(
            [
                predict(model.encode_image(model.normalize(x)), world.classifier)
                for x, _ in world.test.pixels()
            ]
        )
    assert torch.equal(found.right, said == world.test.labels)


def test_the_background_is_tied_to_the_shape_as_far_as_asked() -> None:
    pairs, tied = cues.drawn(6_000, seed=3, noise=0.7, untied=0.1)
    every, free = cues.drawn(6_000, seed=3, noise=0.7, untied=1)
    count = int((free.labels == free.cues).sum())
    assert int((tied.labels == tied.cues).sum()) == count
    others = len(free.labels) - count
    assert 0.03 * others < int((tied.labels != tied.cues).sum()) < 0.2 * others
    batch = pairs.read(range(40))
    assert set(batch.captions) == {"a photo of a circle", "a photo of a square"}
    assert [c.endswith("square") for c in batch.captions] == tied.labels[:40].bool().tolist()
    # the ground shows through the noise, and the noise is the image's own whatever the batch
    bright = batch.images[:, :, :6, :6].mean((1, 2, 3))
    assert float(bright[tied.cues[:40] == 1].max()) < float(bright[tied.cues[:40] == 0].min())
    assert torch.equal(pairs.read([7, 30]).images, batch.images[[7, 30]])
    assert len(every) == len(free.labels)


def test_heads_may_be_found_by_probes_too(world: cues.World) -> None:
    said = cues.run(cues.Config(by="probe", control=2, most=2), world)
    assert len(said["heads"]) == 2 and all(0 <= score <= 1 for score in said["score"])


@pytest.mark.parametrize("name", ["shapes", "photos"])
def test_the_page_says_what_was_measured(name: str) -> None:
    said = json.loads((RESULTS / "cues" / f"{name}.json").read_text(encoding="utf-8"))
    found = cues.finding(said)
    assert found[0].upper() + found[1:] in PAGE and said["config"]["world"] == name
