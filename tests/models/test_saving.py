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
from PIL import Image

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
