"""A saved model is the same model when it is loaded again, here and by open_clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from PIL import Image

import decompclip
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import CheckpointError
from decompclip.models.folders import save_model
from decompclip.models.spec import build_open_clip

IMAGES = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return decompclip.load("shapes")


@torch.no_grad()
def test_weights_words_and_preprocessing_come_back(tmp_path: Path, model: HookedCLIP) -> None:
    again = decompclip.load(save_model(model, tmp_path / "mine"))
    ours, theirs = model.to_open_clip().state_dict(), again.to_open_clip().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (again.class_names, again.templates) == (model.class_names, model.templates)
    assert (again.mean, again.std, again.image_size) == (model.mean, model.std, model.image_size)
    assert torch.equal(again.zero_shot_classifier(), model.zero_shot_classifier())
    assert not list((tmp_path / "mine").glob("*.partial"))


@torch.no_grad()
def test_an_edit_of_the_weights_is_saved(tmp_path: Path) -> None:
    edited = decompclip.load("shapes")
    edited.visual.get_parameter("blocks.2.mlp.W_out").zero_()
    again = decompclip.load(save_model(edited, tmp_path))
    x = edited.normalize(IMAGES)
    assert torch.equal(again.encode_image(x), edited.encode_image(x))
    assert not torch.equal(again.encode_image(x), decompclip.load("shapes").encode_image(x))


@torch.no_grad()
def test_open_clip_opens_the_folder(tmp_path: Path) -> None:
    """Of a model with open_clip's own vocabulary."""
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    source = open_clip.CLIP(**architecture).eval()  # pyright: ignore[reportArgumentType]
    hooked = HookedCLIP.from_open_clip(source, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    save_model(hooked, tmp_path)
    theirs: Any = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}", return_transform=False)
    x, tokens = torch.rand(2, 3, 16, 16), hooked.tokenize(["a star", "a ring"])
    torch.testing.assert_close(theirs.encode_image(x), source.encode_image(x))
    torch.testing.assert_close(theirs.encode_text(tokens), source.encode_text(tokens))
    ours = decompclip.load(tmp_path)
    torch.testing.assert_close(ours.encode_image(x), source.encode_image(x), rtol=1e-4, atol=1e-5)


PLAIN = """
import json, sys, numpy as np, open_clip, torch
from PIL import Image
where = "local-dir:" + sys.argv[1]
model, _, preprocess = open_clip.create_model_and_transforms(where)
tokenizer, texts = open_clip.get_tokenizer(where), json.loads(sys.argv[2])
picture = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
with torch.no_grad():
    tokens = tokenizer(texts)
    found = [model.eval().encode_text(tokens), model.encode_image(preprocess(picture)[None])]
assert "decompclip" not in sys.modules
print(json.dumps([tokens.tolist(), *(x.tolist() for x in found)]))
"""
TEXTS = ["a star", "A photo of a RED ring, at the top-left!", "", "zebra  star\n9", "a " * 40, "Ünï star"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:words unknown", "ignore:.*were cut")
def test_plain_open_clip_reads_a_vocabulary_of_the_model_s_own(tmp_path: Path, model: HookedCLIP) -> None:
    folder = save_model(model, tmp_path / "mine")
    elsewhere = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=elsewhere,
    )
    assert run.returncode == 0, run.stderr
    tokens, texts, image = json.loads(run.stdout)
    assert tokens == model.tokenize(TEXTS).tolist()
    torch.testing.assert_close(torch.tensor(texts), model.encode_text(TEXTS))
    picture = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
    torch.testing.assert_close(torch.tensor(image), model.encode_image(model.preprocess(picture)[None]))
    again = decompclip.load(save_model(decompclip.load(folder), tmp_path / "again"))
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path, model: HookedCLIP) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(model, tmp_path / "file")


def test_where_it_comes_from_is_kept(tmp_path: Path, model: HookedCLIP) -> None:
    config = json.loads((save_model(model, tmp_path) / "open_clip_config.json").read_text())
    assert config["decompclip"]["provenance"]["name"] == "shapes"


# models of elsewhere

SIDE = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}


def hugging_face(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    vision = {**SIDE, "image_size": 32, "patch_size": 8}
    words = {**SIDE, "vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 98}
    if kind == "vision":
        return transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**vision, projection_dim=16)
        )
    if kind == "CLIP":
        config = transformers.CLIPConfig(vision_config=vision, text_config=words, projection_dim=16)
        return transformers.CLIPModel(config)
    if kind == "SiglipVision":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    config = transformers.SiglipConfig(vision_config=vision, text_config={**words, "projection_size": 32})
    return transformers.SiglipModel(config)


def assert_the_same(one: decompclip.HookedCLIP, other: decompclip.HookedCLIP) -> None:
    images = torch.randn(2, 3, *one.image_size)
    assert other.image_size == one.image_size
    assert torch.equal(one.encode_image(images), other.encode_image(images))
    assert other.preprocess_cfg == one.preprocess_cfg
    if not hasattr(one.text, "why"):
        ids = torch.randint(1, 39, (2, one.context_length))
        assert torch.equal(one.encode_text(ids), other.encode_text(ids))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "vision", "SiglipVision"])
