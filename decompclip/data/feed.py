"""Batches made ahead of the model, which then need not wait for them.

Pictures are decoded and scaled by threads: Pillow lets go of Python's lock meanwhile, every source works as it is, nothing is
copied between processes, and there is no second process that a kill could leave behind. A user's code may draw from torch's
global generator: it runs in the thread of who asks, one item after the other, so that what it draws depends on no clock.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from decompclip.data.pixels import stack_images

A = TypeVar("A")
T = TypeVar("T")

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Threads that decode pictures: one a core that this process may use."""

AHEAD = 2
"""Batches that wait for the model at most, the one in the making included."""


@runtime_checkable
class Labelled(Protocol):
    """Images in [0, 1] with labels, in the same order each time; `Shapes` is such.

    A batch has `images`, `labels` and may have `indices` (else images are counted from 0, by one process alone).
    """

    def batches(self, batch_size: int = ...) -> Iterator[Any]: ...


class DeviceSource(ABC):
    """A source that puts its images onto a device itself, in 8 bits where they come in 8 bits."""

    @property
    def pure(self) -> bool:
        """Whether reading runs this package's code alone, which draws from no global generator: such are read ahead."""
        return False

    @abstractmethod
    def batches(self, batch_size: int = 64, *, device: torch.device | str | None = None) -> Iterator[Any]: ...

    @abstractmethod
    def part(
        self, places: Sequence[int], batch_size: int = 64, *, device: torch.device | str | None = None
    ) -> Iterator[Any]: ...


def in_threads(read: Callable[[A], T], items: Sequence[A], *, pure: bool = True) -> list[T]:
    """`read` of each item, in order; the first error is raised. What is not `pure` (`DeviceSource`) is read in one thread."""
    if not pure or min(len(items), WORKERS) < 2:
        return [read(item) for item in items]
    with ThreadPoolExecutor(min(len(items), WORKERS)) as pool:
        return list(pool.map(read, items))


def ahead(items: Iterable[T], *, depth: int = AHEAD) -> Generator[T]:
    """The items, made by a thread while earlier ones are used: in order, at most `depth` of them waiting or in the making.

    Torch's gradient modes are those of the caller's thread. What `items` raises is raised here, after the items before it.
    Who stops early closes it (`contextlib.closing`): the thread then ends after the item in the making, for which nobody waits.
    """
    ready: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    room, stopped = threading.Semaphore(depth - 1), threading.Event()
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def make() -> None:
        end: BaseException | None = None
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                for item in items:
                    ready.put((True, item))
                    room.acquire()
                    if stopped.is_set():
                        break
        except BaseException as error:
            end = error
        ready.put((False, end))

    threading.Thread(target=make, name="decompclip-feed", daemon=True).start()
    try:
        while True:
            more, item = ready.get()
            if more:
                room.release()
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        room.release()  # it may wait for room


def feed(
    data: Labelled | Iterable[Any], batch_size: int, *, device: torch.device | str | None = None
) -> Generator[Any]:
    """Batches of a source, or of pairs that are gone through one by one, on `device`; of a `pure` source, made ahead.

    Pictures of files are decoded in threads and cross in 8 bits, from pinned memory to a GPU; there they become floats.

    Args:
        data: has `batches` (a folder, a table, shards, parquet files, pairs, a world), or yields pairs.
        batch_size: images in a batch.
        device: where images of files go; others, and all with None, stay where the source has them.
    """
    batches = _batches(data, batch_size, device)
    yield from ahead(batches) if is_pure(data) else batches


def is_pure(source: object) -> bool:
    """Whether a source may be read in another thread; see `DeviceSource`."""
    return getattr(source, "pure", False) is True


def _batches(data: Any, batch_size: int, device: torch.device | str | None) -> Iterator[Any]:
    if isinstance(data, DeviceSource):
        return data.batches(batch_size, device=device)
    return data.batches(batch_size) if isinstance(data, Labelled) else _of_pairs(data, batch_size)


def _of_pairs(data: Iterable[Any], batch_size: int) -> Iterator[Any]:
    pairs, known_places, start = iter(data), getattr(data, "indices", None), 0
    while some := list(islice(pairs, batch_size)):
        labels = [pair.label for pair in some]
        known = None if None in labels else torch.tensor(labels)
        end = start + len(some)
        places = (
            known_places[start:end] if isinstance(known_places, torch.Tensor) else torch.arange(start, end)
        )
        images = stack_images([pair.image for pair in some])
        yield SimpleNamespace(images=images, labels=known, indices=places)
        start = end
