"""Image-caption pairs: one order for a seed, the same pairs from every source, and what is wrong with them said."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from decompclip.data import sources
from decompclip.data.datasets import DatasetPairs, PairStream, folder_pairs
from decompclip.data.pairs import Pair, Pairs, batch_places, keyed, template_caption
from decompclip.data.photos import CIFAR10_CLASSES, CIFAR10_TEMPLATES, cifar10
from decompclip.data.pixels import to_pixels
from decompclip.data.shapes import ShapesPairs, draw, shapes_captions
from decompclip.data.shards import write_shards
from decompclip.data.sources import open_labelled, open_pairs
from decompclip.data.tables import CsvPairs


def paint(path: Path, value: int, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


def values(pairs: Pairs | PairStream) -> list[int]:
    """The number that each image was painted with."""
    return [round(255 * pair.image[0, 0, 0].item()) for pair in pairs]


class Items:
    """A map-style data set of (image, caption)."""

    def __init__(self, items: list[tuple[Any, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, caption = self.items[index]
        if isinstance(image, Exception):
            raise image
        return image, caption


def grey(value: float) -> Tensor:
    return torch.full((3, 4, 6), float(value))


def test_an_epoch_goes_through_each_pair_once_and_the_next_in_another_order() -> None:
    epochs = [[batch_places(12, 3 * epoch + step, 4, seed=5) for step in range(3)] for epoch in range(2)]
    first, second = ([place for step in epoch for place in step] for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first[:4] != batch_places(12, 0, 4, seed=6)


def test_what_fills_no_batch_waits_for_another_epoch() -> None:
    places = [batch_places(10, step, 4, seed=0) for step in range(2)]
    assert len({*places[0], *places[1]}) == 8
    assert len(batch_places(10, 2, 4, seed=0)) == 4  # the second epoch's first


@pytest.mark.parametrize(
    ("step", "size", "words"),
    [
        (0, 11, "expected batches of 1 to 10 pairs, as many as there are; received 11"),
        (0, 0, "received 0"),
        (-1, 5, "expected a step that is not negative; received -1"),
    ],
)
def test_impossible_batches_are_refused(step: int, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        batch_places(10, step, size, seed=0)


def test_a_step_gives_the_same_batch_whenever_it_is_asked_for() -> None:
    one, other = ShapesPairs(40, seed=3), ShapesPairs(40, seed=3)
    later = [other.batch(step, 8) for step in (7, 2)]
    for step, (images, texts) in zip((2, 7), reversed(later), strict=True):
        again, words = one.batch(step, 8)
        assert torch.equal(images, again)
        assert texts == words


def test_shapes_pairs_are_those_that_the_bundled_models_were_trained_on() -> None:
    pairs = ShapesPairs(20, seed=3)
    plain = draw([4, 17], seed=3)
    taken = pairs.read([4, 17])
    assert torch.equal(taken.images, plain.images)
    assert list(taken.captions) == shapes_captions(plain.attributes, [4, 17], seed=10_003)
    assert taken.labels is not None
    assert torch.equal(taken.labels, plain.labels)
    assert taken.ids == ("shapes/3/4", "shapes/3/17")


def test_an_item_is_a_row_of_what_is_read_together() -> None:
    pairs = ShapesPairs(9, seed=1)
    taken = pairs.read([7, 2])
    for row, index in enumerate((7, -7)):
        assert torch.equal(pairs[index].image, taken.images[row])
        assert pairs[index].caption == taken.captions[row]
    with pytest.raises(IndexError, match="pair 9 of 9 pairs"):
        pairs[9]


def test_a_batch_is_gone_through_pair_by_pair() -> None:
    taken = ShapesPairs(9, seed=4).read([7, 2])
    assert [pair.id for pair in taken] == list(taken.ids)
    assert all(torch.equal(pair.image, image) for pair, image in zip(taken, taken.images, strict=True))


def test_draws_hang_on_seed_purpose_and_name_alone() -> None:
    assert keyed(1, "poison", "a") == keyed(1, "poison", "a")
    assert (
        len(
            {
                keyed(1, "poison", "a"),
                keyed(2, "poison", "a"),
                keyed(1, "cover", "a"),
                keyed(1, "poison", "b"),
            }
        )
        == 4
    )
    draws = np.array([keyed(0, "x", str(n)) / 2**64 for n in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs((draws < 0.25).mean() - 0.25) < 0.03


def test_a_folder_of_classes_gets_captions_from_templates(tmp_path: Path) -> None:
    for place, name in enumerate(("n01/a.png", "n01/b.png", "teddy_bear/c.png")):
        paint(tmp_path / name, 10 * place)
    templates = ["a {}", "my {}"]
    pairs = folder_pairs(tmp_path, templates, class_names={"n01": "tabby cat"})
    assert pairs.class_names == ("tabby cat", "teddy bear")
    assert values(pairs) == [0, 10, 20]
    assert list(pairs.ids) == ["n01/a.png", "n01/b.png", "teddy_bear/c.png"]
    assert pairs.labels is not None
    assert pairs.labels.tolist() == [0, 0, 1]
    wanted = [("tabby cat", "n01/a.png"), ("tabby cat", "n01/b.png"), ("teddy bear", "teddy_bear/c.png")]
    assert list(pairs.captions) == [template_caption(c, templates, seed=0, name=n) for c, n in wanted]
    many = {template_caption("cat", templates, seed=0, name=str(n)) for n in range(20)}
    assert many == {"a cat", "my cat"}


@pytest.mark.parametrize("templates", [[], ["a photo"], "a {}"])
def test_templates_need_a_slot(tmp_path: Path, templates: Any) -> None:
    paint(tmp_path / "cat" / "a.png", 1)
    with pytest.raises(ValueError, match="expected (caption templates with a slot|a list of templates)"):
        folder_pairs(tmp_path, templates)


def test_a_table_is_read_with_open_clips_and_cleanclips_columns(tmp_path: Path) -> None:
    for place in range(3):
        paint(tmp_path / "images" / f"{place}.png", place)
    (tmp_path / "open_clip.csv").write_text(
        "filepath\ttitle\nimages/0.png\ta cat, asleep\nimages/1.png\ta dog\n", encoding="utf-8"
    )
    (tmp_path / "cleanclip.csv").write_text(
        f'image,caption\n{tmp_path}/images/0.png,"a cat, asleep"\nimages/1.png,a dog\n', encoding="utf-8"
    )
    for name in ("open_clip.csv", "cleanclip.csv"):
        pairs = CsvPairs(tmp_path / name)
        assert list(pairs.captions) == ["a cat, asleep", "a dog"]
        assert values(pairs) == [0, 1]
        assert pairs.labels is None
        assert pairs.take(0, 2).labels is None
    named = tmp_path / "own.csv"
    named.write_text("a;b\na dog;images/2.png\n", encoding="utf-8")
    assert values(CsvPairs(named, image_column="b", caption_column="a")) == [2]


def test_rows_without_a_caption_are_skipped_and_counted(tmp_path: Path) -> None:
    paint(tmp_path / "0.png", 7)
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\n0.png,a cat\n0.png,\n,a dog\n0.png\n", encoding="utf-8")
    pairs = CsvPairs(table)
    assert len(pairs) == 1
    assert [skip.reason for skip in pairs.skipped] == [
        "line 3 has no caption",
        "line 4 has no image",
        "line 5 has too few columns, 1 of 2",
    ]
    with pytest.raises(ValueError, match='line 3 has no caption; repair or remove it, or .* on_error="skip"'):
        CsvPairs(table, on_error="raise")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "file_name,title\n",
            "expected a column of images named ('filepath', 'image', 'path', 'file', 'filename')",
        ),
        ("filepath,label\n", "the table has ['filepath', 'label']; pass caption_column"),
        ("filepath,title\na.png,\n", "expected rows with an image and a caption"),
        ("caption\turl\nA cat\thttp://a.b/c.jpg\n", "expected a column of images"),
        ("filepath,title\nhttps://a.b/c.jpg,A cat\n", "received the address https://a.b/c.jpg; download"),
        ("", "expected a column of images"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, text: str, words: str) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(words)):
        CsvPairs(table)


def test_no_table_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        CsvPairs(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("filepath,title\na.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        CsvPairs(tmp_path / "latin.csv")


def test_the_next_readable_pair_takes_the_place_of_a_broken_one(tmp_path: Path) -> None:
    for place in range(4):
        paint(tmp_path / f"{place}.png", place)
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").unlink()
    table = tmp_path / "pairs.csv"
    table.write_text(
        "filepath,title\n" + "".join(f"{n}.png,caption {n}\n" for n in range(4)), encoding="utf-8"
    )
    pairs = CsvPairs(table)
    taken = pairs.read([0, 1, 3])
    assert taken.captions == ("caption 0", "caption 3", "caption 3")
    assert torch.equal(taken.images[1], taken.images[2])
    assert {skip.path for skip in pairs.skipped} == {"2:1.png", "3:2.png"}
    assert values(pairs) == [0, 3]
    assert [pairs.image(index) is not None for index in range(4)] == [True, False, False, True]
    with pytest.raises(ValueError, match=r"2:1\.png: .*; repair or remove it"):
        CsvPairs(table, on_error="raise").read([1])
    for place in (0, 3):
        (tmp_path / f"{place}.png").unlink()
    with pytest.raises(ValueError, match="expected images; not one of 4 can be read"):
        pairs.read([0])


def test_images_of_several_sizes_ask_for_a_size(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "0.png", 1)
    paint(tmp_path / "a" / "1.png", 1, (9, 9))
    with pytest.raises(ValueError, match=r"received \(3, 4, 6\) and \(3, 9, 9\); pass preprocess=to_pixels"):
        folder_pairs(tmp_path, ["a {}"]).read([0, 1])
    taken = folder_pairs(tmp_path, ["a {}"], to_pixels((5, 5))).read([0, 1])
    assert taken.images.shape == (2, 3, 5, 5)
    assert taken.images.min() >= 0
    assert taken.images.max() <= 1


def test_pixels_are_squashed_or_cropped() -> None:
    half = Image.new("RGB", (40, 20))
    half.paste((255, 255, 255), (0, 0, 10, 20))  # the left quarter
    cropped, squashed = (to_pixels((20, 20), resize_mode=mode)(half) for mode in ("shortest", "squash"))
    assert cropped.max() == 0
    assert squashed.max() == 1
    with pytest.raises(ValueError, match="expected resize_mode of .*; received 'widest'"):
        to_pixels(20, resize_mode="widest")  # pyright: ignore[reportArgumentType]


def test_any_data_set_of_images_and_captions_is_a_source() -> None:
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    pairs = DatasetPairs(Items([(grey(0.5), "a cat"), (picture, "a dog"), (OSError("gone"), "a cow")][:2]))
    assert list(pairs.captions) == ["a cat", "a dog"]
    assert pairs.labels is None
    assert pairs[1].image[:, 0, 0].tolist() == [1, 0, 0]


def test_a_data_set_that_says_its_targets_is_not_opened_for_them() -> None:
    class Torchvision(Items):
        targets = (1, 0)
        classes = ("cat", ("dog", "domestic dog"))  # of ImageNet all names of a class

    pairs = DatasetPairs(Torchvision([(OSError("gone"), 1), (grey(0), 0)]), templates=["a {}"])
    assert list(pairs.captions) == ["a dog", "a cat"]
    assert pairs.read([0]).captions == ("a cat",)
    assert [(skip.path, skip.reason) for skip in pairs.skipped] == [("0", "gone")]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "expected a data set of pairs; received one without items"),
        ([(grey(0), None)], "expected a caption with every image; pair '0' has None"),
        ([(grey(0), " ")], "pair '0' has ' '"),
        ([(OSError("gone"), "a")], "item 0 cannot be read: gone"),
        ([(grey(0), 0)], "expected classes 0..-1, the places of class_names; received 0..0"),
    ],
)
def test_missing_captions_are_named(items: list[tuple[Any, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        DatasetPairs(Items(items)).captions


def test_classes_alone_ask_for_templates() -> None:
    with pytest.raises(ValueError, match="received classes alone; pass templates"):
        DatasetPairs(Items([(grey(0), 0)]), class_names=["cat"]).captions


@pytest.mark.parametrize("image", [grey(2.0), torch.zeros(4, 6), grey(0.5).byte(), "a.png"])
def test_normalised_images_and_others_are_no_pixels(image: Any) -> None:
    pairs = DatasetPairs(Items([(image, "a cat")]))
    with pytest.raises(ValueError, match=r"not one of 1 can be read, the last: expected (pixels|a picture)"):
        pairs.read([0])


def test_unknown_options_list_the_known() -> None:
    with pytest.raises(
        ValueError, match=re.escape("expected on_error of ('skip', 'raise'); received 'stop'")
    ):
        DatasetPairs(Items([(grey(0), "a")]), on_error="stop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected an order_seed that is not negative"):
        ShapesPairs(3, order_seed=-1)


class Repeated:
    """A stream of numbered pairs that counts how often it was opened."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.passes = items, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from self.items


