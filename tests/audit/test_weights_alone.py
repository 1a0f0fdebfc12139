"""What a report says of weights alone is what `compare_checkpoints` finds; what cannot be compared is said, and no error."""

from __future__ import annotations

import copy

import pytest
import torch

from decompclip.audit.components import SHOWN, weights_alone
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.models.text import ImageOnly
from decompclip.operators.checkpoints import compare_checkpoints


@pytest.fixture(scope="module")
def clean() -> HookedCLIP:
    return load_bundled("shapes")


def test_it_says_what_compare_checkpoints_finds(clean: HookedCLIP) -> None:
    twin = load_bundled("shapes-sig")
    said, found = weights_alone(twin, clean, clean.class_names), compare_checkpoints(twin, clean)
    assert found.classes is not None
    assert [entry["class"] for entry in said.classes] == list(found.classes.order[:SHOWN])
    assert said.lead == found.classes.lead
    most = found.top(SHOWN)
    assert [entry["part"] for entry in said.parts] == [
        f"MLP {part.layer}" if part.head is None else f"head {part.layer}.{part.head}" for part in most.parts
    ]
    assert [entry["change"] for entry in said.parts] == pytest.approx(most.change.tolist())
    assert said.text_change == found.text_change
    first, second = said.classes[:2]
    assert f"along “{first['class']}”, {first['score'] / second['score']:.2f} times" in said.in_short


def test_the_same_weights_put_no_class_first(clean: HookedCLIP) -> None:
    said = weights_alone(copy.deepcopy(clean), clean, clean.class_names)
    assert said.lead == 1 and "No class stands first." in said.in_short


def test_two_classes_are_not_ranked(clean: HookedCLIP) -> None:
    said = weights_alone(load_bundled("shapes-sig"), clean, ("star", "ring"), name="the clean one")
    assert said.reference == "the clean one"
    assert said.classes == () and said.lead is None and len(said.parts) == SHOWN
    assert "fewer than 3 are known" in said.in_short


def test_what_cannot_be_compared_is_said(clean: HookedCLIP) -> None:
    alone = copy.deepcopy(clean)
    alone.text = ImageOnly(torch.nn.Identity(), torch.tensor(1.0), why="loaded with text=False")
    for model, why in ((load_bundled("cifar10"), "of one architecture"), (alone, "text")):
        said = weights_alone(model, clean, clean.class_names)
        assert said.parts == said.classes == () and why in said.left_out
        assert said.in_short.startswith("Not compared: ")
