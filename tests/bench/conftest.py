"""One twin, measured small."""

from __future__ import annotations

from typing import Any

import pytest

from decompclip.bench.plan import Plan
from decompclip.bench.run import Subject, measure

TWIN, IMAGES = "shapes-blended", 120


@pytest.fixture(scope="session")
def plan() -> Plan:
    return Plan(models=(TWIN,), detectors=("k-distance", "Decomp-Det (paper)"), images=IMAGES, draws=2)


@pytest.fixture(scope="session")
def subject() -> Subject:
    return Subject.of(TWIN, images=IMAGES, seed=0, draws=2)


@pytest.fixture(scope="session")
def measured(plan: Plan) -> dict[str, Any]:
    return measure(TWIN, plan, seed=0)