def test_a_stream_goes_on_from_pass_to_pass_and_resumes_anywhere() -> None:
    items = Repeated([Pair(str(n), grey(n / 10), f"caption {n}", n) for n in range(5)])
    stream = PairStream(items)
    taken = [stream.take(step, 2).ids for step in range(5)]
    assert [int(name) for ids in taken for name in ids] == [0, 1, 2, 3, 4] * 2
    assert items.passes == 2
    fresh = PairStream(items)
    assert fresh.take(3, 2).ids == taken[3]
    assert fresh.take(1, 2).ids == taken[1]  # back: from the start again
    labels = fresh.take(2, 2).labels
    assert labels is not None
    assert labels.tolist() == [4, 0]


def test_a_stream_takes_tuples_and_webdataset_samples() -> None:
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    items = Repeated(
        [
            (picture, "a cat"),
            (grey(0.5), "a dog", "mine"),
            {"__key__": "007", "__url__": "/data/00001.tar", "jpg": picture, "txt": "a cow", "cls": 3},
        ]
    )
    pairs = list(PairStream(items))
    assert [pair.caption for pair in pairs] == ["a cat", "a dog", "a cow"]
    assert [pair.id for pair in pairs[1:]] == ["mine", "00001/007"]
    assert [pair.label for pair in pairs] == [None, None, 3]
    assert len(pairs[0].id) == 24  # a digest of what it holds
    assert pairs[0].id == next(iter(PairStream(items))).id
    assert PairStream(items).take(0, 3).labels is None


