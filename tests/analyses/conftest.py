"""Small runs: fewer draws of what chance gives, which these tests do not look at."""

from __future__ import annotations

import pytest

from decompclip.operators import roles


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "CHANCE_DRAWS", 5)
