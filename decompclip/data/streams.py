"""Streams of pairs: gone through in order, never read by place. For data too large, or too far away, to index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from decompclip.data.files import SkippedFile
from decompclip.data.pairs import Pair, PairBatch, PairSteps, content_name
from decompclip.data.pixels import Preprocess, read_image, to_pixels
from decompclip.data.shards import IMAGE_KINDS


class PairStream(PairSteps):
    """Pairs that come one after the other, again and again.

    Args:
        items: something that can be gone through more than once, with the same items in the same order: of
            `Pair`; of (image, caption) or (image, caption, id); or of WebDataset samples, decoded
            (`.decode("pilrgb")`) or not. An item that cannot be read is left out and listed in `skipped`.
        preprocess: from a picture to pixels in [0, 1]; tensors pass as they are.
        class_names: the classes that labels stand for, or that a target is checked against.

    Raises:
        ValueError: an iterator, which could be gone through only once.
    """

    def __init__(
        self, items: Iterable[Any], preprocess: Preprocess | None = None, *, class_names: Sequence[str] = ()
    ) -> None:
        if iter(items) is items:
            raise ValueError(
                "expected pairs that can be gone through again and again; received an iterator, which is used up "
                "after one pass; wrap what makes it in a class with __iter__"
            )
        self.items, self.preprocess, self.class_names = items, preprocess or to_pixels(), tuple(class_names)
        self._left_out: dict[str, SkippedFile] = {}
        self._urls: dict[str, str] = {}
        self._running: Iterator[Pair] = iter(())
        self._position = 0

    @property
    def skipped(self) -> list[SkippedFile]:
        """What was left out so far, by this stream or by `items` themselves."""
        return [*getattr(self.items, "skipped", ()), *self._left_out.values()]

    def __iter__(self) -> Iterator[Pair]:
        """One pass."""
        for place, item in enumerate(self.items):
            try:
                yield item if isinstance(item, Pair) else self._pair(item)
            except UnreadableItem as error:
                name = error.name or f"item {place}"
                self._left_out[name] = SkippedFile(name, str(error))

    def take(self, step: int, size: int) -> PairBatch:
        """The pairs `step * size` and on, the stream's passes one after the other.

        Steps in a row cost nothing more; to resume, the stream runs from its start to the step.

        Raises:
            ValueError: no pair in the whole stream, batches of none, a negative step, images of several sizes.
        """
        if size < 1 or step < 0:
            raise ValueError(
                f"expected batches of at least 1 pair and a step that is not negative; received {size} and {step}"
            )
        if step * size < self._position:
            self._running, self._position = iter(()), 0
        while self._position < step * size:
            self._next()
        return PairBatch.of([self._next() for _ in range(size)])

    def _next(self) -> Pair:
        pair = next(self._running, None)
        if pair is None:
            self._running = iter(self)
            pair = next(self._running, None)
        if pair is None:
            last = f", the last left out: {self.skipped[-1].reason}" if self.skipped else ""
            raise ValueError(f"expected a stream of pairs; it holds none that can be read{last}")
        self._position += 1
        return pair

    def _pair(self, item: Any) -> Pair:
        if isinstance(item, Mapping):
            return self._sample(item)
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise ValueError(
                f"expected a stream of (image, caption), (image, caption, id), Pair or WebDataset samples; received "
                f"{type(item).__name__}"
            )
        image, caption, *rest = item
        return self._made(rest[0] if rest else None, image, caption, None)

    def _sample(self, sample: Mapping[str, Any]) -> Pair:
        """A WebDataset sample; its shard's name and its key make the id, as in `ShardPairs`."""
        url = str(sample.get("__url__", ""))
        shard = Path(url).name.split(".")[0]
        if self._urls.setdefault(shard, url) != url:
            raise ValueError(
                f"expected shards whose names tell them apart; received {self._urls[shard]} and {url}, whose pairs would have "
                "the same ids; rename one, or read local shards with ShardPairs, which tells them apart"
            )
        name = "/".join(part for part in (shard, str(sample.get("__key__", ""))) if part) or None
        kind = next((kind for kind in IMAGE_KINDS if kind in sample), None)
        if kind is None:
            raise UnreadableItem(name, "has no image")
        label = sample.get("cls")
        try:
            label = None if label is None else int(label)
        except ValueError:
            raise UnreadableItem(name, f"class {label!r} is no number") from None
        return self._made(name, sample[kind], sample.get("txt"), label)

    def _made(self, name: Any, image: Any, caption: Any, label: int | None) -> Pair:
        name = None if name is None else str(name)
        text = caption.decode("utf-8", "replace") if isinstance(caption, bytes) else caption
        if not isinstance(text, str) or not text.strip():
            raise UnreadableItem(name, f"has no caption: {text!r}")
        pixels = read_image(image, self.preprocess)
        if isinstance(pixels, str):
            raise UnreadableItem(name, pixels)
        return Pair(content_name(pixels, text) if name is None else name, pixels, text.strip(), label)


class UnreadableItem(ValueError):
    """An item that is left out."""

    def __init__(self, name: str | None, why: str) -> None:
        super().__init__(why)
        self.name = name
