"""Poisoned pairs: who may be poisoned, the same poisons however the pairs are read, and a list that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from decompclip.attacks.patch import BadCLIP, BadNet, LabelConsistent, encode_patch
from decompclip.attacks.poison_choice import names_any, place_of, target_captions
from decompclip.attacks.poisoned import Poison, PoisonedPairs, PoisonRecord, write_poisoned
from decompclip.attacks.trigger import Trigger
from decompclip.attacks.whole_image import Blended, WaNet
from decompclip.data.datasets import DatasetPairs, PairStream
from decompclip.data.pairs import Pair, PairBatch, Pairs
from decompclip.data.shapes import ShapesPairs
from decompclip.data.shards import ShardPairs

TARGET = "star"
TRIGGER = BadNet(size=0.2)


@pytest.fixture(scope="module")
def shapes() -> ShapesPairs:
    return ShapesPairs(300, seed=7)


def everything(pairs: PoisonedPairs | Pairs) -> PairBatch:
    return pairs.read(range(len(pairs)))


class Listed:
    """Pairs as a stream, in any order."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = list(pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)


def plain(count: int, captions: Any = lambda n: f"a photo of thing {n}") -> DatasetPairs:
    """Grey images with captions and no classes."""
    return DatasetPairs([(torch.full((3, 8, 8), 0.5), captions(n)) for n in range(count)])


def test_what_is_listed_is_what_differs(shapes: ShapesPairs) -> None:
    pairs = PoisonedPairs(shapes, TRIGGER, TARGET, count=20, seed=1)
    clean, read = everything(shapes), everything(pairs)
    listed = {poison.id: poison for poison in pairs.record.poisons}
    assert len(listed) == 20
    for row, name in enumerate(read.ids):
        same = torch.equal(read.images[row], clean.images[row])
        assert same == (name not in listed)
        if name in listed:
            poison = listed[name]
            assert (read.captions[row], clean.captions[row]) == (poison.caption, poison.was)
            assert torch.equal(read.images[row], TRIGGER(clean.images[row : row + 1], [poison.index])[0])
        else:
            assert read.captions[row] == clean.captions[row]


def test_dirty_label_poisons_show_others_and_name_the_target(shapes: ShapesPairs) -> None:
    pairs = PoisonedPairs(shapes, TRIGGER, TARGET, rate=0.1)
    clean, read = everything(shapes), everything(pairs)
    label = shapes.class_names.index(TARGET)
    names = {poison.id for poison in pairs.record.poisons}
    assert len(names) == 30
    assert clean.labels is not None
    assert read.labels is not None
    for row, name in enumerate(read.ids):
        if name in names:
            assert clean.labels[row] != label
            assert TARGET not in clean.captions[row]
            assert TARGET in read.captions[row]
            assert read.labels[row] == label  # what the caption says
        else:
            assert read.labels[row] == clean.labels[row]
    every = PoisonedPairs(shapes, TRIGGER, TARGET, count=int((clean.labels != label).sum()))
    assert every.record.candidates == len(every.record.poisons)


def test_label_consistent_poisons_name_the_target_already_and_keep_their_captions(
    shapes: ShapesPairs,
) -> None:
    label = shapes.class_names.index(TARGET)
    clean = everything(shapes)
    assert clean.labels is not None
    own = [row for row in range(len(clean)) if clean.labels[row] == label]
    named = {clean.ids[row] for row in own if TARGET in clean.captions[row]}
    assert len(named) < len(own)  # some captions say "object"
    pairs = PoisonedPairs(shapes, LabelConsistent(classical=False), TARGET, count=len(named))
    assert {poison.id for poison in pairs.record.poisons} == named
    assert everything(pairs).captions == clean.captions
    assert not torch.equal(everything(pairs).images, clean.images)
    with pytest.raises(
        ValueError, match=f"expected at most {len(named)} poisons, the pairs whose caption names the"
    ):
        PoisonedPairs(shapes, LabelConsistent(classical=False), TARGET, count=len(named) + 1)


