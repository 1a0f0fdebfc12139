"""Batches made ahead of the model, which then need not wait for them.

Pictures are decoded and scaled by threads: Pillow lets go of Python's lock meanwhile, every source works as it is, nothing is
copied between processes, and there is no second process that a kill could leave behind.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

A = TypeVar("A")
T = TypeVar("T")

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Threads that decode pictures: one a core that this process may use."""

AHEAD = 2
"""Batches that wait for the model at most."""


@runtime_checkable
class Labelled(Protocol):
    """Images in [0, 1] with labels, in the same order each time; `Shapes` is such.

    A batch has `images`, `labels` and may have `indices` (else images are counted from 0).
    """

    def batches(self, batch_size: int = ...) -> Iterator[Any]: ...


class DeviceSource(ABC):
    """A source that puts its images onto a device itself, in 8 bits where they come in 8 bits."""

    @abstractmethod
    def batches(self, batch_size: int = 64, *, device: torch.device | str | None = None) -> Iterator[Any]: ...


def in_threads(read: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """`read` of each item, in order; the first error is raised."""
    if min(len(items), WORKERS) < 2:
        return [read(item) for item in items]
    with ThreadPoolExecutor(min(len(items), WORKERS)) as pool:
        return list(pool.map(read, items))


def ahead(items: Iterable[T], *, depth: int = AHEAD) -> Iterator[T]:
    """The items, made by a thread while earlier ones are used: in order, at most `depth` of them waiting.

    Torch's gradient modes are those of the caller's thread. What `items` raises is raised here, after the items before it.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def make() -> None:
        end: BaseException | None = None
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                for item in items:
                    ready.put((True, item))
                    if stopped.is_set():
                        break
        except BaseException as error:
            end = error
        ready.put((False, end))

    thread = threading.Thread(target=make, name="decompclip-feed", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room
            with suppress(queue.Empty):
                ready.get(timeout=0.01)


def feed(
    data: Labelled | Iterable[Any], batch_size: int, *, device: torch.device | str | None = None
) -> Iterator[Any]:
    """Batches of a source, or of pairs that are gone through one by one, made ahead and on `device`.

    Pictures of files are decoded in threads and cross in 8 bits, from pinned memory to a GPU; there they become floats.

    Args:
        data: has `batches` (a folder, a table, shards, parquet files, pairs, a world), or yields pairs.
        batch_size: images in a batch.
        device: where images of files go; others, and all with None, stay where the source has them.
    """
    return ahead(_batches(data, batch_size, device))


def _batches(data: Any, batch_size: int, device: torch.device | str | None) -> Iterator[Any]:
    if isinstance(data, DeviceSource):
        return data.batches(batch_size, device=device)
    return data.batches(batch_size) if isinstance(data, Labelled) else _of_pairs(data, batch_size)


def _of_pairs(data: Iterable[Any], batch_size: int) -> Iterator[Any]:
    pairs = iter(data)
    while some := list(islice(pairs, batch_size)):
        labels = [pair.label for pair in some]
        known = None if None in labels else torch.tensor(labels)
        yield SimpleNamespace(images=torch.stack([pair.image for pair in some]), labels=known)
