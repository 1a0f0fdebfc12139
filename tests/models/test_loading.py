"""load: whatever it is asked, the right model with its provenance, or a clear error."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.model import CLIP
from safetensors.torch import save_file

from decompclip.models.bundled import bundled
from decompclip.models.errors import CheckpointError, ModelError, UnknownModelError, UnsupportedTowerError
from decompclip.models.fit import check_fit
from decompclip.models.folders import save_model
from decompclip.models.loading import load
from decompclip.models.spec import build_image_only, build_open_clip
from decompclip.models.tags import preprocess_of
from decompclip.models.text import MissingTextError, image_side


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
    with pytest.raises(
        ValueError, match=r"expected activation of \('auto', 'gelu', 'quick_gelu'\); received 'relu'"
    ):
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


# the text tower


@torch.no_grad()
def test_the_image_tower_loads_alone(source: CLIP, checkpoint: Path, images: torch.Tensor) -> None:
    model = load("ViT-mini-8", checkpoint=checkpoint, text=False)
    torch.testing.assert_close(model.encode_image(images), source.encode_image(images), rtol=1e-5, atol=1e-5)
    assert model.logit_scale == source.logit_scale
    assert [name for name in model.state_dict() if not name.startswith("visual")] == ["text.logit_scale"]
    for call in (model.encode_text, model.tokenize, lambda texts: model.zero_shot_classifier([texts])):
        with pytest.raises(
            MissingTextError, match="no text tower: it was loaded with text=False; load it without"
        ):
            call("a star")


@pytest.fixture
def far_text(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """A name whose text tower is one of transformers', which is nowhere to be had."""
    text = {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing"}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "far-ViT-mini-8", {**config, "text_cfg": text})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "far-ViT-mini-8"


@torch.no_grad()
def test_a_text_tower_that_cannot_be_had_leaves_the_image_tower(
    source: CLIP, tmp_path: Path, images: torch.Tensor, far_text: str
) -> None:
    state = {key: value for key, value in source.state_dict().items() if key.startswith("visual.")}
    state["logit_scale"] = source.logit_scale
    torch.save(state | {"text.transformer.pooler.weight": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.warns(
        UserWarning, match="the image tower is loaded alone, .*transformers' 'nobody/nothing'"
    ) as told:
        model = load(far_text, checkpoint=tmp_path / "a.pt")
    assert told[0].filename == __file__
    torch.testing.assert_close(model.encode_image(images), source.encode_image(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        MissingTextError, match="has no text tower: that of 'far-ViT-mini-8' is transformers'"
    ):
        model.encode_text("a star")
    with pytest.raises(MissingTextError, match="the text tower cannot be had: that of 'far-ViT-mini-8'"):
        load(far_text, checkpoint=tmp_path / "a.pt", text=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(far_text, checkpoint=tmp_path / "a.pt", text=False)


@torch.no_grad()
def test_a_tag_loads_its_image_tower_alone(
    source: CLIP, tagged: Callable[..., Path], images: torch.Tensor
) -> None:
    tagged("web")
    model = load("ViT-tiny-8", pretrained="web", text=False)
    assert model.mean == (0.1, 0.2, 0.3)
    torch.testing.assert_close(model.encode_image(images), source.encode_image(images), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_of_the_caller_s_is_taken(checkpoint: Path) -> None:
    ids = torch.ones(1, 77, dtype=torch.long)
    model = load("ViT-mini-8", checkpoint=checkpoint, tokenizer=lambda texts: ids)
    assert torch.equal(model.tokenize("a star"), ids)


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "coca_ViT-B-32", "ViT-L-14-CLIPA", "MobileCLIP-B", "EVA02-B-16", "ViTamin-S"]
)
def test_every_kind_of_architecture_is_built_whole_or_without_text(name: str) -> None:
    architecture = open_clip.get_model_config(name)
    assert architecture is not None
    with torch.device("meta"):
        whole, alone = build_open_clip(architecture), build_image_only(architecture, why="")
    check_fit(alone, image_side(whole.state_dict()), source="the whole", name=name)


def test_a_name_s_preprocessing_is_what_its_tags_agree_on(
    tagged: Callable[..., Path], checkpoint: Path
) -> None:
    tagged("web")
    assert load("ViT-tiny-8", checkpoint=checkpoint, activation="gelu").mean == (0.1, 0.2, 0.3)
    siglip = preprocess_of("ViT-B-16-SigLIP")
    assert (siglip["mean"], siglip["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")
    assert preprocess_of("ViT-H-14") == {}  # its tags resize in two ways


# files, folders and models in memory by themselves


@torch.no_grad()
def test_openai_s_archive_says_its_activation(
    tmp_path: Path, make_source: Callable[..., CLIP], images: torch.Tensor
) -> None:
    """A CLIP as OpenAI released theirs: scripted, in fp16, with numbers among the weights."""
    source = make_source(quick_gelu=True)
    for name in ("input_resolution", "context_length", "vocab_size"):
        if hasattr(source, name):
            delattr(source, name)
        source.register_buffer(name, torch.tensor(77))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: Any = torch.jit.script(Shell(source))
        script.save(str(tmp_path / "ViT.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load("ViT-tiny-8", checkpoint=tmp_path / "ViT.pt")
    assert model.cfg.activation == model.provenance["activation"] == "quick_gelu"
    assert model.provenance["activation_source"] == "OpenAI's archive"
    torch.testing.assert_close(model.encode_image(images), source.encode_image(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="does not fit ViT-B-32"):
        load("ViT-B-32", checkpoint=tmp_path / "ViT.pt")


class Shell(torch.nn.Module):
    """Holds a model's weights under their names; its code is a line that torch can script."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, value in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]:
            if name != "attn_mask":
                self.register_parameter(name, torch.nn.Parameter(value.detach(), requires_grad=False))
        for name, child in model.named_children():
            self.add_module(name, Shell(child))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_file_s_shapes_name_its_architecture(
    tmp_path: Path, make_source: Callable[..., CLIP], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["vision_cfg"]["image_size"] = 24
    for name in ("ViT-mini-8", "ViT-tiny-8-quickgelu"):
        monkeypatch.delitem(factory._MODEL_CONFIGS, name)
    torch.save(make_source(image_size=24).state_dict(), tmp_path / "a.pt")
    assert load(str(tmp_path / "a.pt")).name == "ViT-tiny-8"
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-mini-8", config)
    with pytest.raises(
        UnknownModelError, match=r"fit several architectures .*: ViT-tiny-8, ViT-mini-8; pass the name"
    ):
        load(tmp_path / "a.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(UnknownModelError, match="fit no native architecture"):
        load(tmp_path / "b.pt")
    with pytest.raises(UnknownModelError, match="has its weights; leave pretrained= and checkpoint= out"):
        load(tmp_path / "a.pt", pretrained="random")


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@torch.no_grad()
def test_a_folder_of_open_clip_s_is_read(
    tmp_path: Path, make_source: Callable[..., CLIP], config: dict[str, Any], images: torch.Tensor, file: str
) -> None:
    source = make_source(quick_gelu=True)
    if file.endswith("safetensors"):
        save_file(source.state_dict(), tmp_path / file)
    else:
        torch.save(source.state_dict(), tmp_path / file)
    facts = {
        "model_cfg": {**config, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "size": 9},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(facts))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # as hub snapshots do
    model = load(tmp_path)
    torch.testing.assert_close(model.encode_image(images), source.encode_image(images), rtol=1e-5, atol=1e-5)
    assert model.name == str(tmp_path)
    assert model.mean == (0.1, 0.2, 0.3)
    assert model.image_size == (24, 16)
    assert model.provenance["activation"] == model.cfg.activation == "quick_gelu"
    assert model.provenance["activation_source"] == "open_clip_config.json"
    named = load("ViT-mini-8", checkpoint=tmp_path)
    assert (named.name, named.cfg.activation, named.mean) == ("ViT-mini-8", "quick_gelu", (0.1, 0.2, 0.3))
    assert load("ViT-mini-8", checkpoint=tmp_path, activation="gelu").cfg.activation == "gelu"
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(CheckpointError, match="lacks embed_dim, vision_cfg or text_cfg"):
        load(tmp_path)


@torch.no_grad()
def test_a_live_model_of_open_clip_s_is_hooked_and_left_as_it_is(source: CLIP, images: torch.Tensor) -> None:
    before = source.encode_image(images)
    model = load(source)
    torch.testing.assert_close(model.encode_image(images), before, rtol=1e-5, atol=1e-5)
    assert model.encode_text("a star").shape == (1, 20)
    assert load(source, dtype=torch.float64).dtype == torch.float64
    alone = load(source, text=False)
    with pytest.raises(MissingTextError, match="no text tower"):
        alone.encode_text("a star")
    for hooked in (model, alone):
        for parameter in hooked.parameters():
            parameter.zero_()
    assert torch.equal(source.encode_image(images), before)
    assert source.logit_scale != 0


def test_what_is_no_model_is_refused(source: CLIP) -> None:
    with pytest.raises(UnknownModelError, match="received a Linear"):
        load(torch.nn.Linear(1, 1))
    with pytest.raises(UnknownModelError, match="received a HookedCLIP"):
        load(load(source))
    with pytest.raises(
        UnknownModelError, match="leave pretrained=, checkpoint=, activation=, image_size= and prefix= out"
    ):
        load(source, activation="gelu")


def test_a_timm_tower_has_no_quick_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decompclip.models.loading.oddities", lambda config: [])
    with pytest.raises(
        ValueError, match="expected activation 'gelu' for 'ViT-B-16-SigLIP', whose tower is timm's"
    ):
        load("ViT-B-16-SigLIP", pretrained="random", activation="quick_gelu")


# names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ViT-B-33", "'ViT-B-32'"),
        ("shape", "'shapes'"),
        ("hf-hub:x/CLIP", "checkpoint=PATH"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownModelError, match=f"there is no model '{name}'; nearest: .*{nearest}"):
        load(name)


@pytest.mark.parametrize("name", ["vit-b-32", "ViT-B32", "ViT-B/32", "vit_b_32", "VIT-B-32"])
def test_a_name_is_found_however_it_is_written(name: str) -> None:
    assert load(name, pretrained="random", text=False).name == "ViT-B-32"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("openai/clip-vit-base-patch16", r"load\('ViT-B-16', pretrained='openai'\)"),
        ("openai/clip-vit-large-patch14-336", r"load\('ViT-L-14-336', pretrained='openai'\)"),
        ("google/siglip-so400m-patch14-384", r"load\('ViT-SO400M-14-SigLIP-384'\)"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", r"load\('ViT-H-14'\)"),
    ],
)
def test_a_repository_of_the_hub_names_the_architecture(name: str, call: str) -> None:
    with pytest.raises(UnknownModelError, match=call):
        load(name)


def test_an_unknown_tag_offers_the_nearest() -> None:
    with pytest.raises(
        UnknownModelError,
        match=r"no pretrained weights 'laion400m' for 'ViT-B-32'; nearest: laion400m_e3.*; its tags: openai, ",
    ):
        load("ViT-B-32", pretrained="laion400m")


def test_an_unsupported_tower_says_why_before_anything_is_fetched() -> None:
    with pytest.raises(UnsupportedTowerError, match="'RN50' is not supported: it is a ResNet"):
        load("RN50", pretrained="random")


@pytest.mark.parametrize("size", [(224,), (0, 1), "224"])
def test_an_image_size_is_one_number_or_two(size: Any) -> None:
    with pytest.raises(ValueError, match="expected image_size as a number of pixels, or height and width"):
        load("ViT-B-32", pretrained="random", image_size=size)


def test_a_folder_stands_for_a_bundled_model_s_weights(tmp_path: Path) -> None:
    save_model(load("shapes-badnet"), tmp_path / "mine")
    found = load("shapes", checkpoint=tmp_path / "mine")
    assert (found.name, len(found.backdoors)) == ("shapes", 1)
    with pytest.raises(CheckpointError, match="does not fit cifar10"):
        load("cifar10", checkpoint=tmp_path / "mine")


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
    assert not torch.equal(random.visual.get_parameter("proj"), load("shapes").visual.get_parameter("proj"))
    assert random.templates
    assert random.class_names


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "shapes",
            {"device": "gpu"},
            ValueError,
            r"device that can be used here \(cpu.*\); received 'gpu': torch knows no device .* 'cuda'$",
        ),
        ("shapes", {"device": "cuda:99"}, ValueError, r"received 'cuda:99': "),
        ("shapes", {"dtype": "float16"}, ValueError, r"received 'float16'; pass dtype=torch\.float16$"),
        ("shapes", {"dtype": "fp8"}, ValueError, r"received 'fp8'; pass dtype=torch\.float16$"),
        ("shapes", {"dtype": torch.int8}, ValueError, r"for floating point; received torch\.int8; "),
        (5, {}, UnknownModelError, r"a name, a path, or a model of .*; received 5, of type int$"),
    ],
)
@pytest.mark.usefixtures("ours_alone")
def test_bad_options_are_refused_before_anything_is_read(
    name: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("decompclip.models.loading.load_bundled", pytest.fail)
    with pytest.raises(error, match=message) as told:
        load(name, **options)
    assert "\n" not in str(told.value)


def test_a_warning_about_a_path_points_at_the_caller(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decompclip.models.loading.models_like", lambda state, **options: ["ViT-tiny-8"])
    with pytest.warns(UserWarning, match="does not say which activation") as told:
        load(checkpoint)
    assert told[0].filename == __file__


def test_a_model_is_one_line(checkpoint: Path, source: CLIP) -> None:
    name = "HookedCLIP('shapes', bundled, gelu, 48 x 48, patches 8 x 8, 6 layers x 8 heads, d_embed 128)"
    model = load("shapes")
    assert repr(model) == name
    assert repr(model.visual) == "HookedViT(gelu, 48 x 48, patches 8 x 8, 6 layers x 8 heads, d_embed 128)"
    alone = load("ViT-tiny-8", checkpoint=checkpoint, text=False, activation="gelu")
    assert repr(alone).startswith(f"HookedCLIP('ViT-tiny-8', checkpoint {checkpoint.name!r}, gelu, ")
    assert repr(alone).endswith(", image tower alone)")
    assert ", in memory, gelu, " in repr(load(source))
    siglip = load("ViT-B-16-SigLIP", pretrained="random", text=False)
    assert ", random weights, " in repr(siglip) and "d_embed 768, attention pool, image" in repr(siglip)
