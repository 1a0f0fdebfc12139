"""The Shapes world: seeded, complete, and what its attributes say is what its pixels show."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from decompclip.data.shapes import (
    CONTEXT_LENGTH,
    EXTENT,
    PROPERTIES,
    RESOLUTION,
    Attributes,
    Shapes,
    distance_tables,
    draw,
    shapes_captions,
    templates,
    vocabulary,
)
from decompclip.models.text import WordTokenizer


def attributes_of(batch: Attributes) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(batch, name).tolist() for name in PROPERTIES), strict=True))


def test_an_image_depends_on_seed_and_index_alone() -> None:
    whole = draw(range(20), seed=5)
    part = draw([17, 3], seed=5)
    torch.testing.assert_close(part.images, whole.images[[17, 3]], rtol=0, atol=0)
    assert attributes_of(part.attributes) == attributes_of(whole.attributes[torch.tensor([17, 3])])
    assert not torch.equal(draw(range(20), seed=6).images, whole.images)


def test_the_world_is_what_it_says() -> None:
    world = Shapes(100, seed=1)
    assert len(world) == 100
    assert len(PROPERTIES["shape"]) >= 12
    assert world.class_names == PROPERTIES["shape"]
    image, label = world[-1]
    assert image.shape == (3, RESOLUTION, RESOLUTION)
    assert 0 <= image.min() <= image.max() <= 1
    assert label == int(world.draw([99]).labels[0])
    assert [len(batch.labels) for batch in world.batches(64)] == [64, 36]


def test_attributes_do_not_depend_on_the_resolution() -> None:
    large, small = (Shapes(64, seed=2, resolution=r).draw(range(64)) for r in (48, 1))
    assert attributes_of(large.attributes) == attributes_of(small.attributes)


def test_every_value_is_drawn_equally_often() -> None:
    drawn = Shapes(4_000, seed=3, resolution=1).draw(range(4_000)).attributes
    for name, values in PROPERTIES.items():
        counts = torch.bincount(getattr(drawn, name), minlength=len(values))
        expected = 4_000 / len(values)
        assert ((counts - expected).abs() < 5 * expected**0.5).all(), (name, counts)


def test_pixels_show_size_position_and_background() -> None:
    batch = draw(range(600), seed=4)
    size = batch.images.shape[-1]
    corner = batch.images[:, :, :2, :2].mean(dim=(1, 2, 3))
    brightness = [
        corner[batch.attributes.background == value].mean() for value in (0, 1, 2)
    ]  # white grey black
    assert brightness[0] > 0.9 > 0.6 > brightness[1] > 0.4 > 0.1 > brightness[2]

    ground = batch.images[:, :, :1, :1].mean(dim=(2, 3), keepdim=True)
    inside = ((batch.images - ground).abs().amax(dim=1) > 0.25).double()
    area = inside.mean(dim=(1, 2))
    areas = [area[batch.attributes.size == value].mean() for value in range(3)]
    assert areas[0] < areas[1] < areas[2]

    axis = torch.linspace(-0.5, 0.5, size, dtype=torch.double)
    x = (inside.sum(1) * axis).sum(1) / inside.sum((1, 2)).clamp_min(1)
    left, right = (x[batch.attributes.position == value].mean() for value in (0, 1))
    assert left < -0.05 < 0.05 < right


def test_silhouettes_are_distinct() -> None:
    inside = distance_tables(PROPERTIES["shape"])[:, 0] < 0
    axis = torch.linspace(-EXTENT, EXTENT, inside.shape[-1])
    assert not inside[:, axis.abs() > 1.2].any(), "every silhouette lies within its table"
    for i in range(len(inside)):
        for j in range(i):
            overlap = (inside[i] & inside[j]).sum() / (inside[i] | inside[j]).sum()
            assert overlap < 0.85, (PROPERTIES["shape"][i], PROPERTIES["shape"][j])


def test_an_index_out_of_range_is_refused() -> None:
    world = Shapes(10)
    with pytest.raises(IndexError, match="image 10 of a Shapes world of 10 images"):
        world[10]
    with pytest.raises(IndexError, match=r"indices 3\.\.11 of a Shapes world of 10 images"):
        world.draw([3, 11])


def test_captions_tell_the_truth_and_are_seeded() -> None:
    drawn = draw(range(300), seed=0, resolution=1)
    texts = shapes_captions(drawn.attributes, drawn.indices.tolist(), seed=1)
    assert texts == shapes_captions(drawn.attributes, drawn.indices.tolist(), seed=1)
    assert texts != shapes_captions(drawn.attributes, drawn.indices.tolist(), seed=2)
    for row, text in enumerate(texts):
        words = drawn.attributes.words(row)
        for name, values in PROPERTIES.items():
            named = [value for value in values if re.search(rf"\b{value}\b", text)]
            assert named in ([], [words[name]]), (text, words)
    named = sum(drawn.attributes.words(row)["shape"] in text for row, text in enumerate(texts))
    assert named / len(texts) > 0.8


def test_the_vocabulary_covers_captions_and_templates() -> None:
    tokenize = WordTokenizer(vocabulary(), CONTEXT_LENGTH)
    drawn = draw(range(300), seed=0, resolution=1)
    prompts = [
        t.replace("{}", v) for name, values in PROPERTIES.items() for t in templates(name) for v in values
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tokenize(shapes_captions(drawn.attributes, drawn.indices.tolist(), seed=0) + prompts)
    assert tokens.shape[1] == CONTEXT_LENGTH
    assert (tokens.argmax(dim=1) == (tokens != 0).sum(dim=1) - 1).all(), "the largest id is the last token"
