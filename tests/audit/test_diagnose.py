"""Each trap, set for the bundled model: it is told, and told right; and a model in order is told nothing."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from decompclip.cli import app
from decompclip.data.images import ImageBatch
from decompclip.data.shapes import PROPERTIES, Shapes, ShapesSource
from decompclip.diagnosis import Diagnosis
from decompclip.diagnosis.run import diagnose
from decompclip.diagnosis.trials import in_image_tower, with_activation
from decompclip.models.bundled import WEIGHTS, card, spec_of
from decompclip.models.checkpoint import read_checkpoint
from decompclip.models.clip import HookedCLIP
from decompclip.models.loading import load
from decompclip.tower.layers import ACTIVATIONS

N = 72
WORLD = Shapes(N, seed=31)
BATCH = WORLD.draw(range(N))
PIXELS, LABELS = BATCH.images, BATCH.labels
NAMES = PROPERTIES["shape"]


@pytest.fixture(scope="module")
def bundled() -> HookedCLIP:
    return load("shapes")


@pytest.fixture
def shapes(bundled: HookedCLIP) -> HookedCLIP:
    """A copy to spoil."""
    return copy.deepcopy(bundled)


def test_its_own_trials_warn_of_nothing_and_the_door_is_watched_again(shapes: HookedCLIP) -> None:
    light = (PIXELS.clamp(0, 1) * 255).round() / 255
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        diagnose(shapes, light, LABELS, class_names=NAMES)
    with pytest.warns(UserWarning, match="these images lie in"):
        shapes.encode_image(light)


def only(diagnosis: Diagnosis, check: str) -> str:
    """The sentence of the one finding there is, which `check` made."""
    assert [fault.check for fault in diagnosis.findings] == [check], diagnosis
    return diagnosis.findings[0].what


def pictures(pixels: Tensor = PIXELS) -> list[Image.Image]:
    return [Image.fromarray((255 * x).round().to(torch.uint8).permute(1, 2, 0).numpy()) for x in pixels]


def preprocessed(model: HookedCLIP, **changes: object) -> HookedCLIP:
    """The model with another preprocessing."""
    preprocess = {"mean": model.mean, "std": model.std, "interpolation": "bicubic", **changes}
    return HookedCLIP(
        model.visual,
        model.text,
        tokenizer=model.tokenizer,
        preprocess=preprocess,
        templates=model.templates,
        class_names=model.class_names,
        provenance=model.provenance,
    )


# In order


@pytest.mark.parametrize("kind", ["pixels", "pictures", "source"])
def test_a_model_in_order_gets_no_finding(bundled: HookedCLIP, kind: str) -> None:
    source = ShapesSource(WORLD, bundled.normalize)
    images, labels = {
        "pixels": (PIXELS, LABELS),
        "pictures": (pictures(), LABELS.tolist()),
        "source": (source, None),
    }[kind]
    found = diagnose(bundled, images, labels)
    assert found.ok and found.findings == ()
    assert found.accuracy.value > 0.97 and found.images == N and found.classes == 12
    assert any("crop against squash" in reason for reason in found.unchecked) == (kind != "pictures")
    checks = {comparison.check for comparison in found.comparisons}
    assert checks == {"activation", "normalisation", "channels"} | (
        {"geometry"} if kind == "pictures" else set()
    )


def test_batches_and_the_order_of_images_do_not_matter(bundled: HookedCLIP) -> None:
    turned = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert diagnose(bundled, PIXELS, LABELS, batch_size=50).to_dict() == (
        diagnose(bundled, PIXELS[turned], LABELS[turned], batch_size=64).to_dict()
    )


def test_the_model_is_left_as_it_was(shapes: HookedCLIP) -> None:
    before = {name: value.clone() for name, value in shapes.state_dict().items()}
    diagnose(shapes, PIXELS[:24], LABELS[:24])
    assert in_image_tower(shapes) == {"gelu"}
    for name, value in shapes.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_switched_twin_shares_the_weights_and_runs_the_other_activation(bundled: HookedCLIP) -> None:
    twin = with_activation(bundled, "quick_gelu")
    weights = dict(bundled.named_parameters())
    assert all(weight is weights[name] for name, weight in twin.named_parameters())
    assert in_image_tower(twin) == {"quick_gelu"} and in_image_tower(bundled) == {"gelu"}
    images = bundled.normalize(PIXELS[:4])
    with torch.no_grad():
        switched = [clip.encode_image(images) for clip in (twin, with_activation(twin, "gelu"), bundled)]
        text = [clip.encode_text(["a star"]) for clip in (twin, with_activation(twin, "gelu"), bundled)]
    for features in (switched, text):
        assert torch.equal(features[1], features[2])
        assert not torch.equal(features[0], features[2])


# The activation

OTHER = {"gelu": "quick_gelu", "quick_gelu": "gelu"}
WORD = {"gelu": "GELU", "quick_gelu": "QuickGELU"}


def weights_that_need(activation: str, *, strength: float = 250.0) -> dict[str, Tensor]:
    """The bundled weights, which hardly care, made to need `activation`.

    In each block the hidden unit that matters least is held at -0.7, where GELU and QuickGELU differ most,
    and the output bias takes away what it writes under `activation`: under the other one a constant is left.
    """
    state = {
        key: value.float() for key, value in read_checkpoint(Path(WEIGHTS) / "shapes.safetensors").items()
    }
    generator = torch.Generator().manual_seed(0)
    for layer in range(6):
        c_fc, c_proj = (f"visual.transformer.resblocks.{layer}.mlp.{name}" for name in ("c_fc", "c_proj"))
        use = state[f"{c_fc}.weight"].norm(dim=1) * state[f"{c_proj}.weight"].norm(dim=0)
        unit, held = int(use.argmin()), torch.tensor(-0.7)
        direction = strength * torch.randn(128, generator=generator)
        state[f"{c_fc}.weight"][unit], state[f"{c_fc}.bias"][unit] = 0, held
        state[f"{c_proj}.weight"][:, unit] = direction
        state[f"{c_proj}.bias"] -= ACTIVATIONS[activation](held) * direction  # pyright: ignore[reportArgumentType]
    return state


def loaded(state: dict[str, Tensor], activation: str) -> HookedCLIP:
    """These weights in a tower of the bundled kind that runs `activation`."""
    spec = spec_of(card("shapes")).with_activation(activation)  # pyright: ignore[reportArgumentType]
    model = spec.build()
    model.load_state_dict(state)
    return spec.hook(model, {"activation": activation, "activation_source": "argument"})


@pytest.mark.parametrize("needed", ["quick_gelu", "gelu"])
def test_weights_in_a_tower_of_the_other_activation_are_told(needed: str) -> None:
    state = weights_that_need(needed)
    wrong = diagnose(loaded(state, OTHER[needed]), PIXELS, LABELS)
    told = only(wrong, "activation")
    assert (
        told
        == f"the activation is wrong: the weights want {WORD[needed]} and the towers run {WORD[OTHER[needed]]}"
    )
    (fault,) = wrong.findings
    assert fault.severity == "error" and fault.remedy == f"load them with activation={needed!r}"
    present, other, difference = fault.evidence
    assert present.value < 0.9 and other.value > 0.97
    assert difference.low is not None and difference.low > 0.05
    assert difference.value == pytest.approx(other.value - present.value)
    right = diagnose(loaded(state, needed), PIXELS, LABELS)
    assert right.ok, right


def test_an_activation_that_contradicts_the_configuration_is_told_even_where_it_costs_nothing(
    bundled: HookedCLIP,
) -> None:
    found = diagnose(with_activation(bundled, "quick_gelu"), PIXELS, LABELS)
    assert "is not the one that the configuration names: that is GELU" in only(found, "activation")
    (comparison,) = [c for c in found.comparisons if c.check == "activation"]
    assert comparison.interval[0] < 0 < comparison.interval[1]  # no accuracy would have told


def test_towers_of_two_activations_are_told(shapes: HookedCLIP) -> None:
    for block in shapes.text.transformer.resblocks:  # pyright: ignore
        block.mlp.gelu = type("QuickGELU", (torch.nn.GELU,), {})()
    told = only(diagnose(shapes, PIXELS, LABELS), "activation")
    assert (
        told == "the towers differ in their activation: the image tower runs GELU, the text tower QuickGELU"
    )


# What the tower is fed


def test_a_missing_normalisation_is_told(bundled: HookedCLIP) -> None:
    found = diagnose(preprocessed(bundled, mean=(0, 0, 0), std=(1, 1, 1)), PIXELS, LABELS)
    told = only(found, "normalisation")  # not one finding for each that does better
    assert told.startswith("the mean and standard deviation of the preprocessing are wrong: ")
    assert found.findings[0].evidence[1].value > 0.9
    assert "mean=(0.48" in found.findings[0].remedy


def test_reversed_channels_are_told(bundled: HookedCLIP) -> None:
    names, labels = PROPERTIES["colour"], BATCH.attributes.colour
    options = {"class_names": names, "templates": "colour"}
    assert "blue, green, red for red, green, blue" in only(
        diagnose(bundled, PIXELS.flip(1), labels, **options), "channels"
    )
    assert diagnose(bundled, PIXELS, labels, **options).ok


def test_a_crop_where_a_squash_belongs_is_told_and_the_reverse(bundled: HookedCLIP) -> None:
    wide = [picture.resize((96, 48)) for picture in pictures()]
    found = diagnose(bundled, wide, LABELS)
    assert "brought to the tower's size in the wrong way" in only(found, "geometry")
    framed = [Image.new("RGB", (144, 48), "grey") for _ in range(N)]
    for frame, picture in zip(framed, pictures(), strict=True):
        frame.paste(picture, (48, 0))
    squashing = preprocessed(bundled, resize_mode="squash")
    assert "now 'squash'" in diagnose(squashing, framed, LABELS).findings[0].remedy
    assert diagnose(squashing, wide, LABELS).ok
    assert diagnose(bundled, framed, LABELS).ok


def test_a_source_that_does_not_normalise_is_told(bundled: HookedCLIP) -> None:
    dim = preprocessed(bundled, mean=(0.5,) * 3, std=(0.25,) * 3)
    found = diagnose(dim, ShapesSource(WORLD, lambda pixels: pixels))
    assert only(found, "preprocessing") == "the images are not preprocessed as this model wants them"
    assert found.findings[0].evidence[0].value < 0.5 < found.findings[0].evidence[1].value


@dataclass(frozen=True)
class Held:
    """A source of one batch."""

    images: Tensor
    skipped: tuple = ()

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int = 64):
        yield ImageBatch(self.images, LABELS, ("",) * len(self.images))


def test_any_source_serves_and_its_integers_are_told(bundled: HookedCLIP) -> None:
    assert diagnose(bundled, Held(bundled.normalize(PIXELS))).ok
    found = diagnose(bundled, Held((255 * PIXELS).to(torch.uint8)))
    assert [fault.check for fault in found.findings] == ["pixels", "preprocessing"]
    assert found.findings[0].what == "the pixels are integers (uint8)"


def test_images_of_another_size_are_told_and_resized(bundled: HookedCLIP) -> None:
    found = diagnose(bundled, F.interpolate(PIXELS, (64, 64)), LABELS)
    assert only(found, "resolution") == "the images are of 64 x 64 pixels, and the tower is for 48 x 48"
    assert found.accuracy.value > 0.95
    found = diagnose(bundled, ShapesSource(Shapes(24, resolution=64), bundled.normalize))
    assert "gives images of 64 x 64 pixels" in only(found, "resolution")


# Labels and classes


def test_labels_that_are_off_by_one_are_told(bundled: HookedCLIP) -> None:
    found = diagnose(bundled, PIXELS, (LABELS + 1) % 12)
    told = "the labels are off by one (each class one place back): 'circle' holds what the model calls 'mushroom'; "
    assert only(found, "classes").startswith(told)
    assert found.accuracy.value < 0.1 and found.findings[0].evidence[1].value > 0.95


def test_class_names_in_another_order_are_told_and_the_rest_compared_in_that_order(
    bundled: HookedCLIP,
) -> None:
    found = diagnose(
        bundled, PIXELS, LABELS, class_names=[NAMES[i] for i in (3, 1, 0, 2, 5, 6, 4, 8, 7, 9, 11, 10)]
    )
    told = (
        "the labels are in another order than the class names: 'star' holds what the model calls 'circle'; "
    )
    assert only(found, "classes").startswith(told)
    assert max(comparison.difference.value for comparison in found.comparisons) < 0.05


def test_labels_that_count_from_one_are_told(bundled: HookedCLIP) -> None:
    found = diagnose(bundled, PIXELS, LABELS + 1)
    assert only(found, "labels") == "the labels count from 1 to 12"
    assert found.accuracy.value > 0.97


def test_shuffled_labels_are_told(bundled: HookedCLIP) -> None:
    turned = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    found = diagnose(bundled, PIXELS, LABELS[turned])
    assert only(found, "labels").startswith("the labels look shuffled")
    assert any("accuracy cannot compare them" in reason for reason in found.unchecked)


def test_too_few_images_accuse_nobody(bundled: HookedCLIP) -> None:
    found = diagnose(bundled, PIXELS[:3], (LABELS[:3] + 1) % 12)
    assert not found.findings and found.noticeable is None
    assert not found.ok and not found.enough
    assert "too few images to notice settings that cost accuracy" in repr(found)


def test_images_of_one_class_are_told_apart_from_knowledge(bundled: HookedCLIP) -> None:
    one = torch.eq(LABELS, LABELS[0])
    found = diagnose(bundled, PIXELS[one], LABELS[one])
    assert any("all images are of one class" in reason for reason in found.unchecked)
    found = diagnose(bundled, PIXELS[:8], LABELS[:8])
    assert not any("all images are of one class" in reason for reason in found.unchecked)


# Weights


def test_a_random_text_tower_is_told(shapes: HookedCLIP) -> None:
    spec = spec_of(card("shapes"))
    scale = shapes.logit_scale.detach().clone()
    shapes.text = spec.hook(spec.build(), {}).text
    shapes.text.get_parameter("logit_scale").data.copy_(scale)
    found = diagnose(shapes, PIXELS, LABELS)
    assert [fault.check for fault in found.findings] == ["text tower"] * 2
    assert found.findings[0].what == "the text tower looks untrained"
    assert found.findings[1].what.startswith(
        "the text side knows little of the classes that the image features"
    )
    with torch.no_grad():  # weights that no longer give themselves away
        for parameter in shapes.text.parameters():
            parameter.add_(1e-3)
    assert only(diagnose(shapes, PIXELS, LABELS), "text tower").startswith("the text side knows little")


def test_a_random_image_tower_is_told(shapes: HookedCLIP) -> None:
    spec = spec_of(card("shapes"))
    shapes.visual = spec.hook(spec.build(), {}).visual
    found = diagnose(shapes, PIXELS, LABELS)
    assert [fault.check for fault in found.findings] == ["image tower", "labels"]
    assert found.findings[1].what.startswith("neither the answers nor the image features have to do with")


def test_an_overflow_in_half_precision_is_told(shapes: HookedCLIP) -> None:
    mlp = shapes.visual.blocks[0].mlp
    with torch.no_grad():  # a hidden unit that grows large, and that nothing reads
        unit = int((mlp.W_in.norm(dim=1) * mlp.W_out.norm(dim=0)).argmin())  # pyright: ignore
        mlp.W_in[unit], mlp.b_in[unit], mlp.W_out[:, unit] = 6e4, 0, 0  # pyright: ignore
    found = diagnose(shapes.half(), PIXELS, LABELS)
    assert only(found, "precision") == "float16 overflows: activations pass its largest number"
    here, wide = found.findings[0].evidence
    assert here.value > 0.5 and wide.value == 0
    (comparison,) = [c for c in found.comparisons if c.check == "precision"]
    assert comparison.accuracy.value > 0.95


def test_half_precision_that_suffices_is_in_order(bundled: HookedCLIP) -> None:
    found = diagnose(copy.deepcopy(bundled).half(), PIXELS[:24], LABELS[:24])
    assert found.ok
    assert "float32" in {comparison.name for comparison in found.comparisons}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "expected labels, one for each image; received none"),
        ({"labels": LABELS[:5]}, "received 5 labels and 72 images"),
        (
            {"labels": LABELS + 40},
            r"expected labels in 0\.\.11, the indices of 12 class names; received 40\.\.51",
        ),
        (
            {"labels": LABELS.float()},
            "expected labels .batch. of an integer type; received .72. of torch.float32",
        ),
        ({"images": PIXELS[:, :1]}, r"expected pixels .batch, 3, h, w. in .0, 1.; received .72, 1, 48, 48."),
        ({"images": PIXELS / 0}, "expected finite pixels; received nan or inf in 72 of 72 images"),
        ({"images": list(PIXELS)}, "expected a list of PIL images; received Tensor in it"),
        ({"images": []}, "received 72 labels and 0 images"),
        ({"images": "folder"}, "image source; received str"),
        ({"class_names": ["star"]}, "expected at least two classes to tell apart; received .'star'."),
    ],
)
def test_bad_input_is_refused(bundled: HookedCLIP, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"images": PIXELS, "labels": LABELS} | options
    if isinstance(given["images"], str):
        given["labels"] = None
    with pytest.raises(ValueError, match=message):
        diagnose(bundled, given.pop("images"), given.pop("labels"), **given)


# The command


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, picture in enumerate(pictures()):
        folder = tmp_path / "photos" / NAMES[int(LABELS[i])]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_the_command_finds_nothing_in_a_good_folder(photos: Path) -> None:
    (photos / "star" / "broken.png").write_bytes(b"no picture")
    code, stdout, stderr = run("shapes", "--images", photos)
    assert code == 0, stderr
    assert stdout.startswith("Diagnosis of 'shapes': no finding; zero-shot accuracy ")
    assert "crop against squash" not in stdout and "1 file skipped" in stderr


def test_the_command_tells_folders_with_swapped_names_and_says_so_to_scripts(photos: Path) -> None:
    for old, new in (("star", "held"), ("ring", "star"), ("held", "ring"), ("bolt", "held"), ("heart", "bolt"), ("held", "heart")):  # fmt: skip
        (photos / old).rename(photos / new)
    code, stdout, _ = run("shapes", "--images", photos, "--json")
    assert code == 1
    (fault,) = json.loads(stdout)["findings"]
    assert (
        "'star' holds what the model calls 'ring'; 'heart' holds what the model calls 'bolt'" in fault["what"]
    )


@pytest.mark.parametrize(("limit", "code"), [(1, 2), (19, 2), (20, 0)])
def test_the_command_calls_no_model_in_order_on_too_few_images(limit: int, code: int) -> None:
    got, stdout, stderr = run("shapes", "--images", "shapes", "--limit", limit)
    assert got == code, stderr
    few = code == 2
    assert ("too few images to say; " in stdout) == ("expected at least 20 images" in stdout) == few
    assert ("no finding" in stdout) == ("chance" in stdout) == (not few)


def test_the_command_checks_folders_before_a_model_is_loaded(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decompclip.models.loading.load", pytest.fail)
    for picture in photos.glob("*/*.png"):
        picture.rename(photos / picture.name)
    code, _, stderr = run("shapes", "--images", photos)
    assert code == 2
    assert "expected images with classes in --images, in a sub-folder for each class or a column" in stderr
    assert f"name them as the classes are: {', '.join(NAMES[:3])} and {len(NAMES) - 3} more" in stderr
    (weights := photos.parent / "x.pt").touch()
    for which in (("--checkpoint", weights), ("--pretrained", "random")):
        code, _, stderr = run("ViT-B-32", *which, "--images", photos)
        assert code == 2 and "expected --classes, a text file with one class a line; received none" in stderr


def test_the_command_says_in_its_own_words_that_there_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from decompclip.models import loading

    alone = loading.load
    monkeypatch.setattr(
        loading, "load", lambda name, **options: alone(name, pretrained="random", text=False, device="cpu")
    )
    code, stdout, stderr = run("shapes", "--images", "shapes")
    assert code == 2 and not stdout
    assert (
        "expected a model with its text side, which turns class names into answers; received 'shapes'"
        in stderr
    )
    assert "trying other settings" not in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shapes", "--images", "nowhere"), "there is no folder nowhere"),
        (("shapes", "--images", "shapes", "--device", "foo"), "expected a device that can be used here (cpu"),
    ],
)
def test_the_command_s_bad_input_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    code, _, stderr = run(*arguments)
    assert code == 2
    assert words in stderr.strip().splitlines()[-1]


def test_pictures_read_as_arrays_serve_too(bundled: HookedCLIP) -> None:
    arrays = np.stack([np.asarray(picture) for picture in pictures()])
    found = diagnose(bundled, torch.from_numpy(arrays), LABELS)
    assert [fault.what for fault in found.findings] == [
        "the channels stand last, [72, 48, 48, 3]",
        "the pixels are integers (uint8)",
    ]
    assert found.accuracy.value > 0.97
