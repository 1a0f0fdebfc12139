"""Weights alone over the twins: the page and the report say what was measured, controls are what they are called, sums are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from analyses.questions import weights_alone as study
from analyses.study.results import RESULTS
from decompclip.audit.weights_alone import CONCLUDES
from decompclip.bench.run import weights_of
from decompclip.data.shapes import ShapesPairs
from decompclip.models.bundled import base_weights, bundled, card, digest

RECORD = study.read()
PAGE = (RESULTS.parent / "README.md").read_text(encoding="utf-8")


def test_every_twin_is_in_the_record_as_it_is_bundled() -> None:
    assert {name: run["weights"] for name, run in RECORD["twins"].items()} == {
        name: weights_of(name) for name in bundled() if card(name)["backdoor"]
    }


def test_the_page_says_what_was_measured() -> None:
    assert all(line in PAGE for line in study.finding(RECORD).splitlines())
    assert study.by_world(RECORD) in PAGE


def test_the_report_says_what_was_measured() -> None:
    every, photos = study.groups(RECORD)["all"], study.groups(RECORD)["photos"]
    said = " ".join(CONCLUDES)
    first, above = every.first, every.above
    leads = every.leads("controls")
    value, low, high = every.area
    for text in (
        f"first in {first.count} of {first.total} bundled backdoored models ({100 * first.value:.0f} % [{100 * first.low:.0f}, {100 * first.high:.0f}])",
        f"{photos.first.count} of {first.total} of them",
        f"In {len(leads)} clean fine-tunings the first class led by {min(leads):.2f} to {max(leads):.2f}",
        f"{above.count} of {above.total} backdoored ones lead by more",
        f"AUROC of the lead {value:.2f} [{low:.2f}, {high:.2f}]",
    ):
        assert text in said


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
