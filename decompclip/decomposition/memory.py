"""How much memory may be taken: work is done in as few pieces as fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

SHARE = 4
"""One part in so many of the memory at hand may be taken: the run itself, and others, need the rest."""

CACHED = 2**26
"""Bytes of a temporary that a CPU's caches still serve; more at once is no faster there."""


def room(device: torch.device) -> int:
    """Bytes that may be taken on a device, a quarter of those at hand."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + own) // SHARE
    return min(psutil.virtual_memory().available, *_allowed()) // SHARE


def temporary(device: torch.device) -> int:
    """Bytes of what is dropped at once: on an accelerator, where each piece costs a launch, all that may be taken."""
    return min(room(device), CACHED) if device.type == "cpu" else room(device)


def pieces(count: int, size: int, budget: int) -> Iterator[slice]:
    """`count` things of `size` bytes each in as few slices as fit the budget, all about as long; one thing at least."""
    length = max(1, min(count, budget // max(size, 1)))
    number = -(-count // length)
    for piece in range(number):
        yield slice(piece * count // number, (piece + 1) * count // number)


def _allowed() -> list[int]:
    """What a container's limit leaves, where there is one (Linux, cgroup 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text("ascii") for name in ("max", "current"))
        return [max(0, int(limit) - int(used))]
    except (OSError, ValueError):  # no such files, or "max": no limit
        return [2**63]
