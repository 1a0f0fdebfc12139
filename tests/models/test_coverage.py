"""The coverage page: it names every configuration, tells what was measured, and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest

from analyses.benchmarks import coverage
from analyses.benchmarks.coverage import PAGE, Row, measure, page, run
from tests.models.tower_families import FAMILY_OF

LISTED = open_clip.list_models()


@pytest.fixture(scope="module")
def row() -> Row:
    return measure("PE-Core-T-16-384")


def test_the_page_has_every_configuration() -> None:
    """Made again whenever the classified table has changed: `python -m analyses.coverage`."""
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in LISTED if name in FAMILY_OF and f"`{name}`" not in text] == []
    assert "**116 of 116** are decomposed exactly" in text


def test_a_row_tells_of_the_whole_tower_and_its_errors(row: Row) -> None:
    assert (row.n_layers, row.n_heads, row.n_prefix, row.d_embed) == (12, 3, 1, 512)
    assert row.image_size == (384, 384)
    assert row.terms == 12 * 3 + 12 + 1 + 1  # heads, MLPs, the pool's MLP, the embedding
    assert row.parameters == pytest.approx(6.1e6, rel=0.01)
    assert row.exact


@pytest.mark.parametrize(
    "worse",
    [
        {"way_back": False},
        {"parity": {"fp64": 1e-9, "fp32": 1e-7}},
        {"sum_error": {"centred": {"fp64": 0.0, "fp32": 2e-4}, "paper": {"fp64": 0.0, "fp32": 0.0}}},
    ],
    ids=str,
)
def test_what_is_not_exact_is_not_counted(row: Row, worse: dict[str, object]) -> None:
    assert "**1 of 116** are decomposed exactly" in page([row])
    assert "**0 of 116** are decomposed exactly" in page([replace(row, **worse)])


def test_a_killed_run_resumes(tmp_path: Path, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def fake(name: str) -> Row:
        if name == "killed":
            raise KeyboardInterrupt
        measured.append(name)
        return replace(row, name=name)

    monkeypatch.setattr(coverage, "measure", fake)
    with pytest.raises(KeyboardInterrupt):
        run(["a", "b", "killed"], tmp_path / "rows")
    again = run(["a", "b", "c"], tmp_path / "rows")
    assert measured == ["a", "b", "c"]
    assert page(again) == page([replace(row, name=name) for name in "abc"])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="open_clip has no configuration 'ViT-Z-1'"):
        measure("ViT-Z-1")
