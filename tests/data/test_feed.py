"""Batches that are made ahead: the same as those read one by one, in order, and nothing runs on when nobody asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from decompclip.data import feed as module, pixels
from decompclip.data.datasets import DatasetPairs, FolderPairs
from decompclip.data.feed import ahead, feed, in_threads, is_pure
from decompclip.data.images import FolderSource
from decompclip.data.pairs import Pairs, SubsetPairs
from decompclip.data.shapes import Shapes
from decompclip.data.sources import open_images, open_pairs
from decompclip.display import Pace
from decompclip.evaluation.evaluate import evaluate
from decompclip.models.loading import load
from decompclip.models.preprocessing import open_clip_transform
from decompclip.operators.inputs import image_batches

CLASSES = ("cat", "dog")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven pictures of two classes; the sixth and the last are no pictures."""
    draws = np.random.default_rng(0)
    for number in range(11):
        path = tmp_path / "photos" / CLASSES[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
        if number in (5, 10):
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "photos"


@pytest.fixture(params=[1, 3])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "WORKERS", request.param)
    return request.param


def read_one_by_one(folder: Path, preprocess: Any) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.png")):
        try:
            found[path.relative_to(folder).as_posix()] = preprocess(Image.open(path).convert("RGB"))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 9, 64])
def test_a_folder_is_read_as_one_by_one(photos: Path, workers: int, batch_size: int) -> None:
    model = load("shapes")
    source = FolderSource(photos, model.preprocess, class_names=CLASSES)
    expected = read_one_by_one(photos, model.preprocess)
    batches = list(feed(source, batch_size))
    assert [path for batch in batches for path in batch.paths] == list(expected)
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack([*expected.values()]))
    assert [len(batch.paths) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    labels = [CLASSES[int(label)] for batch in batches for label in batch.labels]
    assert labels == [Path(path).parts[0] for path in expected]
    assert [skip.path for skip in source.skipped] == ["cat/10.png", "dog/05.png"]
    assert {type(skip.reason) for skip in source.skipped} == {str}


def test_pairs_are_read_alike_in_batches_one_by_one_and_by_place(photos: Path, workers: int) -> None:
    pairs = open_pairs(str(photos), load("shapes").pixels)
    single = list(pairs)
    batches = list(feed(pairs, 4))
    assert [name for batch in batches for name in batch.ids] == [pair.id for pair in single]
    whole = torch.cat([batch.images for batch in batches])
    assert torch.equal(whole, torch.stack([pair.image for pair in single]))
    places = [pairs.ids.index(pair.id) for pair in single]
    assert torch.equal(pairs.read(places).images, whole)


def test_pixels_of_pairs_are_not_taken_for_images(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"expected batches of images .* received Pair; preprocess"):
        next(image_batches(open_pairs(str(photos), load("shapes").pixels), batch_size=4))


def test_pairs_of_several_sizes_say_what_to_do() -> None:
    pairs = [SimpleNamespace(image=torch.zeros(3, side, side), label=0) for side in (4, 5)]
    with pytest.raises(ValueError, match=r"expected images of one size in a batch; .*to_pixels\(size\)"):
        next(feed(pairs, 2))


def test_what_cannot_be_read_stops_the_run_where_it_shall(photos: Path, workers: int) -> None:
    source = open_images(photos, load("shapes").pixels, CLASSES, on_error="raise")
    for data in (source, FolderPairs(photos, ["a {}"], on_error="raise")):
        with pytest.raises(ValueError, match=r"cat/10\.png: .*leave it out with on_error") as caught:
            list(feed(data, 4))
        assert isinstance(caught.value.__cause__, OSError)  # Pillow's


def test_pictures_go_to_the_device_in_8_bits(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[torch.dtype, Any]] = []

    def onto(tensor: torch.Tensor, device: Any) -> torch.Tensor:
        sent.append((tensor.dtype, device))
        return tensor

    monkeypatch.setattr(pixels, "onto", onto)
    model = load("shapes")
    for source in (FolderSource(photos, model.preprocess), open_pairs(str(photos), model.pixels)):
        for batch in feed(source, 64, device="cpu"):
            assert batch.images.dtype == torch.float32
    assert sent == [(torch.uint8, "cpu")] * 2


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_the_way_by_8_bits_changes_no_bit_of_open_clips_transform(mode: str) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    cfg = PreprocessCfg((32, 32), mean=mean, std=std, resize_mode=mode)  # pyright: ignore[reportArgumentType]
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 45, 3), dtype=np.uint8))
    plain: Any = image_transform_v2(cfg, is_train=False)
    ours = open_clip_transform(cfg)
    assert torch.equal(plain(picture), ours(picture))
    both = torch.stack([ours.bytes(picture)] * 2)
    assert both.dtype == torch.uint8
    assert torch.equal(ours.finish(both)[1], plain(picture))


def test_threads_keep_the_order_and_raise_the_first_error(workers: int) -> None:
    assert in_threads(lambda x: x * x, range(50)) == [x * x for x in range(50)]

    def odd(x: int) -> int:
        if x % 7 == 6:
            raise ValueError(str(x))
        return x

    with pytest.raises(ValueError, match="^6$"):
        in_threads(odd, range(50))


