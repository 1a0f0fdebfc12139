"""A scan that was stopped goes on, and ends with the numbers of one that was not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decompclip.audit import scan as kept
from decompclip.audit.collect import open_source
from decompclip.audit.scan import ScanConfig, run_scan
from decompclip.models.clip import HookedCLIP

CONFIG = ScanConfig(steps=4, images=2, fit=16, held_out=24, most_classes=3)


def stopped_after(most: int) -> Any:
    seen = 0

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        nonlocal seen
        for item in items:
            if "clean images" not in description:
                seen += 1
                if seen > most:
                    raise KeyboardInterrupt
            yield item

    return track


def test_it_goes_on_to_the_same_numbers(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "EVERY", 0.0)
    source = open_source("shapes", model, model.class_names, limit=CONFIG.fit + CONFIG.held_out)

    def scan(**options: Any) -> dict[str, Any]:
        return run_scan(model, source, model.class_names, config=CONFIG, **options).to_dict()

    whole = scan()
    for most in (2, 5, 3, 4):  # among the glimpses, and the steps of three probes
        with pytest.raises(KeyboardInterrupt):
            scan(keep=tmp_path / "kept", track=stopped_after(most))
    steps: list[str] = []

    def counted(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        for item in items:
            steps.extend([description] if "clean images" not in description else [])
            yield item

    assert scan(keep=tmp_path / "kept", track=counted) == whole
    in_all = 3 * (len(model.class_names) + CONFIG.steps)
    assert len(steps) == in_all - (2 + 5 + 3 + 4)
    steps.clear()
    assert scan(keep=tmp_path / "kept", track=counted) == whole and not steps
    other = run_scan(
        model,
        source,
        model.class_names,
        config=ScanConfig(**{**vars(CONFIG), "seed": 1}),
        keep=tmp_path / "kept",
        track=counted,
    )
    assert other.to_dict() != whole and len(steps) == in_all  # another scan takes nothing of this one
