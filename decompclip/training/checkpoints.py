"""Checkpoints that are whole or not there: what a kill or a full disk interrupts leaves the last one as it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write beside `path`, make sure that it is on the disk, then take the place of the last one.

    Raises:
        OSError: it cannot be written; the checkpoint before it is as it was.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        before = f"the one of before, {path}, is intact" if path.exists() else "there was none before it"
        raise OSError(
            f"expected to write a checkpoint to {partial}; received {_first_line(error)}; {before}: make room on "
            "the disk and run the same again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is broken or no checkpoint of a training.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, UnpicklingError) as error:
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
    cause: BaseException = error.__context__ if isinstance(error.__context__, OSError) else error
    return (str(cause) or type(cause).__name__).splitlines()[0]
