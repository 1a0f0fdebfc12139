"""What is measured of a model is what the package's own parts say, one by one; a memory looks once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decompclip.bench import run as running
from decompclip.bench.plan import REPAIRS, FitInputs, Plan
from decompclip.bench.run import Remembering, Subject, detection, evaluate_repair, measure
from decompclip.data.shapes import Shapes
from decompclip.defenses.detectors import DETECTORS
from decompclip.defenses.detectors.published import Mahalanobis
from decompclip.evaluation.metrics import auroc, auroc_interval, predict
from decompclip.intervals import Rate
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.zoo.recipes import WORLDS

TWIN, IMAGES = "shapes-blended", 120


def test_every_detector_and_repair_is_there(plan: Plan, measured: dict[str, Any]) -> None:
    assert tuple(measured["detectors"]) == plan.detectors
    assert tuple(measured["repairs"]) == tuple(REPAIRS)
    counts = measured["images"]
    assert (counts["fit"], counts["clean"], counts["other"]) == (IMAGES, IMAGES, IMAGES)
    assert 0 < counts["triggered"] < IMAGES


def test_a_detector_is_measured_on_images_it_was_not_fitted_on(subject: Subject) -> None:
    """Plainly, without the memory."""
    found = detection(subject, "Mahalanobis", images=IMAGES)
    s, model = subject.samples, load_bundled(TWIN)
    detector = Mahalanobis(model).fit(s.fit)
    clean, other = detector.score(s.clean), detector.score(s.other)
    assert subject.triggered is not None
    twins, own = detector.score(subject.triggered), clean[s.labels != subject.target]
    low, high = auroc_interval(own, twins)
    assert found["auroc"] == pytest.approx({"value": auroc(own, twins), "low": low, "high": high}, abs=1e-3)
    assert found["control"]["value"] == pytest.approx(
        auroc(own, other[s.other_labels != subject.target]), abs=1e-3
    )
    above = torch.cat([clean, other]) > detector.threshold_at(0.05)
    assert found["fpr"]["total"] == 2 * IMAGES
    assert found["fpr"]["count"] == pytest.approx(int(above.sum()), abs=1)
    assert found["tpr"]["value"] == pytest.approx(
        Rate.of(twins > detector.threshold_at(0.05)).value, abs=0.01
    )
    assert found["forwards"] == 1 and 0.2 < found["cost"] < 10


@pytest.mark.parametrize("name", ["k-distance", "Mahalanobis by class", "BDetCLIP", "Decomp-Det (paper)"])
@pytest.mark.filterwarnings("ignore:words unknown")
def test_without_a_trigger_there_is_nothing_to_find(subject: Subject, name: str) -> None:
    control = detection(subject, name, images=IMAGES)["control"]
    assert control["low"] <= 0.5 <= control["high"]
    assert control["high"] - control["low"] < 0.2


def test_a_trigger_is_found(measured: dict[str, Any]) -> None:
    assert measured["detectors"]["k-distance"]["auroc"]["low"] > 0.6


def test_terms_are_looked_at_once(subject: Subject) -> None:
    images = len(subject.samples.fit) * 4 + len(subject.triggered)  # type: ignore[arg-type]
    own = Subject.of(TWIN, images=IMAGES, seed=0, draws=2)
    for name in ("Decomp-Rep (cosine, quantile)", "last 5 MLPs", "none"):
        evaluate_repair(own, name, seed=0)
    assert own.model.looks <= images
    before = own.model.looks
    detection(own, "Decomp-Det (cosine, quantile)", images=IMAGES)
    timed = 1 + 2 * 3 * 64  # an image to warm up; a plain pass, and the detector's own
    assert own.model.looks - before <= len(subject.samples.other) + timed


def test_no_repair_is_the_model_itself(subject: Subject) -> None:
    found, world = evaluate_repair(subject, "none", seed=0), WORLDS["shapes"]
    model = load_bundled(TWIN)
    s, target = subject.samples, world.label
    with torch.no_grad():
        classifier = world.classifier(model)
        clean = predict(model.encode_image(model.normalize(s.clean)), classifier)
        twins = predict(model.encode_image(model.normalize(subject.triggered)), classifier)  # type: ignore[arg-type]
    others = s.labels != target
    hits = {
        "cacc": clean == s.labels,
        "asr": twins == target,
        "control": clean[others] == target,
        "triggered_accuracy": twins == s.labels[others],
    }
    for key, hit in hits.items():  # nothing is fitted: both draws say the same, and Wilson's interval is left
        one = Rate.of(hit)
        assert found[key]["draws"] == [one.value] * 2 and found[key]["total"] == one.total
        assert [found[key][end] for end in ("value", "low", "high")] == pytest.approx(
            [one.value, one.low, one.high]
        )
    assert found["asr"]["value"] > 0.9


def test_a_repair_is_fitted_on_each_draw_in_turn(subject: Subject) -> None:
    name = "Decomp-Rep (cosine, quantile)"
    found = evaluate_repair(subject, name, seed=0)["cacc"]
    clean = subject.model.terms(subject.samples.clean, "centred")
    for fit, value in zip(subject.samples.fits, found["draws"], strict=True):
        known = FitInputs(subject.model.terms(fit, "centred"), subject.classifier, "global", 0)
        answers = predict(REPAIRS[name].fit(known)(clean).features, subject.classifier)
        assert value == Rate.of(answers == subject.samples.labels).value
    assert found["value"] == pytest.approx(sum(found["draws"]) / 2)


def test_the_hint_is_the_twins_own(subject: Subject) -> None:
    """Of a global trigger: the right hint replaces MLPs, the wrong one judges heads."""
    terms = subject.model.terms(subject.samples.fit, "paper")
    known = FitInputs(terms, subject.classifier, "global", 0)
    right, wrong = (REPAIRS[f"Decomp-Rep (paper, {hint} hint)"].fit(known) for hint in ("right", "wrong"))
    assert (right.mlps, wrong.mlps) == (5, 0)  # type: ignore[attr-defined]
    clean = REPAIRS["Decomp-Rep (paper, right hint)"].fit(FitInputs(terms, subject.classifier, None, 0))
    assert clean.mlps == 0  # type: ignore[attr-defined]


def test_controls_replace_as_many_heads(subject: Subject) -> None:
    """Of other choice: fewer than all, and the fixed ones are the same in each image."""
    fit = subject.model.terms(subject.samples.fit, "centred")
    clean = subject.model.terms(subject.samples.clean, "centred")
    known = FitInputs(fit, subject.classifier, "global", 0)
    flags = REPAIRS["Decomp-Rep (cosine, quantile)"].fit(known).flags(clean)  # type: ignore[attr-defined]
    counts = {}
    for name in ("random heads", "fixed heads"):
        edited = REPAIRS[name].fit(known)(clean)
        changed = (edited.coords != clean.coords).any(-1)
        assert not changed[:, :-1].any()
        counts[name] = changed.sum((1, 2))
    assert torch.equal(counts["random heads"], flags.sum((1, 2)))
    assert counts["fixed heads"].unique().tolist() == [round(float(flags.sum((1, 2)).float().mean()))]


def test_a_clean_model_has_no_trigger_to_find() -> None:
    subject = Subject.of("shapes", images=70, seed=0)
    found = detection(subject, "k-distance", images=70)
    assert found["auroc"] is None and found["tpr"] is None and found["control"] is not None
    rates = evaluate_repair(subject, "none", seed=0)
    assert rates["asr"] is None and rates["triggered_accuracy"] is None
    assert rates["cacc"]["value"] > 0.9 and rates["control"]["value"] < 0.1


def test_slow_detectors_see_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTORS, "TeCo", DETECTORS["k-distance"])
    plan = Plan(models=(TWIN,), detectors=("TeCo", "k-distance"), repairs=(), images=90, slow_images=70)
    found = measure(TWIN, plan, seed=0)["detectors"]
    assert found["TeCo"]["images"] == 70 and found["TeCo"]["fpr"]["total"] == 140
    assert found["k-distance"]["images"] == 90
    assert found["TeCo"]["tpr"]["total"] < found["k-distance"]["tpr"]["total"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detectors": ("agnostic",), "repairs": ()}, "shapes-blended, agnostic: expected at least .* clean"),
        ({"detectors": (), "repairs": ("agnostic",)}, "shapes-blended, agnostic: expected at least .* clean"),
    ],
)
def test_too_few_images_for_what_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(TWIN, Plan(models=(TWIN,), images=45, **options), seed=0)


def test_progress_names_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "detection", lambda *a, **k: {})
    monkeypatch.setattr(running, "evaluate_repair", lambda *a, **k: {})
    lines: list[str] = []
    plan = Plan(models=("shapes",), detectors=("LID",), repairs=("none",), images=40)
    measure("shapes", plan, seed=1, log=lines.append)
    assert lines == ["shapes, seed 1: LID", "shapes, seed 1: 1 repairs"]


PIXELS = Shapes(12, seed=77).draw(range(12)).images


@pytest.fixture(scope="module")
def plain() -> HookedCLIP:
    return load_bundled("shapes")


def remembering(plain: HookedCLIP) -> Remembering:
    model = Remembering(plain, batch_size=5)
    model.remember(PIXELS[:8])
    return model


def test_it_says_what_the_model_says(plain: HookedCLIP) -> None:
    model, inputs = remembering(plain), plain.normalize(PIXELS)
    with torch.no_grad():
        for some in (inputs[:8], inputs[[3, 1, 3]], inputs[6:10], inputs[9:]):
            torch.testing.assert_close(model.encode_image(some), plain.encode_image(some))
            own = model.encode_image(some, normalize=True)
            torch.testing.assert_close(own, plain.encode_image(some, normalize=True))
            for convention in ("centred", "paper"):
                recalled = model.decompose(some, convention=convention, normalize=True)
                expected = plain.decompose(some, convention=convention, normalize=True)
                assert recalled.convention == convention and recalled.normalized
                torch.testing.assert_close(recalled.coords, expected.coords)
                torch.testing.assert_close(recalled.features, expected.features)


def test_it_looks_once_at_what_it_remembers(plain: HookedCLIP) -> None:
    model, inputs = remembering(plain), plain.normalize(PIXELS)
    for _ in range(3):
        model.encode_image(inputs[:3])
        model.terms(PIXELS[2:8], "centred")
    assert model.looks == 2 * 8  # features, and terms
    model.encode_image(inputs[9:])
    assert model.looks == 2 * 8 + 3
    model.decompose(inputs[:2])  # terms of raw features are not kept
    assert model.looks == 2 * 8 + 3 + 2


def test_it_looks_itself_where_tokens_are_asked_for(plain: HookedCLIP) -> None:
    model, pixels = Remembering(plain), Shapes(6, seed=3).draw(range(6)).images
    model.remember(pixels)
    images = model.normalize(pixels)
    assert model.decompose(images, normalize=True).token_terms is None
    assert model.decompose(images, normalize=True, tokens=True).token_terms is not None and model.looks == 12


def test_asleep_it_looks_again(plain: HookedCLIP) -> None:
    model, inputs = remembering(plain), plain.normalize(PIXELS)
    model.encode_image(inputs[:8])
    with pytest.raises(RuntimeError, match="inside"), model.asleep():
        model.encode_image(inputs[:8])
        assert model.looks == 16
        raise RuntimeError("inside")
    model.encode_image(inputs[:8])
    assert model.looks == 16


def test_it_is_the_same_model(plain: HookedCLIP) -> None:
    model = remembering(plain)
    assert model.visual is plain.visual and model.class_names == plain.class_names
    with torch.no_grad():
        assert torch.equal(model.zero_shot_classifier(), plain.zero_shot_classifier())
