"""Batches of images out of what a user has: a tensor, batches, or a source such as `FolderSource`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Source(Protocol):
    """Images as the tower takes them, such as `FolderSource`: `batch.images` of its batches."""

    @property
    def skipped(self) -> Sequence[Any]: ...

    def batches(self, batch_size: int = ...) -> Iterator[Any]: ...


Images = Tensor | Iterable[Any] | Source
"""`[batch 3 h w]` as the tower takes them, batches of such images one after another, or a source of them."""


def image_batches(images: Images, *, batch_size: int) -> Iterator[Float[Tensor, "batch 3 h w"]]:
    """Batches of at most `batch_size` images, none of them empty.

    Raises:
        ValueError: a batch size below one, or something else than batches of images.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1; received {batch_size}")
    batches: Iterable[Any] = [images] if isinstance(images, Tensor) else ()
    if isinstance(images, Source):
        batches = (batch.images for batch in images.batches(batch_size))
    elif not isinstance(images, Tensor):
        batches = images
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            found = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"expected batches of images [batch, 3, h, w] as the tower takes them; received {found}; preprocess "
                "pictures with model.preprocess or pixels with model.normalize, and pass at least one"
            )
        yield from batch.split(batch_size) if len(batch) else ()
