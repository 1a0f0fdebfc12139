"""load: whatever it is asked, the right model with its provenance, or a clear error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.model import CLIP

from decompclip.models.errors import CheckpointError, ModelError, UnknownModelError, UnsupportedTowerError
from decompclip.models.loading import load
from decompclip.models.zoo import bundled


@pytest.fixture
def checkpoint(tmp_path: Path, source: CLIP) -> Path:
    path = tmp_path / "epoch_3.pt"
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


@torch.no_grad()
def test_a_checkpoint_gives_the_source_s_features(
    source: CLIP, checkpoint: Path, images: torch.Tensor
) -> None:
    model = load("ViT-mini-8", checkpoint=checkpoint)
    torch.testing.assert_close(model.encode_image(images), source.encode_image(images), rtol=1e-5, atol=1e-5)
    tokens = open_clip.get_tokenizer("ViT-mini-8")(["a photo of a star"])
    torch.testing.assert_close(model.encode_text("a photo of a star"), source.encode_text(tokens))
    assert not model.training
    assert model.provenance["name"] == model.name == "ViT-mini-8"
    assert model.provenance["checkpoint"] == str(checkpoint)
    assert len(model.provenance["sha256"]) == 64
    assert model.provenance["versions"]["torch"]


def test_the_source_s_image_tower_is_not_kept(checkpoint: Path) -> None:
    model = load("ViT-mini-8", checkpoint=checkpoint)
    assert not hasattr(model.text, "visual")
    assert {name.split(".")[0] for name in model.state_dict()} == {"visual", "text"}


def test_a_half_precision_checkpoint_is_loaded_as_fp32(tmp_path: Path, source: CLIP) -> None:
    torch.save({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "half.pt")
    assert load("ViT-mini-8", checkpoint=tmp_path / "half.pt").dtype == torch.float32


# the activation


@pytest.mark.parametrize(("name", "taken"), [("ViT-tiny-8", "gelu"), ("ViT-tiny-8-quickgelu", "quick_gelu")])
def test_a_checkpoint_under_a_name_with_a_twin_warns(checkpoint: Path, name: str, taken: str) -> None:
    with pytest.warns(UserWarning) as told:
        model = load(name, checkpoint=checkpoint)
    (message,) = (str(warning.message) for warning in told)
    assert (
        f"does not say which activation it was trained with; '{taken}' was taken, after the name '{name}'"
        in message
    )
    assert "pass activation='quick_gelu' or activation='gelu' to choose" in message
    assert told[0].filename == __file__
    assert model.cfg.activation == model.provenance["activation"] == taken
    assert model.provenance["activation_source"] == "model name"


@pytest.mark.parametrize("name", ["ViT-tiny-8", "ViT-tiny-8-quickgelu"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_a_chosen_activation_is_taken_without_a_warning(
    make_source: Callable[..., CLIP], checkpoint: Path, images: torch.Tensor, name: str, activation: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(name, checkpoint=checkpoint, activation=activation)  # pyright: ignore[reportArgumentType]
    assert model.provenance["activation"] == model.cfg.activation == activation
    assert model.provenance["activation_source"] == "argument"
    reference = make_source(quick_gelu=activation == "quick_gelu")
    torch.testing.assert_close(
        model.encode_image(images), reference.encode_image(images), rtol=1e-5, atol=1e-5
    )
    tokens = model.tokenize("a star")  # and so does the text tower
    torch.testing.assert_close(model.encode_text(tokens), reference.encode_text(tokens))


def test_a_name_without_a_twin_does_not_warn(checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("ViT-mini-8", checkpoint=checkpoint).provenance["activation_source"] == "model name"


def test_an_unknown_activation_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"activation 'relu' is not one of \('auto', 'gelu', 'quick_gelu'\)"):
        load("ViT-tiny-8", pretrained="random", activation="relu")  # pyright: ignore[reportArgumentType]


# pretrained tags


@pytest.mark.parametrize("name", ["ViT-tiny-8", "ViT-tiny-8-quickgelu"])
@pytest.mark.parametrize(
    ("activation", "taken", "decided"),
    [
        ("auto", "quick_gelu", "pretrained tag"),
        ("gelu", "gelu", "argument"),
        ("quick_gelu", "quick_gelu", "argument"),
    ],
)
@torch.no_grad()
def test_a_tag_decides_unless_told(
    tagged: Callable[..., Path],
    make_source: Callable[..., CLIP],
    images: torch.Tensor,
    name: str,
    activation: str,
    taken: str,
    decided: str,
) -> None:
    tagged("openai", quick_gelu=True)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(name, pretrained="openai", activation=activation)  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.cfg.activation == model.provenance["activation"] == taken
    assert model.provenance["activation_source"] == decided
    assert model.provenance["pretrained"] == "openai"
    reference = make_source(quick_gelu=taken == "quick_gelu")
    torch.testing.assert_close(
        model.encode_image(images), reference.encode_image(images), rtol=1e-5, atol=1e-5
    )


def test_a_tag_brings_its_preprocessing_and_its_hash(tagged: Callable[..., Path]) -> None:
    path = tagged("web", interpolation="bilinear")
    model = load("ViT-tiny-8", pretrained="web")
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.preprocess_cfg.interpolation == "bilinear"
    assert model.image_size == (24, 16)
    assert model.cfg.activation == "gelu"
    assert model.provenance["sha256"] == load("ViT-mini-8", checkpoint=path).provenance["sha256"]


def test_a_failed_download_is_told_once(
    tagged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tagged("web")

    def offline(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError("Network is unreachable")

    monkeypatch.setattr(factory, "download_pretrained", offline)
    with caplog.at_level(logging.ERROR), pytest.raises(ConnectionError) as told:
        load("ViT-tiny-8", pretrained="web")
    message = str(told.value)
    assert message.startswith("the weights ViT-tiny-8 / web could not be fetched (")
    assert "Network is unreachable" in message
    assert message.endswith("download them where there is a network, and pass checkpoint=PATH")
    assert not caplog.records


# random weights


def test_random_weights_are_never_given_unasked(tagged: Callable[..., Path], checkpoint: Path) -> None:
    tagged("web")
    with pytest.raises(
        UnknownModelError,
        match=r"expected either pretrained= or checkpoint= for 'ViT-tiny-8'; received neither; its pretrained tags: web",
    ):
        load("ViT-tiny-8")
    with pytest.raises(UnknownModelError, match="received both"):
        load("ViT-tiny-8", pretrained="web", checkpoint=checkpoint)
    with pytest.raises(UnknownModelError, match="received neither; its pretrained tags: none"):
        load("ViT-mini-8")
    with pytest.raises(UnknownModelError, match=r"pretrained tags: openai, .* and \d+ more"):
        load("ViT-B-32")


def test_random_weights_are_seeded_and_leave_no_trace() -> None:
    state = torch.random.get_rng_state()
    one, other = (load("ViT-tiny-8", pretrained="random") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.provenance["pretrained"] == "random"
    assert one.provenance["sha256"] is None


# names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ViT-B32", "'ViT-B-32'"),
        ("ViT-B/32", "'ViT-B-32'"),
        ("shape", "'shapes'"),
        ("hf-hub:x/CLIP", "checkpoint=PATH"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownModelError, match=f"there is no model '{name}'; nearest: .*{nearest}"):
        load(name)


def test_an_unknown_tag_offers_the_nearest() -> None:
    with pytest.raises(
        UnknownModelError,
        match=r"no pretrained weights 'laion400m' for 'ViT-B-32'; nearest: laion400m_e3.*; its tags: openai, ",
    ):
        load("ViT-B-32", pretrained="laion400m")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "is a ResNet"),
        ("ViT-B-16-SigLIP", "is a timm tower"),
        ("ViT-L-14-CLIPA", "pooled over several tokens"),
        ("coca_ViT-B-32", "pooled by attention"),
    ],
)
def test_an_unsupported_tower_says_why_before_anything_is_fetched(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedTowerError, match=f"'{name}' is not supported: .*{reason}"):
        load(name, pretrained="random")


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"epoch_3.pt does not fit shapes: of \d+ weights .* Likely cause: "
    ):
        load("shapes", checkpoint=checkpoint)


def test_one_type_of_error_covers_them() -> None:
    assert issubclass(UnknownModelError, ModelError)
    assert issubclass(UnsupportedTowerError, ModelError)
    assert issubclass(CheckpointError, ModelError)


# device, dtype, bundled


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_is_honoured(images: torch.Tensor, dtype: torch.dtype) -> None:
    model, wide = (load("ViT-tiny-8", pretrained="random", dtype=d) for d in (dtype, None))
    assert model.dtype == model.encode_image(images).dtype == model.encode_text("a star").dtype == dtype
    torch.testing.assert_close(
        model.encode_image(images).float(), wide.encode_image(images), rtol=0.1, atol=0.1
    )


def test_device_is_honoured() -> None:
    model = load("ViT-tiny-8", pretrained="random", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.skipif("shapes" not in bundled(), reason="the bundled models are not here")
def test_a_bundled_model_takes_its_own_weights_and_activation(tmp_path: Path) -> None:
    model = load("shapes")
    assert model.provenance["activation_source"] == "card"
    with pytest.raises(
        UnknownModelError, match="'shapes' is bundled with its weights; leave pretrained='openai' out"
    ):
        load("shapes", pretrained="openai")
    other = "quick_gelu" if model.cfg.activation == "gelu" else "gelu"
    with pytest.raises(
        ValueError, match=f"expected activation '{model.cfg.activation}', with which 'shapes' was trained"
    ):
        load("shapes", activation=other)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif("shapes" not in bundled(), reason="the bundled models are not here")
def test_a_bundled_architecture_takes_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    random = load("shapes", pretrained="random")
    assert not torch.equal(random.visual.proj, load("shapes").visual.proj)
    assert random.templates
    assert random.class_names
