"""Labelled images by a word or a path, and parts of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from decompclip.data.images import FolderSource
from decompclip.data.pairs import SubsetPairs
from decompclip.data.photos import CIFAR10_CLASSES
from decompclip.data.shapes import PROPERTIES, Shapes, ShapesBatch, ShapesPairs
from decompclip.data.sources import classes_of, open_labelled

SHAPES = PROPERTIES["shape"]


def test_the_world_is_drawn_at_the_model_s_size() -> None:
    def batch(spec: str, **options: Any) -> ShapesBatch:
        source = open_labelled(spec, (32, 32), SHAPES, **options)
        assert isinstance(source, Shapes)
        return next(iter(source.batches(7)))

    drawn = batch("shapes:7")
    assert drawn.images.shape == (7, 3, 32, 32)
    other = batch("shapes", limit=7, seed=1)
    assert not torch.equal(drawn.images, other.images)
    assert (classes_of("shapes:7"), classes_of("cifar10"), classes_of("some/folder")) == (
        SHAPES,
        CIFAR10_CLASSES,
        (),
    )


def test_a_folder_brings_labels_in_the_order_of_the_classes(tmp_path: Path) -> None:
    for name in ("ring", "star"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((20, 30, 3), 200 if name == "star" else 20, np.uint8)).save(
            tmp_path / name / "a.png"
        )
    source = open_labelled(str(tmp_path), (16, 16), ("star", "ring"), limit=None)
    assert isinstance(source, FolderSource)
    batch = next(iter(source.batches(4)))
    assert batch.labels is not None
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.labels.tolist() == [1, 0]
    assert batch.images[1].min() > 0.7 > 0.1 > batch.images[0].max()


@pytest.mark.parametrize(
    ("spec", "size", "classes", "message"),
    [
        ("shapes:x", (32, 32), SHAPES, r"shapes:N with a number N of images; received shapes:x"),
        ("shapes", (32, 16), SHAPES, r"square images for shapes; received 32 x 16"),
        (
            "shapes",
            (32, 32),
            ("cat", "dog"),
            r"the 12 classes of shapes, circle.*received 2: cat, dog; leave --classes out",
        ),
        ("cifar10", (32, 32), ("cat", "dog"), r"the 10 classes of cifar10, airplane"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    spec: str, size: tuple[int, int], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_labelled(spec, size, classes)
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        open_labelled("no/such/folder", (16, 16), ("a", "b"))


def test_a_part_of_pairs_is_called_as_in_the_whole() -> None:
    whole = ShapesPairs(20, seed=3)
    part = SubsetPairs(whole, [4, 9, 2], order_seed=5)
    assert (len(part), part.class_names, part.templates) == (3, whole.class_names, whole.templates)
    assert list(part.ids) == [whole.ids[i] for i in (4, 9, 2)]
    read, there = part.read([1, 2]), whole.read([9, 2])
    assert torch.equal(read.images, there.images)
    assert (read.captions, read.ids) == (there.captions, there.ids)
    assert read.labels is not None and there.labels is not None and torch.equal(read.labels, there.labels)
    with pytest.raises(IndexError, match=r"places in 0..19; received 20"):
        SubsetPairs(whole, [20])
