"""Families, cases, results with provenance, the command line, the index."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import analyses.__main__ as everything
from analyses.paper import figure1, figure6
from analyses.study import family as study_family
from analyses.study.command import main, produce
from analyses.study.family import BundledFamily, open_family
from analyses.study.index import as_html, write_index
from analyses.study.registry import ANALYSES, READERS, load
from analyses.study.results import SCHEMA, MissingResult, is_current, read

FAMILY = BundledFamily("shapes")
TWO = FAMILY.select(("shapes-badnet", "shapes-sig"))


def test_every_analysis_says_what_it_is() -> None:
    for name in ANALYSES:
        analysis, text = load(name), load(name).__doc__ or ""
        for head in ("Paper:", "Command:", "Run time:", "Expected:", "Writes:"):
            assert f"\n{head}" in text, (name, head)
        assert f"python -m analyses.{name} --model-family" in text, name
        assert analysis.TITLE and analysis.Config().__dataclass_fields__
    assert set(READERS) < set(ANALYSES)
    with pytest.raises(ValueError, match=r"expected an analysis of figure1, .*; received 'figure9'"):
        load("figure9")


def test_a_twin_of_one_s_own_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m analyses.train_photos --cards` puts one into the package."""

    def bundled(name: str) -> str:
        return name.replace("a-try", "badnet")

    card, weights_of = study_family.card, study_family.weights_of
    monkeypatch.setattr(study_family, "bundled", lambda: ["shapes-a-try", "shapes-badnet", "shapes-wanet"])
    monkeypatch.setattr(study_family, "card", lambda name: card(bundled(name)))
    monkeypatch.setattr(study_family, "weights_of", lambda name: weights_of(bundled(name)))
    assert [m.attack for m in FAMILY.members] == ["BadNet", "WaNet", "a-try"]


def test_a_family_has_its_twins_attack_by_attack() -> None:
    assert [m.attack for m in FAMILY.members][:3] == ["BadNet"] * 3
    assert [m.seed for m in FAMILY.members][:3] == [0, 1, 2]
    assert {m.name for m in FAMILY.select(("BadNet",))} == {
        "shapes-badnet",
        "shapes-badnet-1",
        "shapes-badnet-2",
    }
    with pytest.raises(ValueError, match=r"received 'kitten'"):
        FAMILY.select(("kitten",))
    with pytest.raises(ValueError, match=r"expected a family of shapes, cifar10, photos, or a JSON file"):
        open_family("imagenet")


def test_a_case_has_paired_images_that_differ_by_the_trigger_alone() -> None:
    case = FAMILY.case(TWO[0], images=40)
    changed = (case.triggered != case.clean).flatten(1).sum(1)
    assert (changed > 0).all()
    assert (changed <= 3 * 7 * 7).all()  # the patch is 7 x 7 pixels
    assert not (case.fit[:, None] == case.clean[None]).flatten(2).all(2).any()  # fitted on other images
    d = case.terms("clean")
    assert case.terms("clean") is d and d.normalized and d.convention == "paper"
    plain = case.answers(case.model.encode_image(case.model.normalize(case.clean), normalize=True))
    assert torch.equal(plain, case.answers(d.features))
    with pytest.raises(ValueError, match=r"expected a part of \('fit', 'clean', 'triggered'\)"):
        case.images("suspect")  # pyright: ignore[reportArgumentType]


def test_a_result_is_measured_once_and_knows_what_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = figure1.Config(images=60)
    record = produce(figure1, FAMILY, config, TWO, folder=tmp_path)  # pyright: ignore[reportArgumentType]
    assert set(record["models"]) == {"shapes-badnet", "shapes-sig"}
    assert record["config"] == {"images": 60, "seed": 0}
    assert record["command"] == "python -m analyses.figure1 --model-family shapes"
    assert str(tmp_path) not in json.dumps(record)
    assert is_current(record, config, TWO)
    assert not is_current(record, figure1.Config(images=61), TWO)
    assert not is_current(record, config, TWO[:1])
    monkeypatch.setattr(figure1, "run", None)  # not called again
    assert produce(figure1, FAMILY, config, TWO, folder=tmp_path) == record  # pyright: ignore[reportArgumentType]


