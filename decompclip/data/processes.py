"""The processes that share a run (`torchrun`, `accelerate launch`), and which batches each of them makes.

Batches are those of one process, handed out in turn: what is made of them, put together in order, is what one process makes.
An error in one process ends it, and whoever launched them (torchrun does) ends the others.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from decompclip.data.feed import DeviceSource, ahead, feed, is_pure
from decompclip.data.files import SkippedFile
from decompclip.data.images import ListedImages
from decompclip.data.pairs import ListedPairs, Pairs
from decompclip.files import alone_in, digest, holder_of
from decompclip.models.bundled import digest as digest_of_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
S = TypeVar("S")

_GONE = re.compile(
    r"connection (was likely )?(closed|reset|refused|timed out)|broken pipe|(read|write) error|remote process exit",
    re.I,
)
_LATE = re.compile(r"timed out|timeout", re.I)
"""What gloo, torch's store and NCCL say of a process that has ended, and of one that is late."""


class ProcessGone(ConnectionError):
    """Another process of the run has ended."""


@runtime_checkable
class PlacedImages(Protocol):
    """Images that are read by place: folders, tables, pairs, the bundled world."""

    def __len__(self) -> int: ...

    def part(self, places: Sequence[int], batch_size: int = ...) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Processes:
    """The processes that share a run; one, where there is no accelerator."""

    accelerator: Accelerator | None = None

    @property
    def count(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else self.accelerator.process_index

    def wait(self) -> None:
        """Until all have come here."""
        self._together(lambda: None)

    def _together(self, exchange: Callable[[], object]) -> None:
        """A step that all take: it waits until all have come to it, and a signal ends the wait, which one inside torch does not hear.

        Raises:
            ProcessGone, TimeoutError: one of them does not come; as `going_on`.
        """
        if self.count == 1:
            return
        with self.going_on():
            come, pause = torch.distributed.barrier(async_op=True), 0.0005
            while not come.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            come.wait()
            exchange()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Where torch's exchange between processes fails in the block, since another has ended or is late, that is said in words.

        Gloo, on CPUs, tells of both at once. NCCL tells of neither: it waits until the group's time is over.

        Raises:
            ProcessGone: a connection is closed.
            TimeoutError: another does not come in the time that the group waits.
        """
        try:
            yield
        except RuntimeError as error:
            said = str(error)
            if not (isinstance(error, torch.distributed.DistError) or "gloo" in said):
                raise
            if _GONE.search(said):
                raise ProcessGone(
                    f"expected {self.count} processes that go on together; one of them has ended: what it said, or what ended "
                    "it, is the reason; run the same again"
                ) from error
            if _LATE.search(said):
                raise TimeoutError(
                    f"expected {self.count} processes that come together in the time that their group waits; one of them is "
                    f"still at work, or hangs; torch says: {said.splitlines()[0]}; in Python give it longer: Accelerator("
                    "kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])"
                ) from error
            raise

    def in_first(self, work: Callable[[], T]) -> T:
        """What the first process makes, while the others wait, in all of them; what it raises is raised in all."""
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = work()
            except Exception as raised:
                made[1] = raised
        self._together(lambda: torch.distributed.broadcast_object_list(made))
        if made[1] is not None:
            raise made[1]
        return made[0]

    def to_first(self, own: T) -> list[T]:
        """In the first process what each of them has, in order; in the others nothing."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        self._together(lambda: torch.distributed.gather_object(own, found if self.rank == 0 else None))
        return found if self.rank == 0 else []

    def to_all(self, own: T) -> list[T]:
        """In every process what each of them has, in order."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        self._together(lambda: torch.distributed.all_gather_object(found, own))
        return found

    def each(self, items: Sequence[S], make: Callable[[S], T]) -> list[T]:
        """`make` of every item, each in one of the processes; in all of them, in order."""
        own = [make(item) for item in items[self.rank :: self.count]]
        return list(_in_turn(self.to_all(own)))

    # Images

    def batches(
        self, data: Any, batch_size: int, *, device: torch.device | str | None = None
    ) -> Generator[Any]:
        """This process's batches of `feed`; None in the place of one of whose images none can be read.

        Raises:
            TypeError: data of several processes that are not read by place, or whose batches do not say which places.
        """
        if self.count == 1:
            yield from feed(data, batch_size, device=device)
            return
        placed: Any = _placed(data)
        given = {"device": device} if isinstance(data, DeviceSource) else {}
        starts = range(self.rank * batch_size, len(placed), self.count * batch_size)
        parts = (range(start, min(start + batch_size, len(placed))) for start in starts)
        made = (next(iter(placed.part(part, batch_size, **given)), None) for part in parts)
        for batch in ahead(made) if is_pure(data) else made:
            if batch is not None and getattr(batch, "indices", None) is None:
                raise TypeError(
                    "expected batches with `indices`, the places of their images, for several processes; received "
                    f"{type(batch).__name__} of {type(data).__name__} without; add them, or start one process"
                )
            yield batch

    def n_batches(self, data: Any, batch_size: int) -> int:
        """How many `batches` gives in the first process."""
        return -(-len(data) // (batch_size * self.count))

    def in_order(self, own: Sequence[T | None]) -> Iterator[T]:
        """In the first process what all made of their batches, in the order of the data, a round at a time; in the others nothing."""
        for turn in range(max(self.to_all(len(own)))):
            found = self.to_first(own[turn] if turn < len(own) else None)
            yield from (made for made in found if made is not None)

    def skipped(self, data: Any) -> tuple[SkippedFile, ...]:
        """What the processes left out of a source, each file once, as one process would list it."""
        found = dict.fromkeys(skip for own in self.to_all(list(getattr(data, "skipped", ()))) for skip in own)
        if self.count == 1 or not isinstance(data, ListedImages):
            return tuple(found)
        order = {name: place for place, (name, _) in enumerate(data.listed(range(len(data))))}
        return tuple(sorted(found, key=lambda skip: order.get(skip.path, -1)))

    # That they agree

    def check_enough(self, images: int) -> None:
        """Raises ValueError, in every process, unless there is an image for each."""
        if images < self.count:
            raise ValueError(
                f"expected an image for each process at least; received {images} images and {self.count} processes; "
                "start fewer"
            )

    def check_equal(self, run: Mapping[str, Any]) -> None:
        """Raises ValueError, in every process, unless all have the same run; its keys say what each value is."""
        for rank, other in enumerate(found := self.to_all(dict(run))):
            if other != found[0]:
                unlike = [key for key in found[0] if other.get(key) != found[0][key]]
                raise ValueError(
                    f"expected processes that agree; process {rank} differs from process 0 in {', '.join(unlike)}; "
                    "start all of them with the same command on the same files"
                )

    def check_work(
        self, model: Any, classifier: Tensor, data: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        """Raises ValueError unless all processes do the same to the same images.

        Args:
            model: with a tower as `visual`; of others the `repr` alone is compared.
            classifier: of the classes; that of other hardware may differ by rounding.
            data: images by what they are called.
            about: what else decides the numbers; what their `repr` does not show is not compared.

        Raises:
            TypeError: images that are not read by place.
            ValueError: fewer images than processes, or processes that disagree.
        """
        if self.count == 1:
            return
        for images in map(_placed, data.values()):
            self.check_enough(len(images))
        own = classifier.detach().float().cpu()
        first = self.in_first(lambda: own)
        tower = getattr(model, "visual", None)
        weights = [] if tower is None else [digest_of_weights(tower.state_dict()), tower.cfg.to_dict()]
        self.check_equal(
            {
                "the model": digest([*weights, stable_repr(model)]),
                "the classes or their prompts": own.shape == first.shape
                and torch.allclose(own, first, atol=1e-3),
                **{name: digest_of_images(images) for name, images in data.items()},
                **{name: stable_repr(x) for name, x in about.items()},
            }
        )

    @contextmanager
    def alone_in(self, folder: Path, *, name: str = "") -> Iterator[None]:
        """`files.alone_in`, which the first one enters for all of them.

        Raises:
            FolderInUse: in every process; another run writes there.
            ValueError: likewise; a folder that not all of them see.
        """
        with ExitStack() as held:
            self.in_first(lambda: held.enter_context(alone_in(folder, name=name)))
            for rank, holder in enumerate(seen := self.to_all(holder_of(folder, name))):
                if holder != seen[0]:
                    raise ValueError(
                        f"expected a folder that all processes share; process {rank} does not see what process 0 writes to "
                        f"{folder}; name one on a disk that all machines have"
                    )
            yield


ALONE = Processes()


def _placed(data: Any) -> PlacedImages:
    """Raises TypeError for images that are not read by place."""
    if not isinstance(data, PlacedImages):
        raise TypeError(
            "expected images that are read by place, for several processes: a folder, pairs, or Shapes; received "
            f"{type(data).__name__}; start one process"
        )
    return data


def stable_repr(x: object) -> str:
    """Its `repr`, without where it lies in memory, which is another place in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(x))


