"""A few kills of what `python -m tests.kill_loop` kills many times."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.kill_loop import loop

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes, to kill them")


@pytest.mark.parametrize("name", ["poison", "extract"])
def test_a_killed_run_leaves_what_is_whole_and_goes_on(tmp_path: Path, name: str) -> None:
    assert sys.platform != "win32"
    assert loop(name, 3, 0, tmp_path).startswith(f"{name}: 3 kills, ")
