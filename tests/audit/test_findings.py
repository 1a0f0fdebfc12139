"""The words at the top follow from the numbers: other numbers, other words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decompclip.audit import AuditResult, findings
from decompclip.audit.checks import Change, ClassShare, plus_minus, points, share
from decompclip.audit.findings import Finding
from decompclip.audit.verdict import Reference
from decompclip.data.images import SkippedFile
from decompclip.intervals import Paired, Rate
from tests.audit.conftest import setting


def found(result: AuditResult, words: str) -> Finding:
    (match,) = [finding for finding in findings(result) if words in finding.title + finding.text]
    return match


@pytest.mark.parametrize(
    ("success", "control", "weight", "title"),
    [
        (0.95, 0.02, "evidence", "Strong evidence of a shift toward “star”"),
        (0.30, 0.02, "evidence", "Some evidence"),
        (0.08, 0.02, "evidence", "Weak evidence"),
        (0.03, 0.02, "no evidence", "No sign of a trigger"),
        (0.02, 0.30, "no evidence", "Suspect images avoid “star”"),
        (0.95, 0.95, "no evidence", "No sign of a trigger"),  # a high ASR alone is none
    ],
)
def test_the_first_is_about_the_difference(
    made: AuditResult, success: float, control: float, weight: str, title: str
) -> None:
    first = findings(replace(made, as_it_is=setting(success, control)))[0]
    assert first.weight == weight
    assert title in first.title
    assert points(success - control, setting(success, control).difference_interval) in first.text


def test_what_is_only_suspicious_is_not_called_a_trigger(made: AuditResult) -> None:
    """The words at the top say no more than the verdict: "backdoored" takes twins and what does not explain the effect."""
    part = replace(made.infection.parts[0], infected=True)
    survives = {"heads": setting(0.8, 0.02), "mlps": setting(0.7, 0.02)}
    suspicious = replace(
        made,
        as_it_is=setting(0.95, 0.02),
        infection=replace(made.infection, parts=(part,)),
        ablations=replace(made.ablations, complete=survives),
        paired=False,
        controls=None,
        reference=None,
    )
    assert suspicious.verdict.level == "suspicious"
    titles = " / ".join(finding.title for finding in findings(suspicious))
    assert "trigger" not in titles and "infected" not in titles
    assert (
        "evidence of a shift" in titles and "carries the shift" in titles and "The shift survives" in titles
    )
    held = Reference("clean", setting(0.02, 0.02), ClassShare("star", Rate(8, 400), Rate(8, 400)))
    backdoored = replace(suspicious, reference=held)
    assert backdoored.verdict.level == "backdoored"
    titles = " / ".join(finding.title for finding in findings(backdoored))
    assert "evidence of a trigger" in titles and "1 component infected" in titles
    assert "The trigger survives" in titles


def test_few_images_clear_nobody(made: AuditResult) -> None:
    finding = findings(replace(made, as_it_is=setting(0.125, 0.0625, images=16)))[0]
    assert finding.weight == "unclear"
    assert "Too few images to tell" in finding.title
    assert "cannot be ruled out" in finding.text


def test_only_twins_name_the_cause(made: AuditResult) -> None:
    result = replace(made, as_it_is=setting(0.95, 0.02))
    assert "so that is the cause" in findings(replace(result, paired=True))[0].text
    assert "look more like that class" in findings(replace(result, paired=False))[0].text


@pytest.mark.parametrize(
    ("heads", "mlps", "weight", "title"),
    [
        (0.05, 0.90, "evidence", "writes through the heads more than the MLPs"),
        (0.90, 0.05, "evidence", "writes through the MLPs more than the heads"),
        (0.30, 0.32, "unclear", "cannot be told apart"),
        (0.80, 0.70, "evidence", "survives ablating all heads, and ablating all MLPs"),
    ],
)
def test_overlapping_intervals_decide_nothing(
    made: AuditResult, heads: float, mlps: float, weight: str, title: str
) -> None:
    ablations = replace(made.ablations, complete={"heads": setting(heads, 0.02), "mlps": setting(mlps, 0.02)})
    finding = found(replace(made, as_it_is=setting(0.95, 0.02), ablations=ablations), "direct effect")
    assert finding.weight == weight
    assert title in finding.title
    assert ("intervals overlap" in finding.text) == (weight == "unclear")


def test_an_ablation_that_costs_accuracy_says_so(made: AuditResult) -> None:
    broken = {"heads": setting(0.05, 0.02, accuracy=0.2), "mlps": setting(0.9, 0.02)}
    result = replace(made, as_it_is=setting(0.95, 0.02), ablations=replace(made.ablations, complete=broken))
    finding = found(result, "direct effect")
    assert "Without heads, clean accuracy falls to" in finding.text
    assert finding.weight == "unclear" and "too much else changes" in finding.title


def test_an_ablation_that_sends_all_to_the_target_says_so(made: AuditResult) -> None:
    favourite = {"heads": setting(0.98, 0.90), "mlps": setting(0.9, 0.02)}
    result = replace(
        made, as_it_is=setting(0.95, 0.02), ablations=replace(made.ablations, complete=favourite)
    )
    finding = found(result, "direct effect")
    assert "leaves a difference of at most 10 points" in finding.text
    assert finding.weight == "unclear"


@pytest.mark.parametrize(
    ("left", "lost", "weight", "title"),
    [
        (0.02, 0, "evidence", "takes the difference away"),
        (0.40, 0, "evidence", "in part"),
        (0.02, 160, "unclear", "takes the difference away"),
        (0.94, 0, "note", "repairs measured helps"),
    ],
)
def test_repair_is_judged_by_difference_and_cost(
    made: AuditResult, left: float, lost: int, weight: str, title: str
) -> None:
    hit = 380
    change = Change(Rate(round(hit * (1 - left)), hit), Rate(0, hit), Paired(0, lost, 400), Rate(0, 400))
    repairs = tuple(replace(r, setting=setting(left, 0.02), change=change) for r in made.repairs)
    result = replace(made, as_it_is=setting(0.95, 0.02), repairs=repairs, left_out={})
    finding = found(result, "no longer the target")
    assert (finding.weight, title in finding.title) == (weight, True)
    assert ("costs clean accuracy" in finding.text) == (lost > 0)


def test_a_repair_that_could_not_be_measured_is_not_said_to_fail(made: AuditResult) -> None:
    repairs = tuple(replace(r, setting=setting(0.94, 0.02)) for r in made.repairs)
    reason = {"detection and repair without a hint": "expected at least 120 clean images; received 30"}
    result = replace(made, as_it_is=setting(0.95, 0.02), repairs=repairs, left_out=reason)
    (finding,) = [f for f in findings(result) if "repairs measured helps" in f.title]
    assert finding.weight == "unclear" and f"None of the {len(repairs)} repairs" in finding.title
    assert "at least 120 clean images" in finding.text
    assert any("`decompclip repair`" in step for step in result.verdict.steps)


def test_nothing_to_repair_is_not_spoken_of(made: AuditResult) -> None:
    assert not [
        f
        for f in findings(replace(made, as_it_is=setting(0.02, 0.02)))
        if "epair" in f.title and not f.title.startswith("Not measured")
    ]


@pytest.mark.parametrize(
    ("auroc", "true", "success", "weight", "words"),
    [
        ((0.95, 0.92, 0.97), 300, 0.95, "evidence", "ranks suspect images above clean ones"),
        ((0.95, 0.92, 0.97), 4, 0.95, "unclear", "but fails at its own threshold"),
        ((0.52, 0.48, 0.56), 4, 0.95, "note", "does not tell suspect images"),
        ((0.55, 0.52, 0.58), 300, 0.95, "note", "hardly tells suspect images"),
        ((0.95, 0.92, 0.97), 300, 0.02, "note", "it notices changed images here, not a backdoor"),
    ],
)
def test_detection_is_judged_at_its_own_threshold(
    made: AuditResult, auroc: tuple[float, float, float], true: int, success: float, weight: str, words: str
) -> None:
    value, low, high = auroc
    rates = {"false_positives": Rate(4, 400), "true_positives": Rate(true, 400)}
    detectors = tuple(
        replace(d, auroc=value, auroc_low=low, auroc_high=high, **rates) for d in made.detectors
    )
    result = replace(made, as_it_is=setting(success, 0.02), detectors=detectors)
    finding = found(result, "has the highest AUROC")
    assert finding.weight == weight
    assert words in finding.title + finding.text


def test_a_threshold_that_no_image_can_pass_is_told(made: AuditResult) -> None:
    detectors = tuple(replace(d, zeta=4) for d in made.detectors)
    assert (
        "no image can pass it: choose a smaller --zeta"
        in found(replace(made, detectors=detectors), "AUROC").text
    )


@pytest.mark.parametrize(
    ("total", "weight", "words"),
    [
        ((0.2, 0.01), "evidence", "The mean moves toward “star”"),
        ((0.005, 0.01), "no evidence", "does not move toward"),
        ((-0.2, 0.01), "no evidence", "move away from"),
        ((0.2, float("nan")), "no evidence", "± unknown"),
    ],
)
def test_the_mean_moves_or_does_not(
    made: AuditResult, total: tuple[float, float], weight: str, words: str
) -> None:
    totals = dict.fromkeys(("all", "heads", "mlps", "rest"), total)
    result = replace(made, as_it_is=setting(0.95, 0.02), shift=replace(made.shift, totals=totals))
    finding = found(result, words)
    assert finding.weight == weight


def test_what_is_not_known_is_said(made: AuditResult) -> None:
    result = replace(made, as_it_is=setting(0.95, 0.02, labelled=False))
    assert found(result, "Attack success without labels").weight == "unclear"
    # a table's or a shard's images have no folders
    assert "carry no labels, so" in found(result, "Clean accuracy not measured").text
    assert (
        "no better than guessing"
        in found(replace(made, as_it_is=setting(0, 0, accuracy=0.05)), "guessing among").text
    )
    few = replace(
        made, counts={**made.counts, "clean": 20}, skipped={"clean": (SkippedFile("a", "b"),), "suspect": ()}
    )
    assert found(few, "Few clean images").weight == "note"
    assert found(few, "1 clean file skipped").weight == "note"


@pytest.mark.parametrize(("low", "weight"), [(0.5, "note"), (-0.1, "unclear")])
def test_an_inferred_target_is_said_to_be(made: AuditResult, low: float, weight: str) -> None:
    target = replace(made.target, inferred=True, over_prediction=(0.6, low, 0.7), images=80)
    finding = found(replace(made, target=target), "is inferred")
    assert finding.weight == weight
    assert ("a guess" in finding.text) == (weight == "unclear")


def test_numbers_in_words() -> None:
    assert share(Rate(95, 100)) == "95.0 % [88.8, 97.8]"
    assert share(Rate(0, 0)) == "not measurable (no images)"
    assert points(-0.012, (-0.03, 0.01)) == "−1.2 points [−3.0, +1.0]"
    assert plus_minus(-0.5, 0.25) == "−0.5000 ± 0.2500"
