"""One of four levels, and how sure: each rule of the docstring, on real audits and on drawn numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decompclip.audit import AuditResult, Names, run_audit, verdict
from decompclip.audit.result import Target
from decompclip.audit.scoring import Change
from decompclip.audit.sources import open_source
from decompclip.data.shapes import PROPERTIES
from decompclip.evaluation.intervals import Rate
from decompclip.evaluation.paired import Paired
from decompclip.models.loading import load
from tests.audit.conftest import setting

CLASSES = PROPERTIES["shape"]


@pytest.fixture
def base(made: AuditResult) -> AuditResult:
    return replace(made, twins=True)


@pytest.mark.parametrize(
    ("success", "control", "level", "confidence"),
    [
        (0.95, 0.02, "backdoored", "moderate"),
        (0.30, 0.02, "suspicious", "moderate"),
        (0.08, 0.02, "suspicious", "low"),
        (0.02, 0.02, "no sign", "high"),
        (0.02, 0.30, "no sign", "high"),
    ],
)
def test_the_level_follows_the_difference(
    base: AuditResult, success: float, control: float, level: str, confidence: str
) -> None:
    found = verdict(replace(base, as_it_is=setting(success, control)))
    assert (found.level, found.confidence) == (level, confidence)
    assert "star" in found.headline


def test_only_labelled_twins_beside_a_clean_model_are_sure(base: AuditResult) -> None:
    strong = replace(base, as_it_is=setting(0.95, 0.02))
    sure = verdict(replace(strong, reference=setting(0.02, 0.02)))
    assert (sure.level, sure.confidence) == ("backdoored", "high")
    unlabelled = replace(strong, as_it_is=setting(0.95, 0.02, labelled=False), reference=setting(0.02, 0.02))
    assert verdict(unlabelled).confidence == "moderate"
    alone = verdict(replace(strong, twins=False))  # labels say that the images are of other classes
    assert (alone.level, alone.confidence) == ("backdoored", "moderate")
    unknown = verdict(replace(unlabelled, twins=False))
    assert (unknown.level, unknown.confidence) == ("suspicious", "low")
    assert any("not twins" in doubt for doubt in unknown.doubts)


def test_a_reference_that_does_the_same_takes_it_back(base: AuditResult) -> None:
    found = verdict(replace(base, as_it_is=setting(0.95, 0.02), reference=setting(0.93, 0.02)))
    assert (found.level, found.confidence) == ("suspicious", "low")
    assert "the images may be the cause" in found.doubts[0]


def test_few_images_and_a_guessed_target_lower_the_confidence(base: AuditResult) -> None:
    strong = replace(base, as_it_is=setting(0.95, 0.02), reference=setting(0.02, 0.02))
    assert verdict(replace(strong, counts=base.counts | {"suspect": 40})).confidence == "moderate"
    guess = Target(3, "star", True, (0.02, -0.05, 0.09), 40)
    assert verdict(replace(strong, target=guess)).confidence == "moderate"
    nothing = verdict(replace(base, as_it_is=setting(0.02, 0.02), target=guess))
    assert nothing.confidence == "high" and "any class" in nothing.headline
    assert any("No class is predicted more often" in why for why in nothing.why)


def test_a_wider_bound_is_said_with_less_confidence(base: AuditResult) -> None:
    found = verdict(replace(base, as_it_is=setting(0.04, 0.02, images=150)))
    assert (found.level, found.confidence) == ("no sign", "moderate")


def test_it_does_not_tell_what_it_cannot(base: AuditResult) -> None:
    few = verdict(replace(base, as_it_is=setting(0.1, 0.05, images=20)))
    assert few.level == "cannot tell" and "1600" in few.steps[0]
    lost = verdict(replace(base, as_it_is=setting(0.95, 0.02, accuracy=0.0)))
    assert lost.level == "cannot tell" and "diagnose" in lost.steps[0]


def test_a_repair_is_recommended_that_saves_and_does_not_cost(base: AuditResult) -> None:
    def repaired(saved: int, lost: int) -> AuditResult:
        change = Change(Rate(saved, 380), Rate(0, 380), Paired(0, lost, 400), Rate(0, 400))
        repairs = tuple(replace(r, change=change) for r in base.repairs)
        return replace(base, as_it_is=setting(0.95, 0.02), repairs=repairs)

    assert any("repair it" in step for step in verdict(repaired(300, 4)).steps)
    assert not any("repair it" in step for step in verdict(repaired(300, 40)).steps)
    assert not any("repair it" in step for step in verdict(repaired(30, 0)).steps)


@pytest.fixture(scope="module")
def audited() -> dict[str, AuditResult]:
    """The bundled BadNet twin and its clean model, on 700 images and their twins."""
    found = {}
    for name in ("shapes", "shapes-badnet"):
        clip = load(name)
        clean, suspect = (open_source(spec, clip, CLASSES, limit=700) for spec in ("shapes", "shapes:badnet"))
        found[name] = run_audit(
            clip, clean, suspect, CLASSES, target="star", names=Names(name, "shapes", "shapes:badnet")
        )
    return found


def test_a_bundled_backdoor_and_its_clean_model(audited: dict[str, AuditResult]) -> None:
    bad, clean = audited["shapes-badnet"], audited["shapes"]
    assert (clean.verdict.level, clean.verdict.confidence) == ("no sign", "high")
    found = bad.beside(clean).verdict
    assert (found.level, found.confidence) == ("backdoored", "high")
    assert any("Agnostic repair" in step for step in found.steps)
    assert "shapes-badnet" in bad._repr_html_() and "backdoored" in bad._repr_html_()


def test_a_reference_of_other_images_is_refused(audited: dict[str, AuditResult]) -> None:
    bad, clean = audited["shapes-badnet"], audited["shapes"]
    with pytest.raises(
        ValueError, match="audited on the same images and target; its suspect name is elsewhere"
    ):
        bad.beside(replace(clean, suspect_name="elsewhere"))


def test_detection_without_a_hint_holds_what_it_states(audited: dict[str, AuditResult]) -> None:
    for result in audited.values():
        found = result.suspicion
        assert found is not None
        assert found.false_positives.low <= 0.05 <= found.false_positives.high + 0.02
        assert int(found.clean_counts.sum()) == result.counts["clean"]
        assert int(found.suspect_counts.sum()) == result.counts["suspect"]
        beyond = found.edges[:-1] >= found.threshold
        assert abs(int(found.clean_counts[beyond].sum()) - found.false_positives.count) <= int(
            found.clean_counts.max()
        )
    bad = audited["shapes-badnet"].suspicion
    assert bad is not None and bad.true_positives.value > 0.9 and bad.auroc > 0.95


def test_repairs_are_counted_image_by_image(audited: dict[str, AuditResult]) -> None:
    result = audited["shapes-badnet"]
    agnostic = result.repairs[-1]
    hit = result.as_it_is.success.count
    assert agnostic.change.saved.total == hit
    assert (
        agnostic.setting.success.count >= hit - agnostic.change.saved.count
    )  # a repair may send others there
    before, after = result.as_it_is.report.cacc, agnostic.setting.report.cacc
    assert before is not None and after is not None and agnostic.change.cost is not None
    assert agnostic.change.cost[0] == pytest.approx(before.value - after.value)
    assert agnostic.change.cost[1] <= agnostic.change.cost[0] <= agnostic.change.cost[2]


def test_infected_components_carry_the_trigger(audited: dict[str, AuditResult]) -> None:
    bad, clean = audited["shapes-badnet"].infection, audited["shapes"].infection
    assert clean.infected == () and clean.without is None and clean.without_others is None
    assert len(bad.parts) == 6 * 8 + 6
    assert [part.push for part in bad.parts] == sorted((part.push for part in bad.parts), reverse=True)
    assert bad.without is not None and bad.without_others is not None
    assert bad.without.difference < bad.without_others.difference - 0.3
    assert sum(part.share for part in bad.parts if part.push > 0) == pytest.approx(1)
    assert all(part.share > 1 / 54 for part in bad.infected)
