"""Prompts of many classes: each once, no further than they reach, and kept while the text tower is as it was."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch.nn import functional as F

import decompclip
from decompclip.models.clip import HookedCLIP
from decompclip.models.spec import build_open_clip
from decompclip.models.zero_shot import causal, zero_shot_classifier

NAMES = ["cat", "a very long name of a dog that takes many words", "eel"]


@pytest.fixture
def model() -> HookedCLIP:
    net = build_open_clip(
        {
            "embed_dim": 16,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        }
    )
    return decompclip.load(net)


def watched(model: HookedCLIP) -> list[torch.Size]:
    """The shapes of what goes through the text tower from now on."""
    shapes: list[torch.Size] = []
    transformer: Any = model.text.get_submodule("transformer")
    transformer.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    return shapes


def test_the_features_are_those_of_whole_texts(model: HookedCLIP) -> None:
    assert causal(model.text)
    own = zero_shot_classifier(model.encode_text, model.tokenize, NAMES, open_clip.OPENAI_IMAGENET_TEMPLATES)
    torch.testing.assert_close(model.zero_shot_classifier(NAMES), own, rtol=1e-4, atol=1e-5)


def test_eos_pooling_too(model: HookedCLIP) -> None:
    text: Any = model.text
    text.text_pool_type, text.text_eos_id = "eos", 49407
    own = zero_shot_classifier(model.encode_text, model.tokenize, NAMES, ["a {}"])
    torch.testing.assert_close(model.zero_shot_classifier(NAMES, ["a {}"]), own, rtol=1e-4, atol=1e-5)


def test_one_pass_in_big_batches_over_what_the_texts_reach(model: HookedCLIP) -> None:
    shapes = watched(model)
    names = [f"thing {i}" for i in range(20)]
    model.zero_shot_classifier(names, [f"{word} {{}}" for word in "abcdefghijklmnopqrst"])
    assert [shape[0] for shape in shapes] == [256, 144]
    assert max(shape[1] for shape in shapes) <= 6  # start, letter, thing, number, end
    model.zero_shot_classifier(names, [f"{word} {{}}" for word in "abcdefghijklmnopqrst"])
    assert len(shapes) == 2
    told: list[tuple[str, int]] = []
    track: Any = lambda items, what, total: told.append((what, total)) or iter(items)  # noqa: E731
    model.zero_shot_classifier(names, [f"{word} {{}}" for word in "tsrqponmlkjihgfedcba"], track=track)
    assert told == [("texts of 20 classes", 2)]


@pytest.mark.parametrize("change", ["step", "data", "tokenizer", "names"])
def test_what_changed_is_encoded_again(model: HookedCLIP, change: str) -> None:
    before = model.zero_shot_classifier(NAMES, ["a {}"])
    before.zero_()  # the caller's own
    shapes = watched(model)
    names = NAMES
    projection = model.text.get_parameter("text_projection")
    if change == "step":
        with torch.no_grad():
            projection.mul_(torch.linspace(1, 2, projection.shape[1]))
    elif change == "data":
        projection.data.copy_(projection.data.flip(0))
    elif change == "tokenizer":
        model.tokenizer = lambda texts: open_clip.get_tokenizer("ViT-B-32")(texts)
    else:
        names = NAMES[::-1]
    found = model.zero_shot_classifier(names, ["a {}"])
    assert len(shapes) == 1
    wanted = F.normalize(model.encode_text([f"a {name}" for name in names], normalize=True), dim=-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [3, 4])
def test_equal_prompts_are_encoded_once_and_progress_is_told(batch_size: int) -> None:
    told: list[tuple[str, int]] = []
    counted: list[int] = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        counted.append(len(texts))
        return torch.tensor([[len(text), ord(text[-1])] for text in texts])

    def track(items: Any, description: str, total: int) -> Any:
        told.append((description, total))
        return iter(items)

    templates = ["the {}", "the {}", lambda name: "same for all"]
    found = zero_shot_classifier(
        lambda tokens: tokens.float(),
        tokenize,
        ["a", "b", "c"],
        templates,
        batch_size=batch_size,
        track=track,
    )
    assert sum(counted) == 4
    one_batch = batch_size >= 4  # of which there is nothing to tell
    assert told == ([] if one_batch else [("texts of 3 classes", 2)])
    plain = F.normalize(torch.tensor([[5.0, ord("a")], [5, ord("a")], [12, ord("l")]]), dim=-1).mean(0)
    torch.testing.assert_close(found[0], F.normalize(plain, dim=0))
