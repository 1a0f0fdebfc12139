"""A model to attack, and pixels."""

from __future__ import annotations

import pytest

from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP


@pytest.fixture(scope="session")
def shapes_model() -> HookedCLIP:
    """The bundled clean model; tests leave it as it is."""
    return load_bundled("shapes")
