"""Figures of an analysis as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompclip.figures.theme import write_figure

if TYPE_CHECKING:
    from analyses.study.command import Analysis


def draw(analysis: Analysis, record: Mapping[str, Any], folder: Path, formats: tuple[str, ...]) -> list[Path]:
    """Each figure in each format, beside the record: `figure1.png`, or `figure2-separate.png` where there are several.

    Raises:
        ValueError: an unknown format.
        RuntimeError: an image is asked for where no Chrome is.
    """
    written = []
    if not formats:
        return written
    figures = analysis.plot(record)
    for name, figure in figures.items():
        stem = record["analysis"] if len(figures) == 1 else f"{record['analysis']}-{name}"
        for suffix in formats:
            path = folder / record["family"]["name"] / f"{stem}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_figure(figure, path, script="beside")
            written.append(path)
    return written
