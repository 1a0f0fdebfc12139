"""Factorisations that do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch works with one thread.

    For factorisations of batches of small matrices: with several threads MKL's LU of such a batch fails or does not end,
    its eigenvalues and singular values take a hundred times as long when processors are busy, and digits differ. With
    one they take fractions of a second.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