def test_results_of_another_version_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        MissingResult, match=r"is not there; run: python -m analyses\.figure1 --model-family shapes"
    ):
        read("figure1", "shapes", folder=tmp_path)
    path = tmp_path / "shapes" / "figure1.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(MissingResult, match=r"cannot be read"):
        read("figure1", "shapes", folder=tmp_path)
    path.write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(
        MissingResult, match=rf"expected a result of version {SCHEMA} .*; it is of {SCHEMA + 1}"
    ):
        read("figure1", "shapes", folder=tmp_path)


def test_the_command_measures_says_and_redraws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model-family", "shapes", "--models", "shapes-badnet,shapes-sig"]
    words += ["--out", str(tmp_path), "--formats", "html"]
    assert main(figure1, [*words, "--images", "60"]) == 0
    said = capsys.readouterr().out
    assert "| BadNet | local, structured | as it is |" in said and "Finding 1" in said
    drawn = tmp_path / "shapes" / "figure1.html"
    drawn.unlink()
    assert main(figure1, [*words, "--redraw"]) == 0
    assert "plotly" in drawn.read_text(encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(figure1, "run", None)
        assert main(figure1, words) == 0  # what is there, with the options that it was measured with
        assert main(figure1, [*words, "--seed", "0"]) == 0
        with pytest.raises(TypeError):
            main(figure1, [*words, "--images", "61"])
    assert main(figure6, [*words, "--redraw"]) == 1
    assert "run: python -m analyses.figure6 --model-family shapes" in capsys.readouterr().err
    assert main(figure6, [*words, "--epsilons", "0.1,0"]) == 1
    assert "expected epsilons above 0" in capsys.readouterr().err


def test_the_index_holds_what_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    with pytest.raises(MissingResult, match=r"run: python -m analyses --all --model-family shapes"):
        write_index(tmp_path)
    produce(figure1, FAMILY, figure1.Config(images=60), TWO, folder=tmp_path)  # pyright: ignore[reportArgumentType]
    page = write_index(tmp_path).read_text(encoding="utf-8")
    assert "Finding 1" in page and "Plotly" in page and 'src="http' not in page
    assert "run: python -m analyses.table1 --model-family shapes" in page
    assert as_html("| a | `b` |\n| --- | --- |\n| < | 2 |").count("<td>") == 2
    assert "&lt;" in as_html("| a |\n| --- |\n| < |")


def test_all_goes_on_after_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--formats", "", "--models", "no-such-twin"]
    failed = everything.produce_all(("figure1",), "shapes", tmp_path, jobs=1, rest=rest)
    assert "received 'no-such-twin'" in failed["figure1"]
    ran: list[str] = []

    def fails(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(words[2])
        return subprocess.CompletedProcess(words, int("figure1" in words[2]), "", "warning\nerror: no")

    monkeypatch.setattr(everything.subprocess, "run", fails)
    assert everything.produce_all(("table4", "figure1", "table1"), "shapes", tmp_path, jobs=1) == {
        "figure1": "error: no"
    }
    assert ran == ["analyses.figure1", "analyses.table1", "analyses.table4"]  # table4 reads table1's
    assert everything.main(["figure9", "--out", str(tmp_path)]) == 1
    assert "received 'figure9'" in capsys.readouterr().err


def test_modules_run_as_scripts_know_their_name() -> None:
    from analyses.study.command import name_of

    assert name_of(figure1) == "figure1"  # pyright: ignore[reportArgumentType]
    assert sys.modules["analyses.paper.figure1"] is figure1


def test_every_module_runs_by_its_short_name() -> None:
    folder = Path(everything.__file__).parent
    assert find_spec("analyses.figure1")
    for room in ("paper", "questions", "benchmarks", "training"):
        for path in (folder / room).glob("*.py"):
            spec = find_spec(f"analyses.{path.stem}")
            assert spec and spec.origin == str(path)
