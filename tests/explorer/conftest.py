"""Twenty drawings, explored."""

from __future__ import annotations

import pytest

import decompclip
from decompclip.data.shapes import Shapes
from decompclip.explorer.explore import Explorer
from decompclip.models.clip import HookedCLIP

EVIL = "</script><img src=x onerror=nobody.defined()>"


@pytest.fixture(scope="session")
def model() -> HookedCLIP:
    return decompclip.load("shapes-badnet")


@pytest.fixture(scope="session")
def explorer(model: HookedCLIP) -> Explorer:
    images = model.normalize(Shapes(20, seed=3).draw(range(20)).images)
    return decompclip.explore(
        model, images, texts=["a star", "a red ring"], names=[EVIL, *map(str, range(1, 20))]
    )