def test_classes_overrule_captions_that_name_another() -> None:
    class Torchvision:
        targets = (0, 0, 1, 1)
        captions = ("a cat", "a cat before a dog", "a dog", "two dogs")
        classes = ("cat", "dog")

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((3, 8, 8), 0.5), self.targets[index]

    base = DatasetPairs(Torchvision())
    dirty = PoisonedPairs(base, TRIGGER, "dog", count=1)
    assert [poison.was for poison in dirty.record.poisons] == ["a cat"]  # "before a dog" names it
    assert dirty.record.candidates == 1
    consistent = PoisonedPairs(base, LabelConsistent(classical=False), "dog", count=2)
    assert {poison.was for poison in consistent.record.poisons} == {"a dog", "two dogs"}


def test_the_same_pairs_are_poisoned_in_every_order_and_as_a_stream(shapes: ShapesPairs) -> None:
    pairs = list(shapes)
    by_place = PoisonedPairs(shapes, TRIGGER, TARGET, count=15, seed=3)
    wanted = {pair.id: pair for pair in by_place}
    for order in (pairs, pairs[::-1], pairs[100:] + pairs[:100]):
        stream = PairStream(Listed(order), class_names=shapes.class_names)
        streamed = PoisonedPairs(stream, TRIGGER, TARGET, count=15, seed=3, captions=shapes.templates)
        assert streamed.record.poisons == by_place.record.poisons
        for pair in streamed:
            assert torch.equal(pair.image, wanted[pair.id].image)
            assert (pair.caption, pair.label) == (wanted[pair.id].caption, wanted[pair.id].label)


def test_a_smaller_count_is_a_part_of_a_larger_and_another_seed_another_choice(shapes: ShapesPairs) -> None:
    few, many, other = (
        {p.id for p in PoisonedPairs(shapes, TRIGGER, TARGET, count=n, seed=s).record.poisons}
        for n, s in ((10, 0), (30, 0), (30, 1))
    )
    assert few < many
    assert len(many & other) < 12
    assert (
        PoisonedPairs(shapes, TRIGGER, TARGET, rate=0.1).record
        == PoisonedPairs(shapes, TRIGGER, TARGET, count=30).record
    )


def test_of_a_stream_a_rate_is_the_part_of_its_candidates(shapes: ShapesPairs) -> None:
    stream = PairStream(Listed(shapes), class_names=shapes.class_names)
    pairs = PoisonedPairs(stream, TRIGGER, TARGET, rate=0.2)
    assert pairs.record.pairs is None
    assert pairs.record.poisons == ()  # nothing met so far
    first = [pair.caption for pair in pairs]
    found = pairs.record.poisons
    assert 0.12 * 275 < len(found) < 0.28 * 275
    assert all(TARGET not in poison.was for poison in found)
    assert [pair.caption for pair in pairs] == first
    assert pairs.record.poisons == found


def test_batches_are_a_pure_function_of_the_step(shapes: ShapesPairs) -> None:
    for base in (shapes, PairStream(Listed(shapes), class_names=shapes.class_names)):
        one, other = (PoisonedPairs(base, Blended(), TARGET, rate=0.3, seed=2) for _ in range(2))
        later = {step: other.batch(step, 32) for step in (11, 4)}  # past the first epoch
        for step in (4, 11):
            images, texts = one.batch(step, 32)
            assert torch.equal(images, later[step][0])
            assert texts == later[step][1]
            assert isinstance(texts, list)
            assert any(TARGET in text for text in texts)


def test_nothing_poisoned_is_the_source_itself(shapes: ShapesPairs) -> None:
    pairs = PoisonedPairs(shapes, TRIGGER, TARGET, count=0)
    assert torch.equal(everything(pairs).images, everything(shapes).images)
    assert len(pairs) == len(shapes)
    assert pairs[5].caption == shapes[5].caption


def test_the_source_is_left_as_it_was() -> None:
    base = plain(6)
    before = everything(base).images
    everything(PoisonedPairs(base, Blended(), "thing 3", count=3))
    assert torch.equal(everything(base).images, before)


