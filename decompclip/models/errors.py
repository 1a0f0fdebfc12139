"""What can go wrong between a model's name and a model in memory."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be had as asked for; the message says what to do."""


class UnknownModelError(ModelError):
    """Neither a bundled model nor a name or pretrained tag that open_clip knows."""


class UnsupportedTowerError(ModelError):
    """An image tower that `HookedViT` cannot run exactly."""


class CheckpointError(ModelError):
    """A file of weights that is missing, damaged, unsafe, or another model's."""
