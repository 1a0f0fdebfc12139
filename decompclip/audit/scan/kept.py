"""What a scan has found so far, on disk: a killed one goes on from there, to the same numbers."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from decompclip import __version__
from decompclip.audit.scan.result import ScanConfig
from decompclip.files import atomic_write
from decompclip.models.clip import HookedCLIP

EVERY = 3.0
"""Seconds between two writes: more is not lost."""


class Kept:
    """The state of one probe's search.

    Args:
        path: of its file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.state = path, {}
        self._last = time.monotonic()
        if path is not None and path.exists():
            try:
                self.state = torch.load(path, weights_only=True, map_location="cpu")
            except (RuntimeError, EOFError, UnpicklingError):  # damaged: searched again
                self.state = {}

    def due(self) -> bool:
        """Whether it is time to write, since what is lost otherwise takes a while."""
        return self.path is not None and time.monotonic() - self._last >= EVERY

    def save(self, **state: Any) -> None:
        """Write what is there now, beside what was kept before."""
        self.state |= state
        if self.path is not None:
            with atomic_write(self.path) as partial:
                torch.save(self.state, partial)
        self._last = time.monotonic()


def kept_for(
    folder: Path | None,
    model: HookedCLIP,
    classifier: Tensor,
    images: tuple[Tensor, ...],
    config: ScanConfig,
    probe: str,
) -> Kept:
    """What was kept of this probe, of a scan of these weights, images, classes and options, and of no other."""
    if folder is None:
        return Kept()
    mark = hashlib.sha256(json.dumps([__version__, probe, asdict(config)], sort_keys=True).encode())
    for part in (*(value for _, value in sorted(model.state_dict().items())), classifier, *images):
        mark.update(str(tuple(part.shape)).encode())
        mark.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Kept(folder / f"{mark.hexdigest()[:24]}.pt")
