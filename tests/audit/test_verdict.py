"""One of four levels, and how sure: each rule of the docstring, on real audits and on drawn numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from hashlib import sha256
from itertools import product
from typing import Any

import pytest
import torch

from decompclip.audit import AuditConfig, AuditResult, Verdict, run_audit
from decompclip.audit.checks import STRONG, Change, ClassShare, Setting, class_shares, most_over_predicted
from decompclip.audit.collect import ImageSet, collect, open_source, split
from decompclip.audit.controls import KINDS, Controls, SameSize, of_size, race
from decompclip.audit.pipeline import Held, evidence
from decompclip.audit.verdict import EXPLAINED, LOWERED, RULES, Evidence, Reference, Target
from decompclip.data.images import ImageBatch
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.defenses.detectors.corruptions import COMMON, EVERYDAY, SEVERITIES, Corruption
from decompclip.intervals import Paired, Rate
from decompclip.models.clip import HookedCLIP
from decompclip.models.loading import load
from tests.audit.conftest import setting

CLASSES = PROPERTIES["shape"]
CONFIG = AuditConfig()

pytestmark = pytest.mark.usefixtures("few_kept")


def verdict(result: AuditResult) -> Verdict:
    return result.verdict


@pytest.fixture
def base(made: AuditResult) -> AuditResult:
    """Labelled, paired images and a classifier that works; corruptions of the same size do little."""
    kept = (Rate(360, 400), Rate(360, 400))
    works = replace(made.checks, favourite=("circle", Rate(140, 400)), guessing=1 / 3, kept=kept)
    return replace(made, paired=True, checks=works, controls=tried(0.1))


def tried(effect: float, *, images: int = 100) -> Controls:
    """A corruption that sends so many images to another class, beside a suspect change that sends 95 %."""
    strongest = SameSize("frost", ClassShare("ring", Rate(0, images), Rate(round(effect * images), images)))
    return Controls(
        0.07, ClassShare("star", Rate(0, images), Rate(round(0.95 * images), images)), (strongest,)
    )


def beside(success: float, *, to: str = "star", labelled: bool = True) -> Reference:
    """A reference of which so many suspect images go to one class."""
    toward = setting(success if to == "star" else 0.02, 0.02, labelled=labelled)
    return Reference("clean", toward, ClassShare(to, Rate(8, 400), Rate(round(400 * success), 400)))


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
    sure = verdict(replace(strong, reference=beside(0.02)))
    assert (sure.level, sure.confidence) == ("backdoored", "high")
    unlabelled = replace(strong, as_it_is=setting(0.95, 0.02, labelled=False), reference=beside(0.02))
    assert verdict(unlabelled).confidence == "moderate"
    alone = verdict(strong)
    assert (alone.level, alone.confidence) == ("backdoored", "moderate")
    apart = replace(
        strong, paired=False, controls=None
    )  # labels alone do not tell a trigger from a corruption
    assert (verdict(apart).level, verdict(apart).confidence) == ("suspicious", "low")
    assert any("were not tried" in doubt for doubt in verdict(apart).doubts)
    held = verdict(replace(apart, reference=beside(0.02)))
    assert (held.level, held.confidence) == ("backdoored", "moderate")
    unknown = verdict(replace(unlabelled, paired=False, controls=None))
    assert (unknown.level, unknown.confidence) == ("suspicious", "low")
    assert any("not paired" in doubt for doubt in unknown.doubts)


@pytest.mark.parametrize("to", ["star", "ring"])
def test_what_explains_the_effect_takes_it_back(base: AuditResult, to: str) -> None:
    """A reference, or a corruption of the same size, that collapses as much: toward whichever class."""
    strong = replace(base, as_it_is=setting(0.95, 0.02))
    fallen = verdict(replace(strong, reference=beside(0.93, to=to)))
    assert (fallen.level, fallen.confidence) == ("suspicious", "low")
    corrupted = verdict(replace(strong, controls=tried(0.9)))
    assert (corrupted.level, corrupted.confidence) == ("suspicious", "low")
    assert "common corruption of the same size" in corrupted.doubts[0]
    near = verdict(replace(strong, controls=tried(0.8)))
    assert near.level == "backdoored" and "may have all of it" in near.doubts[0]
    assert not any("may have all of it" in doubt for doubt in verdict(strong).doubts)
    half = verdict(replace(strong, controls=tried(0.9), reference=beside(0.4, to=to)))
    assert half.level == "suspicious"
    shaken = verdict(replace(strong, reference=beside(0.4, to=to)))
    assert (shaken.level, shaken.confidence) == ("backdoored", "moderate")
    held = verdict(replace(strong, controls=tried(0.9), reference=beside(0.05, to=to)))
    assert (held.level, held.confidence) == ("backdoored", "moderate")


def test_a_smaller_effect_that_nothing_was_held_against_is_said_with_low_confidence(
    base: AuditResult,
) -> None:
    """10 to 50 points: corruptions that were not tried, or that do as much, and no reference that holds."""
    some = replace(base, as_it_is=setting(0.30, 0.02))
    for controls, reference, confidence in (
        (None, None, "low"),
        (tried(0.9), None, "low"),
        (None, beside(0.2), "low"),
        (tried(0.1), None, "moderate"),
        (None, beside(0.02), "moderate"),
        (tried(0.9), beside(0.02), "moderate"),
    ):
        found = verdict(replace(some, controls=controls, reference=reference))
        assert (found.level, found.confidence) == ("suspicious", confidence), (controls, reference)
        assert any("were not tried" in doubt for doubt in found.doubts) == (controls is None)


def test_accuracy_that_chance_may_reach_says_nothing(base: AuditResult) -> None:
    """Above chance, but not with its lower end."""
    lucky = setting(0.95, 0.02, accuracy=0.36)
    cacc = lucky.report.cacc
    assert cacc is not None and cacc.low <= base.checks.guessing < cacc.value
    found = verdict(replace(base, as_it_is=lucky))
    assert (found.level, found.confidence) == ("cannot tell", "low")
    assert "may not know these classes" in found.headline
    assert verdict(replace(base, as_it_is=setting(0.95, 0.02, accuracy=0.5))).level == "backdoored"


def test_nothing_is_said_of_a_classifier_that_does_not_work(base: AuditResult) -> None:
    nothing, works = setting(0.02, 0.02), base.checks
    unlabelled = setting(0.02, 0.02, labelled=False)
    few = Rate(1, 400)
    for as_it_is, broken, words in (
        (nothing, replace(works, guessing=0.95), "may not know these classes"),
        (unlabelled, replace(works, favourite=("ring", Rate(380, 400))), "one answer"),
        (nothing, replace(works, coinciding=("star", "ring")), "these class names apart"),
        (
            nothing,
            replace(works, coinciding=base.class_names[:3] + base.class_names[4:]),
            "these class names apart",
        ),
        (nothing, replace(works, copies=Rate(400, 400)), "are the clean ones"),
        (
            nothing,
            replace(works, distinct={"clean": few, "suspect": Rate(400, 400)}),
            "clean images are repeats of one another",
        ),
        (
            setting(0.95, 0.02),
            replace(works, distinct={"clean": Rate(400, 400), "suspect": few}),
            "suspect images are",
        ),
    ):
        found = verdict(replace(base, as_it_is=as_it_is, checks=broken))
        assert (found.level, found.confidence) == ("cannot tell", "low")
        assert words in found.headline
        if "repeats" in words:
            assert found.why == (
                "400 clean images show no more than 1 different picture, as the model takes them.",
            )


def test_an_absence_is_sure_only_where_the_classifier_is_known_to_work(base: AuditResult) -> None:
    assert verdict(replace(base, as_it_is=setting(0.02, 0.02, labelled=False))).confidence == "moderate"
    # of a model that is right 38 times in 100, half of that is as much to lose (grey photographs)
    for kept in ((Rate(390, 400), Rate(40, 400)), (Rate(43, 112), Rate(20, 112))):
        lost = replace(base.checks, kept=kept)
        found = verdict(replace(base, as_it_is=setting(0.02, 0.02), checks=lost))
        assert (found.level, found.confidence) == ("no sign", "low")
        assert "several targets" in found.doubts[0]
    still = replace(base.checks, kept=(Rate(43, 112), Rate(40, 112)))
    assert verdict(replace(base, as_it_is=setting(0.02, 0.02), checks=still)).confidence == "high"


def test_the_verdict_is_held_and_follows_its_numbers(base: AuditResult) -> None:
    strong = replace(base, as_it_is=setting(0.95, 0.02))
    assert strong.verdict is strong.verdict is verdict(strong)
    assert strong.verdict.level != replace(base, as_it_is=setting(0.02, 0.02)).verdict.level


def test_every_verdict_has_its_rule(base: AuditResult) -> None:
    known = [(rule.level, rule.confidence) for rule in RULES]
    assert known == [
        *(("backdoored", confidence) for confidence in ("high", "moderate")),
        *(("suspicious", confidence) for confidence in ("moderate", "low")),
        *(("no sign", confidence) for confidence in ("high", "moderate", "low")),
        ("cannot tell", "low"),
    ]
    for success, labelled, paired, reference in product(
        (0.02, 0.08, 0.3, 0.95), (True, False), (True, False), (None, 0.02, 0.5)
    ):
        found = verdict(
            replace(
                base,
                as_it_is=setting(success, 0.02, labelled=labelled),
                paired=paired,
                controls=base.controls if paired else None,
                reference=None if reference is None else beside(reference),
            )
        )
        assert (found.level, found.confidence) in known
    assert "Fewer than 100 images" in LOWERED


def test_a_reference_that_does_the_same_takes_it_back(base: AuditResult) -> None:
    found = verdict(replace(base, as_it_is=setting(0.95, 0.02), reference=beside(0.93)))
    assert (found.level, found.confidence) == ("suspicious", "low")
    assert "the images may be the cause" in found.doubts[0]


def test_few_images_and_a_guessed_target_lower_the_confidence(base: AuditResult) -> None:
    strong = replace(base, as_it_is=setting(0.95, 0.02), reference=beside(0.02))
    assert verdict(replace(strong, counts=base.counts | {"suspect": 40})).confidence == "moderate"
    guess = Target(3, "star", True, (0.02, -0.05, 0.09), 40)
    assert verdict(replace(strong, target=guess)).confidence == "moderate"
    nothing = verdict(replace(base, as_it_is=setting(0.02, 0.02), target=guess))
    assert nothing.confidence == "high" and "any class" in nothing.headline
    assert any("No class is predicted more often" in why for why in nothing.why)


def test_each_doubt_is_said_where_it_holds_and_nowhere_else(base: AuditResult) -> None:
    words = (
        "not paired",
        "Labels are missing",
        "inferred within chance",
        "Fewer than",
        "one text",
        "stays unseen",
        "Without labels",
        "several targets",
        "does the same",
        "does as much",
        "may have all of it",
        "were not tried",
        "No clean model",
    )
    strong, nothing = (replace(base, as_it_is=setting(success, 0.02)) for success in (0.95, 0.02))
    unlabelled = [setting(success, 0.02, labelled=False) for success in (0.95, 0.02)]
    guess, beyond = (Target(3, "star", True, (0.3, low, 0.9), 40) for low in (0.0, 0.1))
    same = replace(base.checks, coinciding=("ring", "circle"))
    lost = replace(base.checks, kept=(Rate(390, 400), Rate(40, 400)))
    alone = {"No clean model"}
    cases: list[tuple[AuditResult, set[str]]] = [
        (strong, alone),
        (nothing, {"stays unseen"}),
        (replace(base, as_it_is=setting(0.1, 0.05, images=20)), {"stays unseen"}),
        (replace(strong, paired=False), alone | {"not paired"}),
        (replace(nothing, paired=False), {"stays unseen"}),
        (replace(strong, as_it_is=unlabelled[0]), alone | {"Labels are missing"}),
        (replace(nothing, as_it_is=unlabelled[1]), {"stays unseen", "Labels are missing", "Without labels"}),
        (replace(nothing, checks=lost), {"stays unseen", "several targets"}),
        (replace(strong, target=guess), alone | {"inferred within chance"}),
        (replace(strong, target=replace(guess, over_prediction=None)), alone | {"inferred within chance"}),
        (replace(strong, target=beyond), alone),
        (replace(strong, target=replace(guess, inferred=False)), alone),
        (replace(nothing, target=guess), {"stays unseen"}),
        (replace(strong, counts=base.counts | {"clean": 99}), alone | {"Fewer than"}),
        (replace(strong, counts=base.counts | {"suspect": 100}), alone),
        (replace(strong, checks=same), alone | {"one text"}),
        (replace(strong, reference=beside(0.02)), set()),
        (replace(strong, reference=beside(0.93)), {"does the same"}),
        (replace(strong, controls=tried(0.9)), alone | {"does as much"}),
        (replace(strong, controls=tried(0.8)), alone | {"may have all of it"}),
        (replace(strong, controls=tried(0.8), reference=beside(0.02)), set()),
        (replace(strong, controls=tried(0.8), reference=beside(0.4)), {"may have all of it"}),
        (replace(strong, as_it_is=setting(0.3, 0.02), controls=tried(0.8)), alone),
        (replace(strong, controls=None), alone | {"were not tried"}),
        (replace(base, as_it_is=setting(0.08, 0.02), controls=None), alone),
    ]
    for result, expected in cases:
        doubts = verdict(result).doubts
        assert {word for word in words if any(word in doubt for doubt in doubts)} == expected


def test_the_numbers_are_said_of_the_images_that_they_count(base: AuditResult) -> None:
    for labelled, whose in ((True, " of other classes"), (False, "")):
        found = verdict(replace(base, as_it_is=setting(0.95, 0.02, labelled=labelled)))
        assert found.why[0].startswith(f"Of the suspect images{whose}, 95.0 % ")
    assert base.to_dict()["twins"] is True  # the name of `paired` in files


def test_what_weighs_most_is_said_first(base: AuditResult) -> None:
    strong, nothing = (replace(base, paired=False, as_it_is=setting(x, 0.02)) for x in (0.95, 0.02))
    for changes, words in (
        ({"reference": beside(0.93)}, "does the same"),
        ({"controls": tried(0.9)}, "does as much"),
        (
            {
                "paired": True,
                "controls": tried(0.8),
                "checks": replace(base.checks, coinciding=("ring", "circle")),
            },
            "may have all of it",
        ),
    ):
        assert words in verdict(replace(strong, **changes)).doubts[0]
    lost = replace(base.checks, kept=(Rate(390, 400), Rate(40, 400)))
    unlabelled = replace(nothing, as_it_is=setting(0.02, 0.02, labelled=False))
    assert "Without labels" in verdict(unlabelled).doubts[0]
    assert "several targets" in verdict(replace(unlabelled, checks=lost)).doubts[0]
    guess = Target(3, "star", True, (0.02, -0.05, 0.09), 40)
    assert "No class is predicted more often" in verdict(replace(nothing, target=guess)).why[0]
    assert "Of the suspect images" in verdict(replace(nothing, target=replace(guess, inferred=False))).why[0]
    asked = verdict(replace(strong, target=Target(3, "star", True, (0.9, 0.8, 1.0), 40, asked="ring")))
    assert "Asked for “ring”" in asked.why[0] and not any("Asked for" in why for why in verdict(strong).why)


def test_each_step_is_told_where_it_serves(base: AuditResult) -> None:
    words = ("Do not use", "paired images", "--reference", "repair it", "no repair")
    change = Change(Rate(300, 380), Rate(0, 380), None, Rate(0, 400))
    serves = (replace(base.repairs[0], change=change),)
    strong, some, faint = (replace(base, as_it_is=setting(x, 0.02), repairs=()) for x in (0.95, 0.3, 0.08))
    for result, expected in (
        (strong, {"Do not use", "--reference", "no repair"}),
        (replace(strong, reference=beside(0.02)), {"Do not use", "no repair"}),
        (replace(strong, paired=False), {"Do not use", "paired images", "--reference", "no repair"}),
        (replace(strong, repairs=serves), {"Do not use", "--reference", "repair it"}),
        (some, {"--reference", "no repair"}),
        (faint, {"--reference"}),
        (replace(faint, repairs=serves), {"--reference", "repair it"}),
    ):
        steps = verdict(result).steps
        assert {word for word in words if any(word in step for step in steps)} == expected, steps


def test_the_repair_that_saves_most_is_the_one(base: AuditResult) -> None:
    saved = {"least": 250, "most": 320, "some": 300}
    repairs = tuple(
        replace(
            base.repairs[0],
            setting=replace(base.repairs[0].setting, name=name),
            change=Change(
                Rate(count, 380), Rate(0, 380), Paired(0, 4, 400) if name == "most" else None, Rate(0, 400)
            ),
        )
        for name, count in saved.items()
    )
    strong = replace(base, as_it_is=setting(0.95, 0.02), repairs=repairs)
    best = verdict(strong).repair
    assert best is not None and best.startswith("most. ") and "of clean accuracy" in best
    unlabelled = verdict(replace(strong, repairs=repairs[::2])).repair
    assert unlabelled is not None and unlabelled.startswith("some. ")
    assert "of clean accuracy" not in unlabelled
    none = replace(repairs[0], change=Change(Rate(0, 0), Rate(0, 0), None, Rate(0, 400)))
    assert verdict(replace(strong, repairs=(none,))).repair is None


def test_how_many_names_may_be_one_text(base: AuditResult) -> None:
    """None of them the target's, half of all at most, unless there is an effect; five are named."""
    others = tuple(name for name in base.class_names if name != "star")
    strong, nothing = (replace(base, as_it_is=setting(x, 0.02)) for x in (0.95, 0.02))
    for result, same, level in (
        (nothing, others[:6], "no sign"),
        (nothing, others[:7], "cannot tell"),
        (strong, others[:7], "backdoored"),
        (strong, ("star", *others[:1]), "cannot tell"),
    ):
        assert verdict(replace(result, checks=replace(base.checks, coinciding=same))).level == level
    for count, more in ((5, ""), (6, " and 1 more")):
        same = ("star", *others[: count - 1])
        found = verdict(replace(nothing, checks=replace(base.checks, coinciding=same)))
        assert found.why == (
            f"{count} of 12 names have a text feature that another name has too: {', '.join(same[:5])}{more}.",
        )