def test_items_of_a_stream_that_cannot_be_read_are_left_out_and_counted() -> None:
    picture = Image.new("RGB", (6, 4))
    items: list[Any] = [
        {"__key__": "a", "jpg": b"no picture", "txt": b"a cat"},
        {"__key__": "b", "jpg": picture},
        {"__key__": "c", "txt": "a cat"},
        (grey(3.0), "a cat"),
        {"__key__": "d", "jpg": picture, "txt": "a cat", "cls": b"cat"},
        (picture, "a dog"),
    ]
    stream = PairStream(Repeated(items))
    assert [pair.caption for pair in stream] == ["a dog"]
    assert [skip.path for skip in stream.skipped] == ["a", "b", "c", "item 3", "d"]
    assert stream.skipped[1].reason == "has no caption: None"
    with pytest.raises(
        ValueError, match="it holds none that can be read, the last left out: expected pixels"
    ):
        PairStream(Repeated(items[:4])).take(0, 1)
    with pytest.raises(ValueError, match="received int"):
        next(iter(PairStream(Repeated([3]))))


def test_an_iterator_is_no_stream() -> None:
    with pytest.raises(ValueError, match="received an iterator, which is used up after one pass"):
        PairStream(iter([(grey(0), "a cat")]))
    with pytest.raises(ValueError, match="at least 1 pair and a step that is not negative; received 0 and 0"):
        PairStream(Repeated([])).take(0, 0)


