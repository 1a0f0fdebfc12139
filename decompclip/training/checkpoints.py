"""Checkpoints that are whole or not there: what a kill or a full disk interrupts leaves the last one as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from decompclip.files import atomic_write
from decompclip.models.archives import check_archive


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Take the place of the last one once it is on the disk.

    Raises:
        OSError: it cannot be written; the checkpoint before it is as it was.
    """
    with atomic_write(path) as partial, partial.open("wb") as file:
        torch.save(dict(state), file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is broken or no checkpoint of a training.
    """
    try:
        check_archive(path)
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, UnpicklingError, ValueError) as error:
        raise ValueError(
            f"expected a checkpoint of a training in {path}; received a file that cannot be read "
            f"({_first_line(error)}); delete it to start anew"
        ) from error
    if not (
        isinstance(state, dict) and {"recipe", "modules", "optimizers", "step", "history"} <= state.keys()
    ):
        raise ValueError(
            f"expected a checkpoint of a training in {path}; received another file of torch's; give another name"
        )
    return state


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