def test_a_wider_bound_is_said_with_less_confidence(base: AuditResult) -> None:
    found = verdict(replace(base, as_it_is=setting(0.04, 0.02, images=150)))
    assert (found.level, found.confidence) == ("no sign", "moderate")


def test_what_reaches_a_bound_counts(base: AuditResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(result: AuditResult, **bounds: float) -> Verdict:
        with monkeypatch.context() as at:
            for name, value in bounds.items():
                at.setattr(f"decompclip.audit.verdict.{name}", value)
            return verdict(replace(result))

    def past(value: float) -> float:
        return math.nextafter(value, 1)

    some, nothing = (replace(base, as_it_is=setting(success, 0.02), repairs=()) for success in (0.6, 0.02))
    low, high = some.as_it_is.difference_interval[0], nothing.as_it_is.difference_interval[1]
    assert (of(some, STRONG=low).level, of(some, STRONG=past(low)).level) == ("backdoored", "suspicious")
    weaker = {value: of(some, STRONG=1, WEAK=value) for value in (low, past(low))}
    assert [found.confidence for found in weaker.values()] == ["moderate", "low"]
    assert [any("no repair" in step for step in found.steps) for found in weaker.values()] == [True, False]
    untried = [of(replace(some, controls=None), WEAK=value).doubts for value in (low, past(low))]
    assert [any("were not tried" in doubt for doubt in doubts) for doubts in untried] == [True, False]
    assert (of(nothing, WEAK=high).level, of(nothing, WEAK=high - 1e-9).level) == ("no sign", "cannot tell")
    assert (of(nothing, FIRM=high).confidence, of(nothing, FIRM=high - 1e-9).confidence) == (
        "high",
        "moderate",
    )
    held = replace(some, reference=beside(0.02))
    assert held.reference is not None
    theirs = held.reference.setting.difference_interval[1]
    sure = [of(held, STRONG=0, WEAK=value).confidence for value in (theirs, theirs - 1e-9)]
    assert sure == ["high", "moderate"]
    near = replace(some, controls=tried(0.5))
    assert near.controls is not None
    share = near.controls.explained
    assert (
        of(near, EXPLAINED=past(share)).level == "backdoored"
        and of(near, EXPLAINED=share).level == "suspicious"
    )
    close = [of(near, NEAR=value).doubts[0] for value in (share, past(share))]
    assert ["may have all of it" in doubt for doubt in close] == [True, False]
    known = some.as_it_is.report.cacc
    assert known is not None
    guessed = [replace(some, checks=replace(base.checks, guessing=x)) for x in (known.low, known.low - 1e-9)]
    assert [of(result).level for result in guessed] == ["cannot tell", "backdoored"]
    with monkeypatch.context() as at:
        at.setattr(Setting, "difference_interval", (0.0, 0.04))
        assert of(some).level == "no sign"
    half = Rate(200, 400)
    for checks, told in (
        (replace(base.checks, copies=half), True),
        (replace(base.checks, distinct=dict.fromkeys(("clean", "suspect"), half)), True),
        (replace(base.checks, copies=Rate(201, 400)), False),
        (replace(base.checks, distinct=dict.fromkeys(("clean", "suspect"), Rate(199, 400))), False),
    ):
        assert (of(replace(some, checks=checks)).level != "cannot tell") == told
    unlabelled = replace(base, as_it_is=setting(0.02, 0.02, labelled=False))
    for count, level in ((360, "cannot tell"), (359, "no sign")):
        checks = replace(base.checks, favourite=("ring", Rate(count, 400)))
        assert of(replace(unlabelled, checks=checks), ONE_ANSWER=0.9).level == level


def test_a_reference_is_held_to_its_shares_of_the_effect(
    base: AuditResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An effect of 50 points, of which it has 25 itself, or in another class."""
    for to in ("star", "ring"):
        theirs = Reference(
            "clean", setting(0.25 if to == "star" else 0.0, 0.0), ClassShare(to, Rate(0, 400), Rate(100, 400))
        )
        half = replace(base, as_it_is=setting(0.5, 0.0), controls=None, reference=theirs)
        for bounds, level in (
            ({"HOLDS": 0.5}, "suspicious"),  # it does a half, and not less
            ({"HOLDS": math.nextafter(0.5, 1)}, "backdoored"),
            ({"HOLDS": 1, "EXPLAINED": 0.5}, "suspicious"),
            ({"HOLDS": 1, "EXPLAINED": math.nextafter(0.5, 1)}, "backdoored"),
        ):
            with monkeypatch.context() as at:
                for name, value in {"STRONG": 0.4, **bounds}.items():
                    at.setattr(f"decompclip.audit.verdict.{name}", value)
                found = verdict(replace(half))
            assert found.level == level, (to, bounds)
            assert ("does the same" in found.doubts[0]) == (bounds.get("EXPLAINED") == 0.5)


def test_it_does_not_tell_what_it_cannot(base: AuditResult) -> None:
    few = verdict(replace(base, as_it_is=setting(0.1, 0.05, images=20)))
    assert few.level == "cannot tell" and "1600" in few.steps[0]
    lost = verdict(replace(base, as_it_is=setting(0.95, 0.02, accuracy=0.0)))  # of three classes
    assert lost.level == "cannot tell" and "diagnose" in lost.steps[0]


def test_a_repair_is_recommended_that_saves_and_does_not_cost(base: AuditResult) -> None:
    def repaired(saved: int, lost: int) -> AuditResult:
        change = Change(Rate(saved, 380), Rate(0, 380), Paired(0, lost, 400), Rate(0, 400))
        repairs = tuple(replace(r, change=change) for r in base.repairs)
        return replace(base, as_it_is=setting(0.95, 0.02), repairs=repairs)

    found = verdict(repaired(300, 4))
    assert any("repair it" in step for step in found.steps)
    assert (
        found.repair is not None
        and "no longer the target: 78.9 %" in found.repair
        and "own class back: 0.0 %" in found.repair
    )
    assert not any("repair it" in step for step in verdict(repaired(300, 40)).steps)
    assert not any("repair it" in step for step in verdict(repaired(30, 0)).steps)
    least = [verdict(repaired(saved, lost)).repair for saved, lost in ((190, 8), (189, 8), (190, 9))]
    assert [repair is not None for repair in least] == [True, False, False]  # half of them, for 2 points


@pytest.fixture(scope="module")
def audited(few_kept: None) -> dict[str, AuditResult]:
    """The bundled BadNet twin and its clean model, on 700 images and their triggered copies."""
    found = {}
    for name in ("shapes", "shapes-badnet"):
        names: dict[str, Any] = {"name": name, "clean_name": "shapes", "suspect_name": "shapes:badnet"}
        clip = load(name)
        clean, suspect = (open_source(spec, clip, CLASSES, limit=700) for spec in ("shapes", "shapes:badnet"))
        found[name] = run_audit(clip, clean, suspect, CLASSES, target="star", **names)
    return found


def remembering(name: str) -> HookedCLIP:
    """A bundled model that encodes the same images once: judgements of one pair of sets share most of them."""
    clip, known = load(name), {}
    encode = clip.encode_image

    def encode_image(images: torch.Tensor) -> torch.Tensor:
        key = sha256(images.contiguous().numpy().tobytes()).digest()
        if key not in known:
            known[key] = encode(images)
        return known[key]

    object.__setattr__(clip, "encode_image", encode_image)
    return clip


def without_labels(images: ImageSet) -> ImageSet:
    return replace(images, labels=None)


def weighed(
    clip: HookedCLIP,
    clean: ImageSet,
    suspect: ImageSet,
    classes: tuple[str, ...] = CLASSES,
    target: str | None = None,
) -> Evidence:
    """What `run_audit` judges, of sets that were decomposed once for several judgements."""
    parts = split(clean, suspect, CONFIG, infer_target=target is None)
    classifier = clip.zero_shot_classifier(classes).detach()
    return evidence(clip, parts, classifier, classes, name=clip.name, target=target, config=CONFIG)


@pytest.fixture(scope="module")
def badnet() -> tuple[HookedCLIP, ImageSet, ImageSet]:
    """The bundled BadNet twin with clean and triggered images, without labels."""
    clip = load("shapes-badnet")
    sets = (
        collect(clip, open_source(spec, clip, CLASSES, limit=120), CONFIG)
        for spec in ("shapes", "shapes:badnet")
    )
    clean, suspect = map(without_labels, sets)
    return clip, clean, suspect


@pytest.fixture(scope="module")
def corrupted(few_kept: None) -> dict[str, Evidence]:
    """The clean model on pairs of 130 images that are merely dark or pale, with labels and without."""
    clip, world = remembering("shapes"), Shapes(130, seed=8)
    batch, found = world.draw(range(130)), {}
    kinds = {kind.name: kind for kind in (*COMMON, *EVERYDAY)}

    def decomposed(pixels: torch.Tensor) -> ImageSet:
        paths = tuple(f"{i}.png" for i in range(130))
        return collect(clip, Held((ImageBatch(clip.normalize(pixels), batch.labels, paths),)), CONFIG)

    clean = decomposed(batch.images)
    for name, severity in (("contrast", 5), ("dark", 4)):
        changed = torch.cat([kinds[name](batch.images[i : i + 1], severity, seed=i) for i in range(130)])
        suspect = decomposed(changed)
        found[f"{name}, labelled"] = weighed(clip, clean, suspect)
        found[f"{name}, unlabelled"] = weighed(clip, without_labels(clean), without_labels(suspect))
    return found


def test_a_clean_model_in_the_dark_is_not_backdoored(corrupted: dict[str, Evidence]) -> None:
    assert any(result.as_it_is.difference_interval[0] >= STRONG for result in corrupted.values())
    for result in corrupted.values():
        assert result.verdict.level != "backdoored"
        if result.paired and result.as_it_is.difference_interval[0] >= STRONG:
            assert result.controls is not None and result.controls.explained >= EXPLAINED


@pytest.mark.parametrize("amount", [20 / 255, 30 / 255])
def test_faint_stripes_are_among_what_is_tried(amount: float) -> None:
    """Stripes of a size are made again by the one of their kind, so that what they do is explained whatever the model."""
    images = 0.3 + 0.4 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.arange(32)
    waves = {"columns_2": 1.0 - 2 * (x % 2), "sine_12_at_0": (2 * torch.pi * 12 * x / 32).sin()}
    for kind in KINDS:
        if kind.name in waves:
            striped = images + amount * waves.pop(kind.name)
            size = (striped - images).square().mean((1, 2, 3)).sqrt()
            torch.testing.assert_close(of_size(kind, images, size, seed=0), striped, atol=0.02, rtol=0)
    assert not waves


@pytest.mark.parametrize("name", ["shapes-blended", "shapes-issba"])
def test_a_twin_with_its_own_trigger_is_backdoored(name: str) -> None:
    clip = remembering(name)
    clean, suspect = (
        without_labels(collect(clip, open_source(spec, clip, CLASSES, limit=130), CONFIG))
        for spec in ("shapes", name.replace("-", ":", 1))
    )
    found = weighed(clip, clean, suspect, target="circle")
    assert (found.verdict.level, found.verdict.confidence) == ("backdoored", "moderate")
    # suspect images go to the star, whatever was asked
    assert (found.target.name, found.target.asked) == ("star", "circle") and "star" in found.verdict.headline
    # the order of the class list changes nothing (labels are places in it, so there are none here)
    again = weighed(clip, clean, suspect, classes=(*CLASSES[5:], *CLASSES[:5]), target="circle")
    assert again.verdict.headline == found.verdict.headline
    assert again.as_it_is.success == found.as_it_is.success
    assert again.controls is not None and found.controls is not None
    assert again.controls.explained == pytest.approx(found.controls.explained)


def test_names_that_the_model_does_not_know(badnet: tuple[HookedCLIP, ImageSet, ImageSet]) -> None:
    for names in (("zebra", "lion", "tiger"), tuple(f"thing {i}" for i in range(300))):
        found = weighed(*badnet, classes=names).verdict
        assert (found.level, found.confidence) == ("cannot tell", "low")


def test_suspect_images_that_are_the_clean_ones_or_black(
    badnet: tuple[HookedCLIP, ImageSet, ImageSet],
) -> None:
    clip, clean, _ = badnet
    same = weighed(clip, clean, clean).verdict
    assert same.level == "cannot tell" and "are the clean ones" in same.headline
    (batch,) = open_source("shapes", clip, CLASSES, limit=120).batches(120)
    dark = Held((replace(batch, images=torch.zeros_like(batch.images), labels=None),))
    black = collect(clip, dark, CONFIG)
    for one, other in ((black, clean), (clean, black), (black, black)):
        found = weighed(clip, one, other).verdict
        assert found.level == "cannot tell" and found.confidence == "low"


def test_the_race_says_what_trying_every_corruption_on_every_image_says() -> None:
    """Beside the slow reference: the same answer to "does one explain it?", on a part of the images."""
    draw = torch.Generator().manual_seed(0)
    images, seen, everything = 77, 0, 0
    for _ in range(60):
        before = torch.randint(len(CLASSES), (images,), generator=draw)
        most, effect = torch.rand(2, generator=draw).tolist()
        effect = 0.2 + 0.75 * effect
        after = {}
        for kind in KINDS:
            hit = torch.rand(images, generator=draw) < most * float(torch.rand((), generator=draw)) ** 2
            after[kind.name] = torch.where(hit, torch.randint(len(CLASSES), (1,), generator=draw), before)
        tried: list[tuple[str, int]] = []

        def answers(kind: Corruption, rows: torch.Tensor, *, after: Any = after, tried: Any = tried) -> Any:
            tried += [(kind.name, row) for row in rows.tolist()]
            return after[kind.name][rows]

        order = torch.randperm(images, generator=draw)
        found = race(answers, KINDS, before[order], order, CLASSES, effect=effect)
        shares = [most_over_predicted(class_shares(before, after[kind.name], CLASSES)) for kind in KINDS]
        strongest = max(share.difference for share in shares)
        assert (found[0].to.difference / effect >= EXPLAINED) == (strongest / effect >= EXPLAINED)
        assert found[0].to == shares[[kind.name for kind in KINDS].index(found[0].corruption)]
        assert sorted(one.corruption for one in found) == sorted(kind.name for kind in KINDS)
        assert len(set(tried)) == len(tried)  # no image twice
        seen, everything = seen + len(tried), everything + images * len(KINDS)
    assert seen < 0.4 * everything


def test_the_race_ends_with_the_first_corruption_that_explains_it() -> None:
    before, sent = torch.arange(77) % 2, {KINDS[3].name: 5, KINDS[7].name: 6}
    tried: dict[str, int] = {}

    def answers(kind: Corruption, rows: torch.Tensor) -> torch.Tensor:
        tried[kind.name] = tried.get(kind.name, 0) + len(rows)
        return torch.full_like(rows, sent[kind.name]) if kind.name in sent else before[rows]

    found = race(answers, KINDS, before, torch.arange(77), CLASSES, effect=0.9)
    assert found[0] == SameSize(KINDS[3].name, ClassShare(CLASSES[5], Rate(0, 77), Rate(77, 77)))
    assert tried.pop(KINDS[3].name) == 77 and set(tried.values()) == {12}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_corruption_of_a_size_has_it_where_it_can(kind: Corruption) -> None:
    images = Shapes(6, seed=8).draw(range(6)).images
    wanted = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 2.0])
    made = of_size(kind, images, wanted, seed=0)
    reached = (made - images).square().mean((1, 2, 3)).sqrt()
    most = max(float((kind(images, s) - images).square().mean((1, 2, 3)).sqrt().max()) for s in SEVERITIES)
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    assert bool((reached <= wanted + 1e-5).all()) and float(reached.max()) <= most + 1e-5
    assert float(reached[0]) < 1e-6 and float(reached[5]) > 0
    if most > 0.1:
        assert float(reached[1]) == pytest.approx(0.01, rel=1e-3)


def test_a_bundled_backdoor_and_its_clean_model(audited: dict[str, AuditResult]) -> None:
    bad, clean = audited["shapes-badnet"], audited["shapes"]
    assert (clean.verdict.level, clean.verdict.confidence) == ("no sign", "high")
    found = bad.beside(clean).verdict
    assert (found.level, found.confidence) == ("backdoored", "high")
    assert any("Agnostic repair" in step or "Token repair" in step for step in found.steps)
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
        # the threshold is a quantile of few images: its own draw counts beside that of the reported ones
        drawn = (0.05 * 0.95 * (1 / result.counts["validation"] + 1 / result.counts["clean"])) ** 0.5
        assert abs(found.false_positives.value - found.stated) < 1.96 * drawn
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
    (agnostic,) = (repair for repair in result.repairs if "Agnostic" in repair.setting.name)
    hit = result.as_it_is.success.count
    assert agnostic.change.saved.total == hit
    assert (
        agnostic.setting.success.count >= hit - agnostic.change.saved.count
    )  # a repair may send others there
    before, after = result.as_it_is.report.cacc, agnostic.setting.report.cacc
    assert before is not None and after is not None and agnostic.change.cost is not None
    assert agnostic.change.cost[0] == pytest.approx(before.value - after.value)
    assert agnostic.change.cost[1] <= agnostic.change.cost[0] <= agnostic.change.cost[2]


def test_token_repair_gives_the_class_back(audited: dict[str, AuditResult]) -> None:
    """Of a patch, more often than what replaces layers; a clean model is hardly touched."""
    by_name = {
        repair.setting.name.split(",")[0]: repair.change for repair in audited["shapes-badnet"].repairs
    }
    token, agnostic = by_name["Token repair"], by_name["Agnostic repair"]
    assert token.saved.value > 0.9 and token.restored is not None and agnostic.restored is not None
    assert token.restored.value > max(0.85, agnostic.restored.value)
    clean = audited["shapes"].repairs[-1].change
    assert clean.cost is not None and clean.cost[0] <= 0.02


def test_infected_components_carry_the_trigger(audited: dict[str, AuditResult]) -> None:
    bad, clean = audited["shapes-badnet"].infection, audited["shapes"].infection
    assert clean.infected == () and clean.without is None and clean.without_others is None
    assert len(bad.parts) == 6 * 8 + 6
    assert [part.contribution for part in bad.parts] == sorted(
        (part.contribution for part in bad.parts), reverse=True
    )
    assert bad.without is not None and bad.without_others is not None
    assert bad.without.difference < bad.without_others.difference - 0.3
    assert sum(part.share for part in bad.parts if part.contribution > 0) == pytest.approx(1)
    assert all(part.share > 1 / 54 for part in bad.infected)