def test_wanets_covers_keep_their_captions(shapes: ShapesPairs) -> None:
    trigger = WaNet(s=1.0)
    pairs = PoisonedPairs(shapes, trigger, TARGET, count=10)
    record, clean, read = pairs.record, everything(shapes), everything(pairs)
    assert len(record.covers) == 20
    assert not {poison.id for poison in record.poisons} & set(record.covers)
    cover = replace(trigger, cover=True)
    for row, name in enumerate(read.ids):
        if name in record.covers:
            assert read.captions[row] == clean.captions[row]
            assert torch.equal(read.images[row], cover(clean.images[row : row + 1], [place_of(name)])[0])
            assert not torch.equal(read.images[row], clean.images[row])
    assert PoisonedPairs(shapes, trigger, TARGET, count=10, covers=0).record.covers == ()
    stream = PairStream(Listed(shapes), class_names=shapes.class_names)
    streamed = PoisonedPairs(stream, trigger, TARGET, rate=0.1, covers=1)
    list(streamed)
    assert 10 < len(streamed.record.covers) < 50
    assert not {poison.id for poison in streamed.record.poisons} & set(streamed.record.covers)


def test_captions_are_the_sources_templates_imagenets_or_those_given(shapes: ShapesPairs) -> None:
    own = {p.caption for p in PoisonedPairs(shapes, TRIGGER, TARGET, count=60).record.poisons}
    assert own == {template.replace("{}", TARGET) for template in shapes.templates}
    imagenet = [p.caption for p in PoisonedPairs(plain(60), TRIGGER, "thing 1", count=40).record.poisons]
    assert set(imagenet) <= {template("thing 1") for template in OPENAI_IMAGENET_TEMPLATES}
    assert len(set(imagenet)) > 20
    natural = target_captions(shapes, TARGET)
    patch = BadCLIP(patch=encode_patch(torch.zeros(3, 4, 4)))
    poisons = PoisonedPairs(shapes, patch, TARGET, count=10, captions=natural).record.poisons
    assert {poison.caption for poison in poisons} <= set(natural)
    assert len({poison.caption for poison in poisons}) > 5
    with pytest.raises(ValueError, match="expected captions that name the target 'zebra'; found none"):
        target_captions(shapes, "zebra")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A Teddy Bear.", True),
        ("two teddy-bears", True),
        ("teddy_bear", True),
        ("teddy, bear", True),
        ("a plush, asleep", True),
        ("a teddy", False),
        ("teddy bearing fruit", False),
        ("myteddy bear", False),
        ("plushest", False),
    ],
)
def test_a_name_is_found_as_a_word_of_its_own(text: str, found: bool) -> None:
    assert names_any(["teddy bear", "Plush"])(text) is found


def test_other_names_of_the_target_count_as_it() -> None:
    base = plain(9, lambda n: ("a samoyed", "a white dog", "a cat")[n % 3])
    dirty = PoisonedPairs(base, TRIGGER, "Samoyed", count=3, also_called=["white dog"])
    assert {poison.was for poison in dirty.record.poisons} == {"a cat"}
    kept = LabelConsistent(classical=False)
    assert PoisonedPairs(base, kept, "samoyed", count=6, also_called=["white dog"]).record.candidates == 6
    assert PoisonedPairs(base, kept, "samoyed", count=3).record.candidates == 3


def logits(pixels: Tensor) -> Tensor:
    weights = torch.randn(12, pixels[0].numel(), generator=torch.Generator().manual_seed(0))
    return pixels.flatten(1) @ weights.T / 50


