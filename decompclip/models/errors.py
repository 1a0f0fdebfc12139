"""What can go wrong between a model's name and a model in memory; and warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings

from decompclip.tower.config import ModelError, UnsupportedTowerError

__all__ = ["CheckpointError", "ModelError", "UnknownModelError", "UnsupportedTowerError"]


class UnknownModelError(ModelError):
    """Neither a bundled model nor a name or pretrained tag that open_clip knows."""


class CheckpointError(ModelError):
    """A file of weights that is missing, damaged, unsafe, or another model's."""


def first_line(error: Exception) -> str:
    """What an error of another package says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def warn_caller(message: str) -> None:
    """A UserWarning at the line that called into this package."""
    package = __name__.split(".")[0]
    frame, level, above = sys._getframe(1), 2, 3  # `above`: the level of the frame's own caller
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] == package:
            level = above
        frame, above = frame.f_back, above + 1
    warnings.warn(message, stacklevel=level)
