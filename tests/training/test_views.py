"""Second views: seeded, mild, and each image's or text's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from decompclip.training.recipes import image_view, text_view, text_views

IMAGES = torch.rand(6, 3, 16, 12, generator=torch.Generator().manual_seed(0))
TEXT: str = "a small red cat on a large white table near the window"


def test_an_image_view_is_an_image_and_seeded() -> None:
    view = image_view(IMAGES, seed=1)
    assert view.shape == IMAGES.shape
    assert view.min() >= 0 and view.max() <= 1
    assert torch.equal(view, image_view(IMAGES, seed=1))
    assert not torch.equal(view, image_view(IMAGES, seed=2))
    assert not torch.equal(view, IMAGES)


def test_each_image_gets_its_own_draw() -> None:
    view = image_view(IMAGES[:1].expand(6, 3, 16, 12), seed=0)
    assert all(not torch.equal(view[0], view[k]) for k in range(1, 6))


def test_an_image_view_shows_the_same_picture() -> None:
    """A bright half stays bright, on the same or, flipped, on the other side."""
    half = torch.zeros(200, 3, 16, 16)
    half[..., :8] = 0.6
    view = image_view(half, seed=0).mean(dim=1)
    left, right = view[..., :3].mean(dim=(1, 2)), view[..., -3:].mean(dim=(1, 2))
    assert ((left - right).abs() > 0.3).all()
    assert 60 < int((left < right).sum()) < 140


@pytest.mark.parametrize("seed", range(12))
def test_a_text_view_moves_or_drops_a_word(seed: int) -> None:
    view = text_view(TEXT, seed=seed)
    assert view != TEXT or Counter[str](view.split()) == Counter[str](TEXT.split())  # a swap of equal words
    lost = Counter[str](TEXT.split()) - Counter[str](view.split())
    assert not Counter[str](view.split()) - Counter[str](TEXT.split())
    assert sum(lost.values()) in (0, 1)
    assert view == text_view(TEXT, seed=seed)


def test_synonyms_replace_and_are_inserted() -> None:
    views = [text_view("the cat sleeps", seed=seed, synonyms={"cat": ["kitten"]}) for seed in range(40)]
    assert "the kitten sleeps" in views
    assert any(view.count("cat") == 1 and "kitten" in view and len(view.split()) == 4 for view in views)
    assert any(len(view.split()) == 2 for view in views)  # a deletion
    assert {word for view in views for word in view.split()} == {"the", "cat", "sleeps", "kitten"}


def test_a_word_alone_stays() -> None:
    assert {text_view("cat", seed=seed) for seed in range(10)} == {"cat"}
    assert text_view("", seed=0) == ""


def test_each_text_gets_its_own_draw() -> None:
    views = text_views([TEXT] * 20, seed=3)
    assert views == text_views([TEXT] * 20, seed=3)
    assert len(set(views)) > 5
    assert text_views([], seed=0) == []