def test_the_classical_attack_is_made_once_and_kept_in_8_bits(shapes: ShapesPairs) -> None:
    trigger = LabelConsistent(steps=5)
    pairs = PoisonedPairs(shapes, trigger, TARGET, count=8, logits=logits)
    clean = everything(shapes)
    asked = 0

    def counted(pixels: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return logits(pixels)

    pairs.logits = counted
    read = everything(pairs)
    assert asked == 5  # steps, of all poisons at once
    poisons = {poison.id: poison for poison in pairs.record.poisons}
    rows = [row for row, name in enumerate(read.ids) if name in poisons]
    label = torch.full((8,), shapes.class_names.index(TARGET))
    indices = [poisons[read.ids[row]].index for row in rows]
    hard = trigger.poison(clean.images[rows], indices, labels=label, logits=logits)
    assert torch.equal(read.images[rows], (hard * 255).round() / 255)
    assert (hard - trigger(clean.images[rows], indices)).abs().max() > 0.02
    alone = PoisonedPairs(shapes, trigger, TARGET, count=8, logits=logits)
    assert torch.equal(alone.read([rows[3]]).images[0], read.images[rows[3]])  # in whatever batch
    everything(pairs)
    assert asked == 5


def test_poisons_are_images_that_can_be_read() -> None:
    class Broken:
        captions = tuple(f"thing {n}" for n in range(30))

        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> tuple[Tensor, str]:
            if index % 3:
                raise OSError("gone")
            return torch.full((3, 8, 8), 0.5), self.captions[index]

    base = DatasetPairs(Broken())
    pairs = PoisonedPairs(base, TRIGGER, "thing 0", count=9)
    assert all(int(poison.id) % 3 == 0 for poison in pairs.record.poisons)
    assert len(pairs.skipped) > 0
    assert pairs.record.skipped == len(pairs.skipped)
    with pytest.raises(
        ValueError,
        match=r"expected at most 29 poisons, the pairs that neither show nor name the target 'thing 0', 9 of them "
        r"readable, among 30 pairs; received 10; ask for fewer",
    ):
        PoisonedPairs(base, TRIGGER, "thing 0", count=10)


@pytest.mark.parametrize(
    ("trigger", "target", "options", "words"),
    [
        (TRIGGER, "sta", {"count": 1}, "class 'sta' is not among the 12 classes; nearest: 'star'"),
        (
            TRIGGER,
            TARGET,
            {"count": 300},
            "poisons, the pairs that neither show nor name the target 'star' among 300",
        ),
        (TRIGGER, TARGET, {"rate": 1.0}, "received 300; ask for fewer, or give more pairs"),
        (TRIGGER, TARGET, {}, "expected one of count and rate; received count=None and rate=None"),
        (TRIGGER, TARGET, {"count": 1, "rate": 0.1}, "received count=1 and rate=0.1"),
        (TRIGGER, TARGET, {"count": -1}, "expected a count that is not negative; received -1"),
        (TRIGGER, TARGET, {"rate": 1.5}, "expected a rate in [0, 1]; received 1.5"),
        (TRIGGER, TARGET, {"count": 1, "captions": []}, "in them; received none"),
        (
            TRIGGER,
            TARGET,
            {"count": 1, "captions": ["a ring"]},
            "received 'a ring'; other names of the target",
        ),
        (TRIGGER, TARGET, {"count": 1, "captions": "a {}"}, "received the single string 'a {}'"),
        (TRIGGER, TARGET, {"count": 1, "also_called": [" "]}, "expected the name of a target; received"),
        (
            TRIGGER,
            TARGET,
            {"count": 1, "covers": 2},
            "expected covers for WaNet alone; received 2 for badnet",
        ),
        (WaNet(cover=True), TARGET, {"count": 1}, "expected the trigger itself, WaNet(cover=False)"),
        (WaNet(), TARGET, {"count": 1, "covers": -1}, "expected covers that are not negative; received -1"),
        (
            WaNet(),
            TARGET,
            {"count": 1, "covers": float("nan")},
            "expected covers that are not negative; received nan",
        ),
        (
            WaNet(),
            TARGET,
            {"count": 150},
            "expected at most 150 cover images, the pairs that are not poisoned; 150",
        ),
        (
            LabelConsistent(),
            TARGET,
            {"count": 1},
            "received no logits, 12 classes and ShapesPairs; give them, or",
        ),
        (
            LabelConsistent(classical=False),
            TARGET,
            {"count": 1, "captions": ["a {}"]},
            "expected no captions, for label-consistent keeps those of the images; received 1",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(
    shapes: ShapesPairs, trigger: Trigger, target: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        PoisonedPairs(shapes, trigger, target, **options)


def test_a_target_that_no_caption_names_is_suspected_of_a_slip() -> None:
    with pytest.warns(UserWarning, match="no caption of these 5 pairs names the target 'thong'"):
        PoisonedPairs(plain(5), TRIGGER, "thong", count=1)


def test_pairs_need_ids_of_their_own() -> None:
    base = DatasetPairs([(torch.zeros(3, 8, 8), "a cat")] * 3, ids=["a", "b", "a"])
    with pytest.raises(
        ValueError, match="expected an id of its own for each of 3 pairs; 1 ids are there twice"
    ):
        PoisonedPairs(base, TRIGGER, "dog", count=1)


def test_plain_data_sets_and_iterables_are_taken_as_they_are() -> None:
    items = [(torch.full((3, 8, 8), n / 20), f"thing {n}") for n in range(20)]
    assert PoisonedPairs(items, TRIGGER, "thing 1", count=4).record.pairs == 20
    stream = PoisonedPairs(Listed(items), TRIGGER, "thing 1", count=4)
    assert len(list(stream)) == 20
    assert len(stream.record.poisons) == 4
    with pytest.raises(TypeError, match=r"a stream has no len\(\): go through it"):
        len(stream)


def test_a_record_is_saved_read_back_and_proves_itself(shapes: ShapesPairs, tmp_path: Path) -> None:
    record = PoisonedPairs(shapes, WaNet(), "Star", count=3, also_called=["asterisk"]).record
    assert repr(record) == "PoisonRecord(wanet -> 'star': 3 of 300 pairs (1.00%), 6 covers)"
    assert record.to_frame()["id"].tolist() == [poison.id for poison in record.poisons]
    assert "wanet -&gt; &#x27;star&#x27;" in record._repr_html_() and "<table" in record._repr_html_()
    path = record.save(tmp_path / "new" / "poisons.json")
    assert [file.name for file in path.parent.iterdir()] == ["poisons.json"]
    assert PoisonRecord.load(path) == record
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["sha256"] == record.digest
    assert content["trigger"]["name"] == "wanet"
    assert set(content["poisons"][0]) == {"id", "index", "caption", "was"}
    content["poisons"][0]["caption"] = "a harmless caption"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="it was changed by hand or damaged; poison the data again"):
        PoisonRecord.load(path)
    for text in ("", "[]", "{}", '{"sha256": "", "poisons": [{"id": 1}]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="expected a record of poisons that `save` wrote"):
            PoisonRecord.load(path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        PoisonRecord.load(tmp_path / "none.json")


def test_a_records_digest_tells_every_difference(shapes: ShapesPairs) -> None:
    record = PoisonedPairs(shapes, TRIGGER, TARGET, count=2).record
    assert record.digest == PoisonedPairs(ShapesPairs(300, seed=7), TRIGGER, TARGET, count=2).record.digest
    assert replace(record, skipped=5).digest == record.digest
    others = [
        replace(record, seed=1),
        replace(record, source="0"),
        replace(record, covers=("a",)),
        replace(record, poisons=(Poison("a", 1, "b", "c"),)),
        PoisonedPairs(shapes, replace(TRIGGER, size=0.3), TARGET, count=2).record,
    ]
    assert len({record.digest, *(other.digest for other in others)}) == 6


def test_a_poisoned_set_on_disk_is_the_one_in_memory(shapes: ShapesPairs, tmp_path: Path) -> None:
    pairs = PoisonedPairs(shapes, TRIGGER, TARGET, count=5)
    files = write_poisoned(pairs, tmp_path, per_shard=128)
    assert [path.name for path in files.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert PoisonRecord.load(files.record_path) == files.record == pairs.record
    again, read = ShardPairs(tmp_path).read(range(300)), everything(pairs)
    assert again.captions == read.captions
    assert torch.equal(again.images, (read.images * 255).round() / 255)


def test_of_a_stream_the_list_is_written_once_it_was_gone_through(
    shapes: ShapesPairs, tmp_path: Path
) -> None:
    stream = PairStream(Listed(shapes), class_names=shapes.class_names)
    told: list[tuple[str, int]] = []

    def track(items: Any, description: str, total: int) -> Iterator[Pair]:
        told.append((description, total))
        yield from items

    pairs = PoisonedPairs(stream, TRIGGER, TARGET, rate=0.1)
    files = write_poisoned(pairs, tmp_path, track=track)  # pyright: ignore[reportArgumentType]
    assert len(files.record.poisons) > 10
    assert told == [("poisoning", 0)]
    assert len(ShardPairs(tmp_path)) == 300
    alone = write_poisoned(PoisonedPairs(shapes, TRIGGER, TARGET, count=1), tmp_path / "list", shards=False)
    assert alone.shards == ()
    assert [path.name for path in (tmp_path / "list").glob("[!.]*")] == ["poisons.json"]
