"""What can go wrong on the way to a model."""

from __future__ import annotations


class UnknownModelError(ValueError):
    """No model of that name, or no such pretrained weights."""


class UnsupportedTowerError(NotImplementedError):
    """An image tower that has no exact decomposition here."""


class CheckpointError(ValueError):
    """A weights file that is broken, unsafe, or of another model."""
