"""Bundled models: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file

from decompclip.models.bundled import bundled, card, load_bundled, write_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import CheckpointError, UnknownModelError
from decompclip.models.spec import build_open_clip

WORDS = ["a", "blue", "ring", "star"]
ARCHITECTURE = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": len(WORDS) + 4, "width": 16, "heads": 2, "layers": 1},
}
CARD: dict[str, Any] = {
    "name": "tiny",
    "architecture": ARCHITECTURE,
    "tokenizer": {"words": WORDS, "context_length": 8},
    "preprocess": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "size": 16,
        "interpolation": "bilinear",
    },
    "templates": {"shape": ["{}", "a {}"]},
    "class_names": ["ring", "star"],
    "backdoor": None,
}


@pytest.fixture
def model() -> CLIP:
    model = build_open_clip(ARCHITECTURE, seed=3).eval()
    assert isinstance(model, CLIP)
    return model


@torch.no_grad()
def same_features(found: HookedCLIP, source: CLIP, *, tolerance: float) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = found.tokenize(["a blue ring", "a star"])
    torch.testing.assert_close(
        found.encode_image(images), source.encode_image(images), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        found.encode_text(tokens), source.encode_text(tokens), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.float32, 1e-5)])
def test_what_is_written_is_read_as_fp32(
    tmp_path: Path, model: CLIP, dtype: torch.dtype, tolerance: float
) -> None:
    written = write_bundled(model, CARD, tmp_path, dtype=dtype)
    assert {value.dtype for value in load_file(tmp_path / "tiny.safetensors").values()} == {dtype}
    found = load_bundled("tiny", folder=tmp_path)
    assert found.dtype == torch.float32
    same_features(found, model, tolerance=tolerance)
    assert found.cfg.activation == "quick_gelu"
    assert found.provenance["sha256"] == written["sha256"]
    assert found.provenance["pretrained"] == "bundled"
    assert (found.class_names, found.templates) == (("ring", "star"), {"shape": ("{}", "a {}")})
    assert (found.mean, found.image_size) == ((0.5, 0.5, 0.5), (16, 16))
    assert found.zero_shot_classifier().shape == (2, 12)


def test_the_card_keeps_its_facts_and_gains_the_file_s(tmp_path: Path, model: CLIP) -> None:
    facts = {**CARD, "accuracy": {"shape": 0.98}, "backdoor": {"target": "star", "rate": 0.1}}
    written = write_bundled(model, facts, tmp_path)
    assert card("tiny", tmp_path) == written
    assert {key: written[key] for key in facts} == facts
    assert written["dtype"] == "float16"
    assert written["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_writing_twice_gives_the_same_bytes_and_leaves_no_rest(tmp_path: Path, model: CLIP) -> None:
    write_bundled(model, CARD, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_bundled(model, CARD, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert set(first) == {"tiny.json", "tiny.safetensors"}


def test_only_whole_models_are_listed(tmp_path: Path, model: CLIP) -> None:
    assert bundled(tmp_path) == ()
    write_bundled(model, CARD, tmp_path)
    (tmp_path / "lonely.json").write_text("{}")
    assert bundled(tmp_path) == ("tiny",)
    with pytest.raises(UnknownModelError, match="no bundled model 'lonely' in .*; there are: tiny"):
        load_bundled("lonely", folder=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_other_weights_than_the_card_s_are_refused(tmp_path: Path, model: CLIP, damage: str) -> None:
    write_bundled(model, CARD, tmp_path)
    path = tmp_path / "tiny.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"'tiny' are not those of its card: .* has SHA-256 \w+, expected \w+"
    ):
        load_bundled("tiny", folder=tmp_path)


def test_a_card_of_another_architecture_is_refused(tmp_path: Path, model: CLIP) -> None:
    write_bundled(model, CARD, tmp_path)
    facts = card("tiny", tmp_path)
    facts["architecture"]["embed_dim"] = 14
    (tmp_path / "tiny.json").write_text(json.dumps(facts))
    with pytest.raises(
        CheckpointError, match=r"does not fit tiny: .* visual.proj expected \[16, 14\], got \[16, 12\]"
    ):
        load_bundled("tiny", folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"the model does not fit tiny \(its card\)"):
        write_bundled(model, facts, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../tiny"}, "expected a name of lower-case letters, digits and hyphens, got '../tiny'"),
        ({"name": "Tiny"}, "expected a name of lower-case letters"),
    ],
)
def test_a_name_that_is_no_plain_file_is_refused(
    tmp_path: Path, model: CLIP, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_bundled(model, CARD | changes, tmp_path)


def test_a_card_without_a_field_is_refused(tmp_path: Path, model: CLIP) -> None:
    facts = {key: value for key, value in CARD.items() if key not in ("templates", "tokenizer")}
    with pytest.raises(
        ValueError, match="the card lacks tokenizer, templates; needed are name, architecture"
    ):
        write_bundled(model, facts, tmp_path)


@torch.no_grad()
def test_weights_too_large_for_fp16_are_refused(tmp_path: Path, model: CLIP) -> None:
    model.visual.get_parameter("proj")[0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"1 weights are not finite in torch.float16, first visual.proj; pass torch.float32"
    ):
        write_bundled(model, CARD, tmp_path)
    assert not list(tmp_path.iterdir())
