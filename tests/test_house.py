"""What `make house` prints stays small."""

from __future__ import annotations

from tests.house import way


def test_an_image_goes_through_few_files() -> None:
    files = way()
    assert "decompclip/decomposition/capture.py" in files and "decompclip/figures/bars.py" in files
    assert len(files) <= 22, files