def test_a_model_of_transformers_is_saved_and_opened_again(kind: str, where: str, tmp_path: Path) -> None:
    theirs = hugging_face(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model = decompclip.load(tmp_path / "theirs" if where == "folder" else theirs)
    save_model(model, tmp_path / "ours")
    assert_the_same(model, decompclip.load(tmp_path / "ours"))


def test_a_processor_s_steps_are_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hugging_face("CLIP").save_pretrained(tmp_path / "theirs")
    crop = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 37}, crop_size=crop)
    processor.save_pretrained(tmp_path / "theirs")
    model = decompclip.load(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    again = decompclip.load(tmp_path / "ours")
    assert model.preprocess_cfg.steps is not None
    assert again.preprocess_cfg == model.preprocess_cfg


WORDS = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
TOWER = {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16}
NATIVE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "QuickGELU": ({}, {}, {"quick_gelu": True}),
    "another size": ({"image_size": [48, 32]}, {}, {}),
    "patch dropout": ({"patch_dropout": 0.25}, {}, {}),
    "tanh": ({"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}}, {}),
    "mean pool": ({"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, {}, {}),
    "layer scale": ({"ls_init_value": 0.1}, {"ls_init_value": 0.1}, {}),
    "odd widths": ({"mlp_ratio": 4.3637}, {"mlp_ratio": 1.3}, {}),
    "another epsilon": ({"norm_kwargs": {"eps": 1e-6}}, {"norm_kwargs": {"eps": 1e-6}}, {}),
    "custom text": (
        {},
        {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        {"custom_text": True},
    ),
    "logit bias": ({}, {}, {"init_logit_bias": -10.0, "nonscalar_logit_scale": True}),
}


@pytest.mark.parametrize("said", [None, "of another"])
@pytest.mark.parametrize("what", NATIVE)
def test_a_model_of_open_clip_in_memory_is_saved_as_it_is(
    what: str, said: str | None, tmp_path: Path
) -> None:
    vision, text, top = NATIVE[what]
    theirs: Any = build_open_clip(
        {"embed_dim": 16, **top, "vision_cfg": {**TOWER, **vision}, "text_cfg": {**WORDS, **text}}
    )
    model = decompclip.load(theirs)
    if said:  # what a user took for the model's configuration
        model.architecture = {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": WORDS}
    save_model(model, tmp_path)
    again = decompclip.load(tmp_path)
    assert_the_same(model, again)
    assert type(again.to_open_clip().get_submodule("visual.patch_dropout")) is type(
        theirs.visual.patch_dropout
    )


def test_what_no_configuration_builds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    theirs: Any = build_open_clip({"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": WORDS})
    model = decompclip.load(theirs)
    model.text.get_submodule("transformer.resblocks.0.mlp").gelu = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"none does \(transformer.resblocks.0.mlp.gelu: \('ReLU'"):
        save_model(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("size", [48, 16])
def test_positions_are_interpolated_as_open_clip_does(size: int, tmp_path: Path) -> None:
    architecture = {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": WORDS}
    theirs: Any = build_open_clip(architecture)
    decompclip.save_model(decompclip.load(theirs), tmp_path)
    model = decompclip.load(tmp_path, image_size=size)
    wanted = dict(theirs.state_dict())
    larger: Any = build_open_clip({**architecture, "vision_cfg": {**TOWER, "image_size": size}})
    resize_pos_embed(wanted, larger)
    larger.load_state_dict(wanted)
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(model.encode_image(images), larger.eval().encode_image(images))
    assert model.provenance["image_size"] == (
        f"{size} x {size}, as asked for; positions interpolated (bicubic) from 32 x 32"
    )
    decompclip.save_model(model, tmp_path / "larger")
    assert decompclip.load(tmp_path / "larger").image_size == (size, size)


@pytest.mark.filterwarnings(
    "ignore:.*say how images are prepared:UserWarning", "ignore:.*tokenizer:UserWarning"
)
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_folder_of_transformers_takes_another_size(kind: str, tmp_path: Path) -> None:
    hugging_face(kind).save_pretrained(tmp_path)
    model = decompclip.load(tmp_path, image_size=48, text=False)
    assert model.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, model.cfg.d_embed)
    assert "from 32 x 32" in model.provenance["image_size"]


def test_a_checkpoint_of_another_size_names_the_option(tmp_path: Path) -> None:
    theirs: Any = decompclip.load("shapes").to_open_clip()
    state = theirs.state_dict()
    table = state["visual.positional_embedding"]
    state["visual.positional_embedding"] = torch.cat([table, table[:28]])  # 8 x 8 patches for 6 x 6
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError, match="pass image_size=64 to load it so, or image_size=48 to interpolate"
    ):
        decompclip.load("shapes", checkpoint=tmp_path / "weights.pt")
    for size in (64, 48):
        model = decompclip.load("shapes", checkpoint=tmp_path / "weights.pt", image_size=size)
        assert model.image_size == (size, size)