def test_items_come_in_order_and_few_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for x in range(20):
            made.append(x)
            yield x

    running = ahead(items(), depth=2)
    taken = [next(running) for _ in range(5)]
    time.sleep(0.1)
    assert taken == [0, 1, 2, 3, 4]
    assert len(made) == 5 + 2
    assert list(running) == list(range(5, 20))


def test_what_making_raises_comes_after_what_was_made() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for item in ahead(items()):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_no_thread_goes_on_when_nobody_asks_any_more() -> None:
    def items() -> Iterator[int]:
        while True:
            yield 0

    running = ahead(items())
    next(running)
    assert any(thread.name == "decompclip-feed" for thread in threading.enumerate())
    running.close()
    assert_no_feed()


def test_nobody_waits_for_an_item_in_the_making() -> None:
    go_on = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        go_on.wait(30)
        yield 1

    running = ahead(items())
    next(running)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 5
    go_on.set()
    assert_no_feed()


def test_an_error_in_a_loop_over_images_leaves_no_thread(photos: Path) -> None:
    """Its traceback holds the frame of `track`, and with it the batches."""
    model = load("shapes")
    source = open_images(photos, model.pixels, CLASSES)

    def track(batches: Iterator[Any]) -> Iterator[Any]:
        yield next(batches)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$") as caught:
        evaluate(model, source, torch.eye(2, model.cfg.d_embed), batch_size=1, track=track)
    assert caught.tb
    assert_no_feed()


def assert_no_feed() -> None:
    for thread in threading.enumerate():
        if thread.name == "decompclip-feed":
            thread.join(5)
            assert not thread.is_alive()


class Flipped(torch.utils.data.Dataset):
    """A user's: of (image, caption), drawn from torch's global generator as torchvision's augmentations do."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.captions = [f"caption {index}" for index in range(9)]

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        self.threads.add(threading.get_ident())
        return torch.rand(3, 4, 4), self.captions[index]


def test_a_users_code_runs_where_it_is_asked_for(photos: Path) -> None:
    data = Flipped()
    pairs = DatasetPairs(data)
    torch.manual_seed(0)
    expected = [torch.rand(3, 4, 4) for _ in range(9)]
    torch.manual_seed(0)
    found = []
    for batch in feed(SubsetPairs(pairs, range(9)), 2):
        found += [*batch.images]
        time.sleep(0.01)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert data.threads == {threading.get_ident()}

    def preprocess(picture: Image.Image) -> torch.Tensor:
        data.threads.add(threading.get_ident())
        return torch.rand(3, 4, 4)

    for source in (FolderSource(photos, preprocess), open_pairs(str(photos), preprocess)):
        list(feed(source, 4))
    assert data.threads == {threading.get_ident()}
    model = load("shapes")
    ours = FolderSource(photos, model.preprocess), open_pairs(str(photos), model.pixels), Shapes(4)
    assert all(map(is_pure, ours))


def test_only_our_own_transforms_go_by_way_of_8_bits(photos: Path) -> None:
    """A user's may give 8 bits, whose scale nobody knows."""

    def preprocess(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    for source in (FolderSource(photos, preprocess), open_pairs(str(photos), preprocess)):
        with pytest.raises(
            ValueError, match=r"expected floats of preprocess; received torch\.uint8.*divide by 255"
        ):
            list(feed(source, 4))
    with pytest.raises(ValueError, match="divide by 255"):
        list(open_pairs(str(photos), preprocess))


def test_a_part_of_a_folder_is_what_its_range_says(photos: Path) -> None:
    source = FolderSource(photos, load("shapes").preprocess)
    (every,), (some,) = source.part(range(11)), source.part(range(1, 9, 3))
    names = [name for place in (1, 4, 7) for name, _ in source.listed(range(place, place + 1))]
    assert list(some.paths) == names
    assert torch.equal(some.images, every.images[[every.paths.index(name) for name in names]])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_batches_are_made_in_the_gradient_mode_of_who_asks(mode: Any) -> None:
    weight = torch.ones(1, requires_grad=True)
    with mode():
        expected, (found,) = weight * 2, list(ahead(weight * 2 for _ in range(1)))
        assert (found.requires_grad, found.is_inference()) == (
            expected.requires_grad,
            expected.is_inference(),
        )


def test_the_pace_says_how_long_images_were_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("decompclip.display.time.perf_counter", lambda: clock.now)

    def batches() -> Iterator[Any]:
        for _ in range(4):
            clock.now += 1
            yield SimpleNamespace(images=range(8))

    pace = Pace()
    assert str(pace) == ""
    for _ in pace.over(batches()):
        clock.now += 3
    assert str(pace) == " (2 images/s, 25% of the time waiting for them)"


def test_a_part_of_pairs_is_finished_as_the_whole(photos: Path) -> None:
    pairs = open_pairs(str(photos), load("shapes").pixels)
    assert isinstance(pairs, Pairs)
    part = SubsetPairs(pairs, [7, 3])
    (batch,), whole = part.batches(8), pairs.read([7, 3])
    assert batch.images.dtype == torch.float32 and torch.equal(batch.images, whole.images)
    image = part.image(1)
    assert image is not None and torch.equal(image, whole.images[1])
