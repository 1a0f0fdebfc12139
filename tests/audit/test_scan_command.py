"""`decompclip audit` with clean images alone, and what is said before any weights are loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from decompclip.audit import scan
from decompclip.cli import app
from decompclip.data.images import FolderSource
from decompclip.models import loading


def invoke(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_clean_images_alone_are_scanned(
    random_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "ScanConfig", partial(scan.ScanConfig, steps=4, images=8))
    out = tmp_path / "report"
    code, said = invoke(
        "audit", "shapes-badnet", "--clean", "shapes", "--limit", 60, "--out", out, "--reference", "shapes"
    )
    assert code == 0, said
    (found,) = json.loads((out / "audit.json").read_text(encoding="utf-8"))["audits"]
    assert found["kind"] == "scan" and found["counts"] == {"fit": 23, "held_out": 37}
    assert found["verdict"]["level"] in ("cannot tell", "no sign", "suspicious")  # of random weights
    assert found["reference"]["name"] == "shapes (reference)"
    assert found["verdict"]["headline"] in said and "60 clean images, 12 classes" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "can and cannot conclude" in page and found["verdict"]["headline"] in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--clean", "shapes", "--target", "star"), "--suspect images with --target"),
        (("--clean", "shapes", "--false-positives", "0.1"), "--suspect images with --false-positives"),
        (("--clean", "shapes", "--suspect", "shapes:badnut"), "did you mean shapes:badnet"),
        (("--clean", "nowhere", "--classes", "CLASSES"), "there is no folder nowhere"),
        (("--clean", "EMPTY", "--classes", "CLASSES"), "none of them such"),
        (("--clean", "shapes", "--false-positives", "2"), "false_positives between 0 and 1"),
    ],
)
def test_what_can_be_known_is_said_before_weights_are_loaded(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the input was looked at")

    monkeypatch.setattr(loading, "load", too_early)
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    places = {"EMPTY": tmp_path / "empty", "CLASSES": tmp_path / "classes.txt"}
    code, said = invoke(
        "audit", "shapes", *(places.get(word, word) for word in words), "--out", tmp_path / "out"
    )
    assert code == 2, said
    assert message in " ".join(said.split())


def test_a_folder_gives_a_random_subset_of_all_its_classes(
    random_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("circle", "star"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(400):
            (tmp_path / "images" / name / f"{number}.png").touch()
    (tmp_path / "classes.txt").write_text("circle\nstar\n")
    seen: list[FolderSource] = []

    def looked_at(model: object, clean: FolderSource, *_: object, **__: object) -> None:
        seen.append(clean)
        raise ValueError("seen")

    monkeypatch.setattr(scan, "run_scan", looked_at)
    words = ["--clean", tmp_path / "images", "--classes", tmp_path / "classes.txt", "--out", tmp_path / "out"]
    code, said = invoke("audit", "shapes", *words)
    assert code == 2 and "seen" in said
    (source,) = seen
    stars = sum("star" in str(file) for file in source._items)
    assert len(source) == 192 + 300 and 200 < stars < 300
