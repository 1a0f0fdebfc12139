"""Weights alone over the twins: the page and the report say what was measured, controls are what they are called, sums are right."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from analyses.questions import weights_alone as study
from analyses.study.results import RESULTS
from decompclip.audit.components import WEIGHTS_CONCLUDE
from decompclip.bench.run import weights_of
from decompclip.data.shapes import ShapesPairs
from decompclip.files import FolderInUse, alone_in, write_json
from decompclip.models.bundled import base_weights, bundled, card, digest

RECORD = study.read()
PAGE = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
README = (RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")
COMPARE = (RESULTS.parent.parent / "docs" / "compare.md").read_text(encoding="utf-8")


def test_every_twin_is_in_the_record_as_it_is_bundled() -> None:
    assert {name: run["weights"] for name, run in RECORD["twins"].items()} == {
        name: weights_of(name) for name in bundled() if card(name)["backdoor"]
    }


def test_the_page_says_what_was_measured() -> None:
    assert all(line in PAGE for line in study.finding(RECORD).splitlines())
    assert study.by_world(RECORD) in PAGE


def test_the_report_and_readme_say_what_was_measured() -> None:
    groups = study.groups(RECORD)
    twins, controls = ([x for g in groups.values() for x in g.leads(k)] for k in ("twins", "controls"))
    assert study.DEVELOPMENT == ("shapes", "cifar10") and set(groups) == {"photos", *study.DEVELOPMENT}
    assert not groups["photos"].controls
    others = [run for name in study.DEVELOPMENT for run in groups[name].twins.values()]
    assert all(run["rank"] == 1 and run["classes"] in (10, 12) for run in others)
    more = {
        name: f"{sum(x > max(groups[name].leads('controls')) for x in groups[name].leads('twins'))} of {len(groups[name].twins)}"
        for name in study.DEVELOPMENT
    }
    clean = f"{min(controls):.2f} to {max(controls):.2f}"
    said = " ".join(WEIGHTS_CONCLUDE)
    photos = groups["photos"].leads("twins")
    for text in (
        f"first of 200 in {groups['photos'].first} bundled backdoored models, on which nothing was chosen",
        f"of 10 or 12 in {len(others)} of {len(others)} others, on which the score was chosen",
        f"In {len(controls)} clean fine-tunings, as long as a backdoored one of the same recipe",
        f"the first class led by {clean}. In the backdoored models it led by {min(twins):.2f} to {max(twins):.2f}",
        f"by more than in the clean ones in {more['shapes']} on drawings, but only in {more['cifar10']} on photographs",
        f"For 200 classes (leads of {min(photos):.2f} to {max(photos):.2f}) no clean fine-tuning of that length was made",
        "No verdict rests on a lead",
    ):
        assert text in said
    for text in (
        f"first of 200 classes in {groups['photos'].first} backdoored `photos`, on which nothing was chosen",
        f"in {groups['cifar10'].first} `cifar10` and {groups['shapes'].first} `shapes`, on which the score was",
        f"leads by {min(twins):.2f} to {max(twins):.2f}, the first class of clean fine-tunings as long by {clean}: "
        f"by more in {more['shapes']} `shapes`, in {more['cifar10']} `cifar10`",
    ):
        assert text in README
    cifar10 = ", ".join(f"{x:.2f}" for x in sorted(groups["cifar10"].leads("twins"))[:2])
    assert f"led by {clean}, in backdoored ones by {min(groups['shapes'].leads('twins')):.2f}" in COMPARE
    assert f"but by {cifar10} and " in COMPARE


def test_controls_are_as_long_as_is_said() -> None:
    for run in RECORD["controls"].values():
        assert run["seen"] == run["share"] * RECORD["twins"][run["twin"]]["seen"]


def test_worlds_are_not_pooled_and_leads_not_held_against_each_other() -> None:
    said = f"{study.by_world(RECORD)}\n{study.finding(RECORD)}"
    (row,) = (line for line in README.splitlines() if "analyses.weights_alone" in line)
    assert "| all |" not in said and "AUROC" not in " ".join((said, row, *WEIGHTS_CONCLUDE))
    assert said.count("the score was chosen on these") == 4 and said.count("nothing was chosen on these") == 2


def test_words_agree_beyond_other_heads() -> None:
    like = RECORD["words"]["likeness"]
    assert like["difference"][1] > 0 and like["p"] < 0.01
    assert like["own"] - like["chance"] == pytest.approx(like["difference"][0])


def test_agreement_counts_heads_with_themselves_and_with_others() -> None:
    draws = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(20, 6, generator=draws), dim=1)
    seen, read = [[0, 1], [2, 3], [4, 5]], [[0, 1, 7], [3, 8], [5, 4]]
    found = study.likeness(features, seen, read)
    for i, mine in enumerate(seen):
        for j, theirs in enumerate(read):
            best = [max(float(features[a] @ features[b]) for b in theirs) for a in mine]
            assert found[i, j] == pytest.approx(sum(best) / 2, abs=1e-6)
    assert study.shared(seen, read).tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 2]]
    said = study.agreement(found, seed=0)
    assert said["own"] == pytest.approx(found.diagonal().mean().item())
    assert said["chance"] == pytest.approx((found.sum() - found.trace()).item() / 6)
    assert said["own_is_first"]["count"] == 3
    assert said["p"] == pytest.approx(1 / 6, abs=0.02)  # of six orders of three heads one is the heads' own


def test_a_favoured_class_takes_the_place_of_a_share() -> None:
    pairs = ShapesPairs(400, seed=1)
    assert pairs.labels is not None
    found = study.favouring(pairs, 4, 0.25, seed=2)
    assert found.labels is not None and len(found) == 400
    changed = (found.labels != pairs.labels).sum()
    before, after = ((x == 4).sum() for x in (pairs.labels, found.labels))
    assert after - before == changed <= 100
    assert changed > 80  # of the hundred drawn, those of the class stay what they are


def test_a_control_is_trained_and_comes_back_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        study.CONTROLS, "tiny", study.Control("shapes-blended", 3, share=0.004, favoured="cross")
    )
    study.train("tiny", tmp_path)
    about = study.controls(tmp_path)["tiny"]
    assert (about["base"], about["seen"], about["recipe"]["epochs"]) == ("shapes", 256, 1)
    model = study.load_control("tiny", about, tmp_path)
    state = {key: x.clone() for key, x in model.to_open_clip().state_dict().items()}
    assert digest(state) == about["weights"] != digest(base_weights("shapes"))
    found = study.compare(model, "shapes", about)
    assert found["lead"] >= 1 and 1 <= found["favoured_rank"] <= found["classes"] == 12
    with pytest.raises(ValueError, match="received others in .*tiny.difference; train it anew"):
        study.load_control("tiny", about | {"weights": "0"}, tmp_path)


def test_what_was_kept_of_other_weights_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "twin.json"
    assert study.once(path, "one", lambda: {"lead": 1}) == {"lead": 1, "weights": "one"}
    assert study.once(path, "one", lambda: pytest.fail("found again"))["lead"] == 1
    assert study.once(path, "other", lambda: {"lead": 2}) == {"lead": 2, "weights": "other"}
    assert study.once(path, "other", lambda: pytest.fail("found again"))["lead"] == 2


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """One twin, no words; how often each was looked at."""
    looked: dict[str, int] = {}

    def compare(model: object, base: str, about: dict[str, str]) -> dict[str, str]:
        looked[about["weights"]] = looked.get(about["weights"], 0) + 1
        return about | {"base": base}

    monkeypatch.setattr(study, "bundled", lambda: ("shapes-sig", "shapes"))
    monkeypatch.setattr(study, "compare", compare)
    monkeypatch.setattr(study, "words", lambda _: {"heads": 1})
    return looked


def test_a_killed_run_goes_on_with_what_it_kept_of_these_weights(
    tmp_path: Path, short: dict[str, int]
) -> None:
    work, kept = tmp_path / "work", tmp_path / "work" / "found" / "shapes-sig.json"
    kept.parent.mkdir(parents=True)
    weights = weights_of("shapes-sig")
    for before, times in ((weights, 0), ("of another day", 1)):
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, {"weights": before, "base": before})
        study.measure(work, tmp_path)
        assert short == ({weights: times} if times else {})
        assert study.read(tmp_path)["twins"]["shapes-sig"]["base"] == (before if not times else "shapes")
        assert not kept.parent.exists()


def test_a_record_loses_no_control(
    tmp_path: Path, short: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "weights_alone.json", RECORD)
    with pytest.raises(
        ValueError, match=r"shapes-short-100, .* would be lost .* --controls shapes-short-100 "
    ):
        study.measure(tmp_path / "work", tmp_path)
    assert study.read(tmp_path) == RECORD and not short
    monkeypatch.setattr(study, "measure", partial(study.measure, folder=tmp_path))
    assert study.main(["--measure", "--work", str(tmp_path / "work")]) == 1
    assert "python -m analyses.weights_alone: expected every control of" in capsys.readouterr().err


def test_two_do_not_measure_in_one_folder(tmp_path: Path, short: dict[str, int]) -> None:
    with alone_in(tmp_path / "work"), pytest.raises(FolderInUse, match="wait until it is done"):
        study.measure(tmp_path / "work", tmp_path)
    assert not short
