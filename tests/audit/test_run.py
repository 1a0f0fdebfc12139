from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from decompclip.audit import AuditConfig, AuditResult, run_audit
from decompclip.audit.collect import open_source
from decompclip.audit.interventions import rule_name
from decompclip.audit.result import jsonable
from decompclip.data.images import ImageBatch, ImageSource, SkippedFile
from decompclip.data.shapes import PROPERTIES
from decompclip.models.clip import HookedCLIP

CLASSES = PROPERTIES["shape"]
CONFIG = AuditConfig(batch_size=32, zeta=2)


def sources(model: HookedCLIP, limit: int = 60) -> tuple[ImageSource, ImageSource]:
    return tuple(open_source(spec, model, CLASSES, limit=limit) for spec in ("shapes", "shapes:badnet"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Unlabelled:
    """Another source without its labels, with a file skipped."""

    source: ImageSource

    @property
    def skipped(self) -> tuple[SkippedFile, ...]:
        return (SkippedFile("broken.png", "is no picture"),)

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int = 64) -> Iterator[ImageBatch]:
        for batch in self.source.batches(batch_size):
            yield replace(batch, labels=None)


@pytest.fixture
def result(model: HookedCLIP) -> AuditResult:
    return run_audit(model, *sources(model), CLASSES, target="star", config=CONFIG)


def test_ablating_every_layer_is_ablating_all(result: AuditResult) -> None:
    for kind, complete in result.ablations.complete.items():
        sweeps = result.ablations.sweeps[kind]
        assert sweeps["forward"][-1].report == sweeps["backward"][0].report == complete.report
        assert sweeps["forward"][0].report == sweeps["separate"][0].report
        assert sweeps["backward"][-1].report == sweeps["separate"][-1].report
        assert {len(settings) for settings in sweeps.values()} == {3}


def test_every_setting_has_its_control(result: AuditResult) -> None:
    sweeps = [s for kind in result.ablations.sweeps.values() for scheme in kind.values() for s in scheme]
    settings = [
        result.as_it_is,
        *result.ablations.complete.values(),
        *sweeps,
        *(r.setting for r in result.repairs),
    ]
    assert len(settings) == 1 + 2 + 2 * 3 * 3 + 5  # too few images for the repair without a hint
    assert list(result.left_out) == ["detection and repair without a hint", "token repair"]
    for setting in settings:
        assert setting.excludes_target
        assert setting.control.total == setting.success.total == result.counts["clean"] - _stars(result)
        assert setting.difference == setting.success.value - setting.control.value


def _stars(result: AuditResult) -> int:
    asr = result.as_it_is.report.asr
    assert asr is not None
    return result.counts["suspect"] - asr.total


def test_both_similarities_meet_both_thresholds(result: AuditResult) -> None:
    rules = [(d.similarity, d.threshold) for d in result.detectors]
    assert sorted(rules) == [
        ("cosine", "epsilon"),
        ("cosine", "quantile"),
        ("dot", "epsilon"),
        ("dot", "quantile"),
    ]
    for detector, repair in zip(result.detectors, result.repairs, strict=False):
        assert rule_name(detector.similarity, detector.threshold) in repair.setting.name
        heads = torch.arange(5)
        flagged = float((detector.clean_counts * heads).sum() / detector.clean_counts.sum())
        assert repair.flagged_clean == pytest.approx(flagged)
        assert detector.false_positives.count == int(detector.clean_counts[3:].sum())
        assert detector.auroc_low <= detector.auroc <= detector.auroc_high


def test_examples_show_most_and_least_affected_heads(result: AuditResult) -> None:
    shown = result.examples
    assert shown is not None
    assert shown.pictures.shape == (6, 24, 24, 3)
    assert shown.sides == ("suspect", "clean") * 3
    order = result.shift.heads_distance.flatten().argsort(descending=True)
    assert [4 * h.layer + h.head for h in shown.heads] == [*order[:2].tolist(), *order.flip(0)[:2].tolist()]
    for head in shown.heads:
        torch.testing.assert_close(head.attention.sum((1, 2)) + head.class_token, torch.ones(6))


def test_json_has_every_number_and_no_nan(result: AuditResult) -> None:
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["provenance"]["sha256"] == result.provenance["sha256"]
    assert found["provenance"]["activation"] == "gelu"
    assert set(found["provenance"]["versions"]) >= {"decompclip", "torch", "python"}
    assert found["config"]["seed"] == 0
    assert len(found["shift"]["heads_push"]) == 3
    forward = found["ablations"]["sweeps"]["heads"]["forward"]
    assert {"asr", "control", "cacc", "excess", "difference"} <= set(forward[0])
    assert found["examples"]["pictures"] is None
    assert jsonable(float("nan")) is None


def test_a_run_gives_the_same_numbers_again(model: HookedCLIP, result: AuditResult) -> None:
    again = run_audit(model, *sources(model), CLASSES, target=3, config=CONFIG)
    assert again.to_dict() == result.to_dict()


def test_the_target_is_inferred_from_images_that_serve_nothing_else(model: HookedCLIP) -> None:
    found = run_audit(model, *sources(model), CLASSES, config=CONFIG)
    assert found.target.inferred and found.target.images == 12 == found.counts["held_out"]
    assert found.target.over_prediction is not None
    value, low, high = found.target.over_prediction
    assert low <= value <= high
    assert found.counts["suspect"] == 48


def test_a_target_inferred_on_another_model_stays_inferred(model: HookedCLIP) -> None:
    first = run_audit(model, *sources(model), PROPERTIES["shape"])
    second = run_audit(model, *sources(model), PROPERTIES["shape"], target=first.target)
    assert second.target == first.target
    assert second.target.inferred
    assert second.counts == first.counts
    assert second.counts["held_out"] > 0


def test_a_contribution_is_a_part_of_its_distance(result: AuditResult) -> None:
    """The way to the target is a unit vector: both are shares of the feature's norm."""
    for kind in ("heads", "mlps"):
        contribution, distance = (
            getattr(result.shift, f"{kind}_{name}") for name in ("contribution", "distance")
        )
        assert (contribution.abs() <= distance + 1e-6).all()


def test_without_labels_what_cannot_be_known_is_none(model: HookedCLIP) -> None:
    clean, suspect = sources(model)
    found = run_audit(model, clean, Unlabelled(suspect), CLASSES, target="star", config=CONFIG)
    setting = found.as_it_is
    assert setting.report.asr is None and setting.report.cacc is not None
    assert not setting.excludes_target
    assert setting.success.total == setting.control.total == 48
    assert found.skipped["suspect"] == (SkippedFile("broken.png", "is no picture"),)
    found = run_audit(model, Unlabelled(clean), suspect, CLASSES, target="star", config=CONFIG)
    assert found.as_it_is.report.cacc is None and not found.as_it_is.excludes_target


def test_no_trigger_is_no_difference(model: HookedCLIP) -> None:
    clean, _ = sources(model)
    found = run_audit(model, clean, clean, CLASSES, target="star", config=CONFIG)
    assert found.paired
    assert found.as_it_is.difference == 0
    assert found.shift.totals["all"] == (0, 0)
    assert [detector.auroc for detector in found.detectors] == pytest.approx([0.5] * 4)


def test_progress_goes_through_what_shows_it(model: HookedCLIP) -> None:
    seen: list[tuple[str, int]] = []

    def track(items, description, total):
        seen.append((description, total))
        yield from items

    names: dict[str, Any] = {"name": "m", "clean_name": "a", "suspect_name": "b"}
    run_audit(model, *sources(model), CLASSES, target="star", config=CONFIG, track=track, **names)
    assert seen == [("m: a", 2), ("m: b", 2)]


@pytest.mark.parametrize(
    ("classes", "target", "words"),
    [
        (CLASSES, "sta", "class 'sta' is not among the 12 classes; nearest: 'star'"),
        (CLASSES, 12, "expected a target in 0..11; received 12"),
        (("star",), None, r"at least two classes to tell apart; received \['star'\]"),
    ],
)
def test_errors(model: HookedCLIP, classes: tuple[str, ...], target: str | int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_audit(model, *sources(model), classes, target=target)


def test_one_image_leaves_a_part_empty(model: HookedCLIP) -> None:
    with pytest.raises(ValueError, match="two parts with images in both; received 1 images"):
        run_audit(model, *sources(model, limit=1), CLASSES, target="star")
