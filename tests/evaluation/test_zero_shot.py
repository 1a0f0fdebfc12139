"""The zero-shot classifier against a text tower that can be worked out by hand."""

from __future__ import annotations

import jaxtyping
import open_clip
import pytest
import torch
from torch import Tensor, nn, tensor
from torch.nn import functional as F

from decompclip.models import zero_shot
from decompclip.models.bundled import load_bundled
from decompclip.models.zero_shot import KEPT, causal, encode_prompts, keep, kept, zero_shot_classifier

NAMES = ["cat", "dog", "teapot", "{}", "eel"]
TEMPLATES = ["a {}", "{not} a photo of a {} or a drawing of a {}", lambda name: f"{name}!"]
TABLE = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))


def tokenize(texts: list[str]) -> Tensor:
    """Character codes, padded."""
    tokens = torch.zeros(len(texts), 64, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = tensor([ord(c) for c in text])
    return tokens


def encode(tokens: Tensor) -> Tensor:
    """The sum of a fixed random vector for each character; far from unit length."""
    return (TABLE[tokens] * (tokens > 0)[..., None]).sum(dim=1)


def test_equals_the_mean_of_unit_features() -> None:
    rows = []
    for name in NAMES:
        texts = [f"a {name}", f"{{not}} a photo of a {name} or a drawing of a {name}", f"{name}!"]
        features = [F.normalize(encode(tokenize([text]))[0], dim=0) for text in texts]
        rows.append(F.normalize(sum(features[1:], features[0]) / 3, dim=0))
    classifier = zero_shot_classifier(encode, tokenize, NAMES, TEMPLATES)
    torch.testing.assert_close(classifier, torch.stack(rows))
    torch.testing.assert_close(classifier.norm(dim=1), torch.ones(len(NAMES)))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 15, 100])
def test_batches_change_nothing_and_are_kept_to(batch_size: int) -> None:
    sizes: list[int] = []

    def counted(tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return encode(tokens)

    classifier = zero_shot_classifier(counted, tokenize, NAMES, TEMPLATES, batch_size=batch_size)
    torch.testing.assert_close(classifier, zero_shot_classifier(encode, tokenize, NAMES, TEMPLATES))
    assert max(sizes) <= batch_size
    assert sum(sizes) == len(NAMES) * len(TEMPLATES)


def test_prompts_are_encoded_once_and_beside_those_of_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are one to the tokenizer are one to the tower, and count for each of their classes."""
    monkeypatch.setattr(zero_shot, "READ", 3)
    lengths: list[list[int]] = []

    def counted(tokens: Tensor) -> Tensor:
        lengths.append((tokens > 0).sum(1).tolist())
        return encode(tokens)

    def blind(texts: list[str]) -> Tensor:
        """Reads every capital as the same letter."""
        return tokenize(["".join("X" if c.isupper() else c for c in text) for text in texts])

    names = ["Ab", "long name", "Bb", "c", "a longer name", "Cb", "Ab Bb", "D", "E"]
    found = zero_shot_classifier(counted, blind, names, TEMPLATES, batch_size=3)
    alone = [zero_shot_classifier(encode, blind, [name], TEMPLATES)[0] for name in names]
    torch.testing.assert_close(found, torch.stack(alone))
    assert torch.equal(found[0], found[2]) and torch.equal(found[7], found[8])
    assert sum(map(len, lengths)) < len(names) * len(TEMPLATES)
    assert all(part == sorted(part) for part in lengths)


def test_classes_in_another_order_give_rows_in_that_order() -> None:
    classifier = zero_shot_classifier(encode, tokenize, NAMES, TEMPLATES)
    turned = zero_shot_classifier(encode, tokenize, NAMES[::-1], TEMPLATES)
    torch.testing.assert_close(turned, classifier.flip(0))


def test_holds_no_gradient() -> None:
    weight = torch.ones(6, requires_grad=True)
    assert not zero_shot_classifier(lambda t: encode(t) * weight, tokenize, NAMES, TEMPLATES).requires_grad


def test_equal_names_are_taken_only_on_request() -> None:
    names = ["missile", "cat", "missile"]
    with pytest.raises(
        ValueError, match="each class name once; received again: 'missile'; tell the classes apart"
    ):
        zero_shot_classifier(encode, tokenize, names, TEMPLATES)
    classifier = zero_shot_classifier(encode, tokenize, names, TEMPLATES, allow_duplicates=True)
    torch.testing.assert_close(classifier[0], classifier[2])


def test_a_model_takes_a_name_twice_where_it_is_told_to() -> None:
    model, names = load_bundled("shapes"), ["star", "ring", "star"]
    for _ in range(2):
        classifier = model.zero_shot_classifier(names, allow_duplicates=True)
        torch.testing.assert_close(classifier, model.zero_shot_classifier(["star", "ring"])[[0, 1, 0]])
        with pytest.raises(ValueError, match="each class name once; received again: 'star'"):
            model.zero_shot_classifier(names)


@pytest.mark.parametrize(
    ("names", "templates", "words"),
    [
        ([], TEMPLATES, "at least one class name; received an empty list; check the class file"),
        (NAMES, [], "at least one template; received none; the plainest"),
        (NAMES, ["a {}", "a photo"], "a slot {} for the class's name in every template; received 'a photo'"),
        ("cat", TEMPLATES, "expected a list of class names; received the single string 'cat'"),
        (["cat", " "], TEMPLATES, "expected class names in words; received ' '; name every class"),
        (["cat", 5], TEMPLATES, "expected class names in words; received 5"),
        (NAMES, "a {}", "expected a list of templates; received the single string 'a {}'"),
    ],
)
def test_wrong_input_is_named(
    monkeypatch: pytest.MonkeyPatch, names: list[str], templates: list[str], words: str
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=words):
        zero_shot_classifier(encode, tokenize, names, templates)


@torch.no_grad()
@pytest.mark.parametrize("pooling", [{}, {"pool_type": "eos", "eos_id": 49}])
def test_what_stands_behind_the_end_is_left_out(pooling: dict) -> None:
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    words = {"context_length": 40, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2, **pooling}
    text = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=words).eval().double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in text.parameters():  # positions too, which open_clip starts near zero
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tokens = torch.randint(1, 49, (3, 40), generator=generator)
    for row, end in enumerate((4, 9, 6)):
        tokens[row, end], tokens[row, end + 1 :] = 49, 0
    assert causal(text)
    expected, lengths = text.encode_text(tokens), []
    text.transformer.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    torch.testing.assert_close(encode_prompts(text, tokens), expected)
    assert lengths == [10]
    text.register_buffer("attn_mask", None)
    assert not causal(text)


def test_the_classifiers_kept_are_the_last() -> None:
    """One that is kept anew is the newest; none is kept past a change of the weights."""
    text = nn.Linear(3, 2)
    for key in range(KEPT):
        keep(text, key, torch.full((2, 3), float(key)))
    keep(text, 0, torch.ones(2, 3))
    keep(text, "newest", torch.zeros(2, 3))
    found = {key: kept(text, key) for key in (*range(KEPT), "newest")}
    assert [key for key, classifier in found.items() if classifier is None] == [1]
    assert found[0] is not None and torch.equal(found[0], torch.ones(2, 3))
    with torch.no_grad():
        text.weight += 1
    assert kept(text, 0) is None