def _in_turn(lists: Sequence[Iterable[T]]) -> Iterator[T]:
    """The first of each, the second of each, and so on."""
    left = [iter(items) for items in lists]
    while left:
        for items in list(left):
            try:
                yield next(items)
            except StopIteration:
                left.remove(items)


def digest_of_pairs(pairs: object) -> str:
    """Of names, captions and classes of all pairs, as far as no code of a user's own is asked for them.

    No image is opened. Of a data set of the user's, names alone; empty for streams, and for sources that are no `Pairs`.
    """
    if not isinstance(pairs, Pairs):
        return ""
    listed: list[Sequence[object]] = [pairs.ids]
    if pairs.pure or isinstance(pairs, ListedPairs):
        listed += [pairs.captions, pairs.known_labels]
    found = hashlib.sha256()
    for pair in zip(*listed, strict=True):
        found.update(f"{pair!r}\n".encode())
    return found.hexdigest()


def digest_of_images(data: PlacedImages, *, files: bool = False) -> str:
    """Of the preprocessing, names and classes of images, and the first one's pixels.

    Args:
        data: the images.
        files: of sizes and times of their files too, which differ from machine to machine.
    """
    places = range(len(data))
    found = hashlib.sha256(
        (stable_repr(data.preprocess) if isinstance(data, ListedImages) else str(len(data))).encode()
    )
    listed: Iterable[Any] = ()
    written = [""] * len(data)
    if isinstance(data, ListedImages):
        listed = data.listed(places)
        if files:
            written = [_written(file) for file in data.files_of(places)]
    elif isinstance(data, Pairs):
        listed = zip(data.ids, data.known_labels, strict=True)
    for (name, label), when in zip(listed, written, strict=False):
        found.update(f"{name}\0{label}\0{when}\n".encode("utf-8", "surrogateescape"))
    for batch in data.part(places if files else places[:1], 1):
        found.update(batch.images.float().cpu().contiguous().numpy().data)
        break
    return found.hexdigest()[:16]


def _written(file: Path | None) -> str:
    if file is not None:
        with suppress(OSError):  # what cannot be read is left out later, with the reason
            return f"{file.stat().st_size} {file.stat().st_mtime_ns}"
    return ""