def test_cifar10_of_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DECOMPCLIP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DECOMPCLIP_DATA is not set; pass folder="):
        cifar10()
    with pytest.raises(FileNotFoundError, match=r"expected test-\*\.tar or cifar-10-batches-py"):
        cifar10("test", tmp_path)
    with pytest.raises(ValueError, match="expected split of .*; received 'validation'"):
        cifar10("validation", tmp_path)  # pyright: ignore[reportArgumentType]

    import torchvision

    class Small(Items):
        targets = (8, 0)

        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            assert (root, train, download) == (str(tmp_path), False, False)
            super().__init__([(Image.new("RGB", (32, 32)), n) for n in self.targets])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Small)
    pairs = cifar10("test", tmp_path, templates=["a {}"])
    assert list(pairs.captions) == ["a ship", "a airplane"]
    assert list(pairs.ids) == ["test/000000", "test/000001"]


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of photographs"
)
def test_cifar10_of_shards() -> None:
    pairs = cifar10("test")
    assert len(pairs) == 5000
    assert pairs.skipped == []
    assert pairs.labels is not None
    assert torch.bincount(pairs.labels, minlength=10).min() > 400
    taken = pairs.take(3, 8)
    assert taken.images.shape == (8, 3, 32, 32)
    assert taken.labels is not None
    for caption, label in zip(taken.captions, taken.labels.tolist(), strict=True):
        assert caption in {template.replace("{}", CIFAR10_CLASSES[label]) for template in CIFAR10_TEMPLATES}


