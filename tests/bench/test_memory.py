"""A model with a memory says what the model says, and looks once."""

from __future__ import annotations

import pytest
import torch

from decompclip.bench.measure import Remembering
from decompclip.data.shapes import Shapes
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP

IMAGES = Shapes(12, seed=77).draw(range(12)).images


@pytest.fixture(scope="module")
def plain() -> HookedCLIP:
    return load_bundled("shapes")


def remembering(plain: HookedCLIP) -> Remembering:
    model = Remembering(plain, batch_size=5)
    model.remember(IMAGES[:8])
    return model


def test_it_says_what_the_model_says(plain: HookedCLIP) -> None:
    model, inputs = remembering(plain), plain.normalize(IMAGES)
    with torch.no_grad():
        for some in (inputs[:8], inputs[[3, 1, 3]], inputs[6:10], inputs[9:]):
            torch.testing.assert_close(model.encode_image(some), plain.encode_image(some))
            own = model.encode_image(some, normalize=True)
            torch.testing.assert_close(own, plain.encode_image(some, normalize=True))
            for convention in ("centred", "paper"):
                recalled = model.decompose(some, convention=convention, normalize=True)
                expected = plain.decompose(some, convention=convention, normalize=True)
                assert recalled.convention == convention and recalled.normalized
                torch.testing.assert_close(recalled.coords, expected.coords)
                torch.testing.assert_close(recalled.features, expected.features)


def test_it_looks_once_at_what_it_remembers(plain: HookedCLIP) -> None:
    model, inputs = remembering(plain), plain.normalize(IMAGES)
    for _ in range(3):
        model.encode_image(inputs[:3])
        model.terms(IMAGES[2:8], "centred")
    assert model.looks == 2 * 8  # features, and terms
    model.encode_image(inputs[9:])
    assert model.looks == 2 * 8 + 3
    model.decompose(inputs[:2])  # terms of raw features are not kept
    assert model.looks == 2 * 8 + 3 + 2


def test_asleep_it_looks_again(plain: HookedCLIP) -> None:
    model, inputs = remembering(plain), plain.normalize(IMAGES)
    model.encode_image(inputs[:8])
    with pytest.raises(RuntimeError, match="inside"), model.asleep():
        model.encode_image(inputs[:8])
        assert model.looks == 16
        raise RuntimeError("inside")
    model.encode_image(inputs[:8])
    assert model.looks == 16


def test_it_is_the_same_model(plain: HookedCLIP) -> None:
    model = remembering(plain)
    assert model.visual is plain.visual and model.class_names == plain.class_names
    with torch.no_grad():
        assert torch.equal(model.zero_shot_classifier(), plain.zero_shot_classifier())
