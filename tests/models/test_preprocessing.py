"""A model's own preprocessing, carried out in one place."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from typer.testing import CliRunner

import decompclip
from decompclip.cli import app
from decompclip.data.shapes import Shapes
from decompclip.data.sources import open_pairs
from decompclip.models.preprocessing import Preprocessing, Steps, preprocess_of

transformers = pytest.importorskip("transformers")

CROP = {"height": 32, "width": 32}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": CROP}),
    "larger, then cropped": ("CLIP", {"size": {"shortest_edge": 37}, "crop_size": CROP}),
    "twice the crop": ("CLIP", {"size": {"shortest_edge": 64}, "crop_size": CROP}),
    "smaller, then padded": ("CLIP", {"size": {"shortest_edge": 23}, "crop_size": CROP}),
    "squashed, then cropped": ("CLIP", {"size": {"height": 48, "width": 41}, "crop_size": CROP}),
    "cropped alone": ("CLIP", {"do_resize": False, "crop_size": CROP}),
    "squashed without a crop": ("CLIP", {"size": CROP, "do_center_crop": False}),
    "bilinear": ("CLIP", {"size": {"shortest_edge": 37}, "crop_size": CROP, "resample": 2}),
    "from -1 to 1": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": CROP, "rescale_factor": 1 / 127.5}),
    "not rescaled": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": CROP, "do_rescale": False}),
    "not normalised": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": CROP, "do_normalize": False}),
    "siglip": ("Siglip", {"size": CROP}),
    "vit": ("ViT", {"size": CROP, "resample": 2}),
}


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(120, 181), (77, 50), (32, 32), (20, 45)], ids=str)
@pytest.mark.parametrize("what", PROCESSORS)
def test_pixels_are_those_of_the_transformers_processor(what: str, size: tuple[int, int]) -> None:
    kind, options = PROCESSORS[what]
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    wanted = processor(images=picture(*size), return_tensors="pt")["pixel_values"][0]
    made = Preprocessing(
        **{**preprocess_of(processor.to_dict(), "clip", 32, source="it"), "size": (32, 32)}
    ).transform()(picture(*size))
    # steps of 8 bits, since transformers scales tensors where we scale pictures; a shift of one pixel moves half of the range
    step = float((wanted.amax() - wanted.amin()).clamp_min(1)) / 255
    assert made.shape == wanted.shape
    assert (made - wanted).abs().mean() <= 0.5 * step
    assert (made - wanted).abs().max() <= 8 * step


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(24, 24), (16, 24)], ids=str)
def test_without_steps_it_is_the_transform_of_open_clip(mode: str, size: tuple[int, int]) -> None:
    own = Preprocessing(size=size, resize_mode=mode, interpolation="bilinear")
    theirs: Any = image_transform_v2(
        PreprocessCfg(size=size, resize_mode=mode, interpolation="bilinear"), is_train=False
    )
    assert torch.equal(own.transform()(picture(50, 70)), theirs(picture(50, 70)))


def test_pixels_are_what_is_normalised() -> None:
    for steps in (None, Steps(resize=30, crop=(24, 24), resample=3)):
        own = Preprocessing(size=(24, 24), steps=steps)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (own.mean, own.std))
        pixels = own.pixels()(picture(50, 70))
        assert pixels.min() >= 0 and pixels.max() <= 1
        torch.testing.assert_close((pixels - mean) / std, own.transform()(picture(50, 70)))


def test_a_picture_that_is_not_scaled_has_to_be_of_the_tower_s_size() -> None:
    look = Preprocessing(size=(24, 24), steps=Steps(resize=None, crop=None, resample=3)).transform()
    assert look(picture(24, 24)).shape == (3, 24, 24)
    with pytest.raises(ValueError, match="expected a picture of 24 x 24 pixels.*received 24 x 25"):
        look(picture(24, 25))


def test_a_processor_for_another_size_is_told_and_brought_to_the_tower_s() -> None:
    facts = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    with pytest.warns(
        UserWarning, match="prepares images of 224 x 224 pixels, and the tower takes 112 x 112"
    ):
        found = preprocess_of(facts, "clip", 112, source="it")
    assert found["steps"] == Steps(resize=128, crop=(112, 112), resample=3)


def test_a_mean_of_zero_is_a_mean() -> None:
    found = preprocess_of({"image_mean": 0.0, "image_std": 0.5}, "clip", 24, source="it")
    assert (found["mean"], found["std"]) == ((0.0,) * 3, (0.5,) * 3)


def test_steps_survive_a_file() -> None:
    own = Preprocessing(size=(24, 24), steps=Steps(resize=(30, 31), crop=(24, 24), resample=2))
    again = Preprocessing(**{**json.loads(json.dumps(asdict(own))), "size": (24, 24)})
    assert again.steps == own.steps


# commands


@pytest.fixture(scope="module")
def stretched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose preprocessing squashes, and the bundled world's images drawn out to 3:1, as images and as pairs."""
    folder = tmp_path_factory.mktemp("stretched")
    decompclip.save_model(decompclip.load("shapes"), folder / "model")
    path = folder / "model" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"
    path.write_text(json.dumps(config))
    world = Shapes(40, seed=5)
    batch = world.draw(range(40))
    rows = [("filepath", "title")]
    assert batch.labels is not None
    for i, (pixels, label) in enumerate(zip(batch.images, batch.labels.tolist(), strict=True)):
        file = folder / "images" / world.class_names[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        plain = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        plain.resize((144, 48), Image.Resampling.BICUBIC).save(file)
        rows.append((str(file), f"a {world.class_names[label]}"))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_evaluate_prepares_pictures_as_the_model_wants(stretched: Path) -> None:
    found = json.loads(run("evaluate", stretched / "model", stretched / "images", "--json"))
    assert found["cacc"]["value"] == 1


def test_finetune_trains_on_pictures_as_the_model_wants(
    stretched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decompclip.load(stretched / "model")
    seen: list[torch.Tensor] = []
    normalize = decompclip.HookedCLIP.normalize

    def watch(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return normalize(self, pixels)

    monkeypatch.setattr(decompclip.HookedCLIP, "normalize", watch)
    run(
        "finetune",
        stretched / "model",
        stretched / "pairs.csv",
        "--epochs",
        1,
        "--batch-size",
        40,
        "--out",
        tmp_path,
    )
    wanted = [model.pixels(Image.open(file)) for file in sorted((stretched / "images").rglob("*.png"))]
    order = [int((seen[0] - pixels).flatten(1).abs().amax(1).argmin()) for pixels in wanted]
    assert sorted(order) == list(range(40))
    assert torch.equal(seen[0][order], torch.stack(wanted))


def test_poison_brings_images_to_a_size_as_it_is_told(stretched: Path, tmp_path: Path) -> None:
    run(
        "poison", stretched / "pairs.csv", "--target", "star", "--rate", 0.1, "--size", 48, "--resize-mode", "squash",
        "--out", tmp_path,
    )  # fmt: skip
    batch = open_pairs(tmp_path).read(range(40))
    model = decompclip.load(stretched / "model")
    plain = [model.pixels(Image.open(file)) for file in sorted((stretched / "images").rglob("*.png"))]
    close = [min(float((image - x).abs().mean()) for x in plain) < 0.02 for image in batch.images]
    assert sum(close) >= 36  # all but the poisons, whose trigger covers a part
