"""What can go wrong between a model's name and a model in memory."""

from __future__ import annotations

from decompclip.models.tower_errors import ModelError, UnsupportedTowerError

__all__ = ["CheckpointError", "ModelError", "UnknownModelError", "UnsupportedTowerError"]


class UnknownModelError(ModelError):
    """Neither a bundled model nor a name or pretrained tag that open_clip knows."""


class CheckpointError(ModelError):
    """A file of weights that is missing, damaged, unsafe, or another model's."""