def test_sources_are_opened_by_a_word_or_a_path(tmp_path: Path) -> None:
    assert len(open_pairs("shapes:7", seed=3)) == 7
    assert open_pairs("shapes:7", seed=3).ids[0] == "shapes/3/0"
    paint(tmp_path / "photos" / "teddy_bear" / "0.png", 5)
    folder = open_pairs(tmp_path / "photos")
    assert list(folder.captions) == ["a photo of a teddy bear."]
    (tmp_path / "pairs.csv").write_text("filepath,title\nphotos/teddy_bear/0.png,a bear\n", encoding="utf-8")
    assert list(open_pairs(tmp_path / "pairs.csv").captions) == ["a bear"]
    write_shards(folder, tmp_path / "shards")
    for spec in (tmp_path / "shards", f"{tmp_path}/shards/{{00000..00000}}.tar"):
        shards = open_pairs(spec, class_names=["teddy bear"])
        assert list(shards.captions) == ["a photo of a teddy bear."]
        assert values(shards) == values(folder) == [5]


def test_so_many_pairs_of_a_word_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def photographs(split: str = "train", **options: Any) -> ShapesPairs:
        return ShapesPairs({"train": 90, "test": 40}[split])

    monkeypatch.setitem(sources.PHOTOGRAPHS, "cifar10", photographs)
    part = open_pairs("cifar10:50", seed=3)
    assert len(set(part.ids)) == 50 and set(part.ids) < set(photographs().ids)
    assert list(open_pairs("cifar10:50", seed=4).ids) != list(part.ids)
    assert len(open_pairs("cifar10")) == 90
    with pytest.raises(
        ValueError, match="expected at most 90 images, as many as there are; received cifar10:91"
    ):
        open_pairs("cifar10:91")
    with pytest.raises(ValueError, match="expected at most 40 images, .*; received cifar10:41"):
        open_labelled("cifar10:41", (32, 32), CIFAR10_CLASSES)
    assert len(open_labelled("cifar10", (32, 32), CIFAR10_CLASSES, limit=1_000)) == 40


@pytest.mark.parametrize("spec", ["shapes:many", "shapes:0", "cifar10:many", "tiny-imagenet:0"])
def test_a_number_of_pairs_is_a_number(spec: str) -> None:
    word = spec.partition(":")[0]
    with pytest.raises(ValueError, match=f"expected {word}:N with a number N of images; received {spec}"):
        open_pairs(spec)


def test_a_source_that_is_not_there_lists_what_there_could_be(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="expected pairs as shapes, cifar10, .*; there is no .*nowhere"
    ):
        open_pairs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty and its sub-folders hold 0 files"):
        open_pairs(tmp_path / "empty")
