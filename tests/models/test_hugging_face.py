"""Models of Hugging Face transformers: the same image and text features, from a folder or from memory."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from decompclip.models.checkpoint import digest, sha256
from decompclip.models.errors import CheckpointError, ModelError, UnknownModelError
from decompclip.models.folders import save_model
from decompclip.models.hugging_face import ModelParts, from_transformers, read_folder, weights_in
from decompclip.models.loading import load
from decompclip.models.preprocessing import preprocess_of
from decompclip.models.text import HubTokenizer, MissingTextError

transformers: Any = pytest.importorskip("transformers")

VISION = {
    "hidden_size": 32,
    "intermediate_size": 50,  # 50 / 32 and back: int(32 * 1.5625) is 50; 41 / 24 and back is not
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 99,
    "max_position_embeddings": 12,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 0,
}
KINDS = {"clip": "CLIP", "siglip": "Siglip"}
MakeTheirs = Callable[..., Any]


@pytest.fixture
def theirs() -> MakeTheirs:
    """`theirs("clip", vision={}, text={})`: transformers' model, none of its weights trivial."""

    def make(kind: str, *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
        own = {"clip": {"projection_dim": 20}, "siglip": {}}[kind]
        words = {**TEXT, **({"projection_size": 32} if kind == "siglip" else {}), **(text or {})}
        config = getattr(transformers, f"{KINDS[kind]}Config")(
            vision_config={**VISION, **(vision or {})}, text_config=words, **own
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"{KINDS[kind]}Model")(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        return model.eval()

    return make


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> torch.Tensor:
    """Texts that end at different places, behind which greater ids follow than the end's."""
    found = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    found[torch.arange(3), torch.tensor([4, 7, 11])] = 98
    return found


def parity(source: Any, model: Any, pixels: torch.Tensor, ids: torch.Tensor) -> None:
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(source.encode_image(pixels), image, **close)
        torch.testing.assert_close(source.encode_text(ids), text, **close)
        assert image.std() > 0.1  # not all zeros
        assert text.std(0).min() > 1e-3  # the texts differ


@pytest.fixture
def saved(tmp_path: Path, theirs: MakeTheirs) -> Callable[..., Path]:
    """`saved("clip")`: a folder of that model, with its preprocessing, without a tokenizer."""

    def save(kind: str, model: Any = None, **options: Any) -> Path:
        (model or theirs(kind)).save_pretrained(tmp_path / kind, **options)
        size = {"clip": {"shortest_edge": 24}, "siglip": {"height": 24, "width": 24}}[kind]
        crop = {"crop_size": {"height": 24, "width": 24}} if kind == "clip" else {}
        processor: Any = getattr(transformers, f"{KINDS[kind]}ImageProcessor")(size=size, **crop)
        processor.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_transformers_features(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor, kind: str
) -> None:
    source = read_folder(saved(kind))
    parity(source.model, theirs(kind), pixels, ids)
    assert source.activation == {"clip": "quick_gelu", "siglip": "gelu_tanh"}[kind]
    scale: Any = source.model.get_parameter("logit_scale")
    assert scale.flatten() == theirs(kind).logit_scale.flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_put_together(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor, kind: str
) -> None:
    folder = saved(kind, max_shard_size="20KB")
    files = weights_in(folder)
    assert len(files) > 2
    source = read_folder(folder)
    parity(source.model, theirs(kind), pixels, ids)
    assert source.files == files
    sums = {file: sha256(file) for file in files}
    assert load(folder).provenance["sha256"] == digest(sums) != digest(dict(reversed(sums.items())))
    files[1].unlink()
    with pytest.raises(
        CheckpointError, match=rf"names {len(files)} shards, of which 1 are not in the folder"
    ):
        read_folder(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors", "inner/other.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(saved: Callable[..., Path], name: str) -> None:
    folder = saved("clip")
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": name}}))
    with pytest.raises(
        CheckpointError, match=rf'names the shard "{re.escape(name)}", a path that leads out of the folder'
    ):
        read_folder(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin_is_read(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor, sharded: bool
) -> None:
    """Its older layout too, with positions among the weights."""
    folder = saved("clip")
    (folder / "model.safetensors").unlink()
    state = {**theirs("clip").state_dict(), "text_model.embeddings.position_ids": torch.arange(12)[None]}
    keys = list(state)
    parts = [keys[::2], keys[1::2]] if sharded else [keys]
    names = ["pytorch_model-1.bin", "pytorch_model-2.bin"] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save({key: state[key] for key in part}, folder / name)
    if sharded:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    parity(read_folder(folder).model, theirs("clip"), pixels, ids)


@pytest.mark.parametrize(
    ("kind", "vision", "text"),
    [
        ("clip", {"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
        ("clip", {"layer_norm_eps": 1e-2}, {"layer_norm_eps": 1e-1}),
        ("clip", {"intermediate_size": 41, "num_attention_heads": 2}, {"eos_token_id": 2}),
        ("clip", {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_new"}),
        ("siglip", {"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
        ("siglip", {"layer_norm_eps": 1e-2, "patch_size": 12}, {"layer_norm_eps": 1e-1}),
    ],
)
def test_variants_of_the_configuration_are_followed(
    theirs: MakeTheirs,
    saved: Callable[..., Path],
    pixels: torch.Tensor,
    ids: torch.Tensor,
    kind: str,
    vision: dict[str, Any],
    text: dict[str, Any],
) -> None:
    if vision.get("hidden_act") == "gelu_pytorch_tanh":
        text = {"hidden_act": "gelu_pytorch_tanh"}
    model = theirs(kind, vision=vision, text=text)
    parity(read_folder(saved(kind, model)).model, model, pixels, ids)


def test_what_config_json_leaves_out_is_transformers_default(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor
) -> None:
    folder = saved("clip")
    config = json.loads((folder / "config.json").read_text())
    for part, own in (("vision_config", VISION), ("text_config", TEXT)):
        config[part] = {key: value for key, value in config[part].items() if key in own}
    # as before 2023: the changes under another name, with nulls beside
    config["vision_config_dict"], config["text_config_dict"] = config.pop("vision_config"), None
    (folder / "config.json").write_text(json.dumps(config))
    parity(read_folder(folder).model, theirs("clip"), pixels, ids)


# through load


@pytest.mark.usefixtures("strict")
@torch.no_grad()
def test_load_takes_a_folder(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor
) -> None:
    folder = saved("clip")
    for name in (folder, str(folder)):
        model = load(name)
        parity(model, theirs("clip"), pixels, ids)
        assert model.dtype == torch.float32
        assert not model.training
        assert model.provenance["name"] == model.provenance["checkpoint"] == str(folder)
        assert len(model.provenance["sha256"]) == 64
        assert model.provenance["activation"] == model.cfg.activation == "quick_gelu"
        assert model.provenance["activation_source"] == "config.json"
    assert load(folder, activation="gelu").cfg.activation == "gelu"
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_load_takes_siglip_from_a_folder_and_from_memory(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor
) -> None:
    model = theirs("siglip")
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(input_ids=ids).pooler_output
    for name in (saved("siglip"), model):
        found = load(name)
        words: Any = found.text
        torch.testing.assert_close(found.visual(pixels), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(words.encode_text(ids), text, rtol=1e-4, atol=1e-5)
        assert found.mean == (0.5, 0.5, 0.5)
        assert found.provenance["activation"] == found.cfg.activation == "gelu_tanh"


def test_load_checks_a_folder_against_a_name(saved: Callable[..., Path], theirs: MakeTheirs) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "image_size": 24}
    folder = saved("clip", theirs("clip", vision=small))
    with pytest.raises(
        CheckpointError, match="does not fit ViT-tiny-8: .* of another shape .*positional_embedding"
    ):
        load("ViT-tiny-8", checkpoint=folder)
    with pytest.raises(
        CheckpointError, match=r"does not fit ViT-B-32: .*\(patches of 8 x 8 pixels, expected 32 x 32"
    ):
        load("ViT-B-32", checkpoint=folder)


def test_load_takes_a_name_with_its_folder(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    saved: Callable[..., Path],
    theirs: MakeTheirs,
    pixels: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    folder = saved("clip", theirs("clip", vision={"intermediate_size": 48}))
    config["vision_cfg"]["image_size"] = 24
    model = load("ViT-mini-8", checkpoint=folder)
    assert model.name == "ViT-mini-8"
    parity(model, theirs("clip", vision={"intermediate_size": 48}), pixels, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_tower_alone(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, ids: torch.Tensor, kind: str
) -> None:
    source = read_folder(saved(kind), text=False)
    with torch.no_grad():
        expected = theirs(kind).get_image_features(pixel_values=pixels).pooler_output
        found: Any = source.model.get_submodule("visual")(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any("token_embedding" in key for key in source.model.state_dict())
    with pytest.raises(MissingTextError, match="no text tower: it was loaded with text=False"):
        source.tokenizer(["a star"])


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_tower_of_transformers_loads_without_text(
    theirs: MakeTheirs, saved: Callable[..., Path], pixels: torch.Tensor, kind: str, where: str
) -> None:
    name = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}[kind]
    options = {"projection_dim": 20} if kind == "clip" else {}
    tower = getattr(transformers, name)(
        getattr(transformers, f"{KINDS[kind]}VisionConfig")(**VISION, **options)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        found = tower.eval()(pixel_values=pixels)
    expected = found.image_embeds if kind == "clip" else found.pooler_output
    source = tower if where == "memory" else saved(kind, tower)
    model = load(source)
    torch.testing.assert_close(model.encode_image(pixels), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        MissingTextError, match="no text tower: .* transformers' image tower alone; load a whole"
    ):
        model.encode_text(["a star"])
    if where == "folder":
        with pytest.raises(MissingTextError, match="cannot be had: .* image tower alone"):
            load(source, text=True)


def test_a_file_of_transformers_is_told_to_load_by_its_folder(saved: Callable[..., Path]) -> None:
    folder = saved("clip")
    with pytest.raises(UnknownModelError, match=rf"is a file of Hugging Face .* config.json: '{folder}'$"):
        load(folder / "model.safetensors")


# preprocessing


def test_preprocessing_comes_from_the_folder(saved: Callable[..., Path]) -> None:
    plain = read_folder(saved("siglip")).preprocess
    assert plain["mean"] == plain["std"] == (0.5, 0.5, 0.5)
    assert (plain["interpolation"], plain["resize_mode"]) == ("bicubic", "squash")
    folder = saved("clip")
    path = folder / "preprocessor_config.json"
    facts = json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "resample": 2}
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": facts}))  # transformers 5
    model = load(folder)
    assert model.mean == (0.1, 0.2, 0.3)
    assert model.preprocess_cfg.interpolation == "bilinear"
    assert model.preprocess_cfg.resize_mode == "shortest"
    assert model.image_size == (24, 24)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link"])
def test_what_stands_for_preprocessing_and_cannot_be_read_is_refused(
    saved: Callable[..., Path], name: str, kind: str
) -> None:
    folder = saved("clip")
    (folder / "preprocessor_config.json").unlink()
    path = folder / name
    {"fifo": os.mkfifo, "folder": os.mkdir, "dangling link": lambda path: path.symlink_to("gone")}[kind](path)
    with pytest.raises(CheckpointError, match=rf"{name} is no JSON: "):
        load(folder)


def test_silence_about_preprocessing_is_told(saved: Callable[..., Path]) -> None:
    folder = saved("clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(
        UserWarning, match="does not say how images are prepared; those of 'clip' models"
    ) as told:
        model = load(folder)
    assert told[0].filename == __file__
    assert model.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@pytest.mark.parametrize(
    "facts",
    [
        {"resample": 1},
        {"do_pad": True},
        {"do_flip_channel_order": True},
        {"size": {"longest_edge": 9}},
        {"size": {"shortest_edge": 9, "longest_edge": 12}},
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="prepares images in a way that is not known here"):
        preprocess_of(facts, "clip", 24, source="a.json")


def test_images_that_are_not_normalised() -> None:
    found = preprocess_of(
        {"do_normalize": False, "size": 24, "do_center_crop": True}, "clip", 24, source="a.json"
    )
    assert (found["mean"], found["std"], found["resize_mode"]) == ((0, 0, 0), (1, 1, 1), "shortest")


# tokenizers


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """CLIP's tokenizer in transformers' files."""
    own, folder = SimpleTokenizer(), tmp_path / "words"
    folder.mkdir()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(key, key): i for key, i in own.encoder.items()}))
    pairs = "\n".join(" ".join(pair) for pair in own.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}")
    return folder


@torch.no_grad()
def test_a_folder_s_tokenizer_is_used(
    saved: Callable[..., Path], theirs: MakeTheirs, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    model = theirs("clip", text=words)
    folder = saved("clip", model)
    texts = ["a photo of 3 cats!", "a star that is much longer than what the text tower can take at once"]
    without = load(folder)  # open_clip's own, since the vocabulary is CLIP's
    assert isinstance(without.tokenizer, SimpleTokenizer)
    for path in vocabulary.iterdir():
        path.rename(folder / path.name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = load(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    assert found.tokenize(texts).shape == (2, 12)
    expected = model.get_text_features(**ids).pooler_output
    for loaded in (found, without):
        torch.testing.assert_close(loaded.encode_text(texts), expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_tokenizer_says_so_when_asked(
    saved: Callable[..., Path], ids: torch.Tensor
) -> None:
    model = load(saved("clip"))
    with pytest.raises(
        MissingTextError, match=r"no tokenizer: .*vocabulary of 99 is not CLIP's of 49408; set `model"
    ):
        model.encode_text("a star")
    assert model.encode_text(ids).shape == (3, 20)
    load(saved("clip"), tokenizer=lambda texts: ids).encode_text("a star")


def test_a_broken_tokenizer_leaves_the_model(saved: Callable[..., Path]) -> None:
    folder = saved("clip")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="The model was loaded without a tokenizer") as told:
        load(folder)
    assert told[0].filename == __file__
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be read"):
        load(folder, text=True)


def test_a_hub_tokenizer_is_asked_for_on_use_and_explains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = HubTokenizer("ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP", 64)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    words = "the tokenizer of 'ViT-B-16-SigLIP', timm/ViT-B-16-SigLIP on the hub"
    with pytest.raises(MissingTextError, match=words):
        tokenizer(["a star"])
    model = load("shapes")
    model.tokenizer = tokenizer
    with pytest.warns(UserWarning, match=f"mine is written without its tokenizer: {words}"):
        save_model(model, tmp_path / "mine")


# in memory


def live_parity(model: Any, theirs: Any, pixels: torch.Tensor, ids: torch.Tensor) -> None:
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    parity(model, theirs, pixels, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())


def test_a_live_model_is_hooked_and_left_as_it_is(
    theirs: MakeTheirs, pixels: torch.Tensor, ids: torch.Tensor
) -> None:
    model = from_transformers(theirs("clip"))
    assert model.provenance["name"] == "CLIPModel in memory"
    assert model.provenance["activation"] == model.cfg.activation
    live_parity(model, theirs("clip"), pixels, ids)
    live_parity(load(theirs("clip")), theirs("clip"), pixels, ids)
    alone = load(theirs("clip"), text=False)
    with pytest.raises(MissingTextError, match="no text tower"):
        alone.encode_text("a star")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_live_model_keeps_its_precision(
    theirs: MakeTheirs, pixels: torch.Tensor, dtype: torch.dtype
) -> None:
    model = theirs("clip").to(dtype)
    found = from_transformers(model)
    assert found.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 0.1
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels.to(dtype)).pooler_output
        torch.testing.assert_close(
            found.encode_image(pixels.to(dtype)), expected, rtol=tolerance, atol=tolerance
        )


def test_a_tokenizer_of_transformers_makes_the_tokens(theirs: MakeTheirs, vocabulary: Path) -> None:
    model = theirs("clip", text={"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406})
    (vocabulary / "config.json").write_text('{"model_type": "clip"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(vocabulary)
    theirs_too = load(model, tokenizer=tokenizer)
    assert (
        theirs_too.tokenize("a star").tolist()
        == tokenizer(["a star"], padding="max_length", max_length=12)["input_ids"]
    )
    own = from_transformers(model, tokenizer=lambda texts: torch.zeros(len(texts), 12, dtype=torch.long))
    assert own.tokenize("a star").shape == (1, 12)
    assert own.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


# refusals


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "holds a model of type 'bert'; expected one of 'clip', 'siglip'"),
        ("siglip2", "holds a model of type 'siglip2': its images keep their shape"),
        ("clip_text_model", "holds a model of type 'clip_text_model': it is a text tower alone"),
        (None, "holds a model of type 'None'"),
    ],
)
def test_a_folder_of_another_type_is_refused_by_name(tmp_path: Path, kind: str | None, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path)


def test_a_live_model_of_another_type_is_refused_by_name() -> None:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(
        CheckpointError,
        match="received the CLIPVisionModel in memory, a CLIPVisionModel, .* take CLIPVisionModelWithProjection",
    ):
        load(model)


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path, saved: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config.json \(it holds nothing\)"):
        load(tmp_path / "empty")
    folder = saved("clip")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no weights \(it holds config.json, preprocessor_config.json\)"
    ):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is no JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("clip", {"vision_config": {"hidden_act": "relu"}}, "has the activation relu"),
        ("clip", {"text_config": {"hidden_act": "gelu"}}, r"has two activations \(gelu, quick_gelu\)"),
        ("clip", {"vision_config": {"num_channels": 1}}, "has images of 1 channels"),
        ("siglip", {"vision_config": {"vision_use_head": False}}, "has no attention pool"),
        ("siglip", {"text_config": {"projection_size": 7}}, "has text features of width 7"),
    ],
)
def test_configurations_that_open_clip_cannot_build_are_refused(
    saved: Callable[..., Path], kind: str, change: dict[str, Any], reason: str
) -> None:
    folder = saved(kind)
    config = json.loads((folder / "config.json").read_text())
    for part, values in change.items():
        config[part] |= values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=reason):
        load(folder)


def test_weights_that_do_not_fit_their_config_are_counted(
    saved: Callable[..., Path], theirs: MakeTheirs
) -> None:
    folder = saved("clip")
    state = theirs("clip").state_dict()
    del state["vision_model.post_layernorm.bias"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"does not fit its config.json: .* 1 missing \(visual.ln_post.bias\)"
    ):
        load(folder)
    torch.save({**state, "vision_model.adapter.lora_A": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"holds 1 weights that no 'clip' model .*vision_model.adapter.lora_A"
    ):
        load(folder)


def test_siglip_has_no_quick_gelu(saved: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="expected activation 'gelu' for SigLIP"):
        read_folder(saved("siglip"), activation="quick_gelu")


def test_a_missing_package_is_named(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("clip")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModelError, match="transformers is needed to read the tokenizer in .*: pip install"):
        load(folder, text=True)
    with pytest.warns(UserWarning, match="loaded without a tokenizer"):
        source: ModelParts = read_folder(folder)
    assert source.activation == "quick_gelu"
