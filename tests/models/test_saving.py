"""A saved model is the same model when it is loaded again, here and by open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import decompclip
from decompclip.models.clip import HookedCLIP
from decompclip.models.saving import save_model

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
    with pytest.raises(ValueError, match=r"open_clip configuration is known.*set model.architecture"):
        save_model(hooked, tmp_path)
    hooked.architecture = architecture
    save_model(hooked, tmp_path)
    theirs: Any = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}", return_transform=False)
    x, tokens = torch.rand(2, 3, 16, 16), hooked.tokenize(["a star", "a ring"])
    torch.testing.assert_close(theirs.encode_image(x), source.encode_image(x))
    torch.testing.assert_close(theirs.encode_text(tokens), source.encode_text(tokens))
    ours = decompclip.load(tmp_path)
    torch.testing.assert_close(ours.encode_image(x), source.encode_image(x), rtol=1e-4, atol=1e-5)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path, model: HookedCLIP) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(model, tmp_path / "file")


def test_where_it_comes_from_is_kept(tmp_path: Path, model: HookedCLIP) -> None:
    config = json.loads((save_model(model, tmp_path) / "open_clip_config.json").read_text())
    assert config["decompclip"]["provenance"]["name"] == "shapes"
