"""What can go wrong between a model's name and a tower that runs."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be had as asked for; the message says what to do."""


class UnsupportedTowerError(ModelError):
    """An image tower that `HookedViT` cannot run exactly."""
