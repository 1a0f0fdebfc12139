"""The parts of `diagnose`: intervals, pixels, orders of classes, logit scales, and the words of the result."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.data.shapes import PROPERTIES
from decompclip.diagnosis import Comparison, Diagnosis, Fault, Measurement
from decompclip.diagnosis.answers import checked_labels, known_by_features, mismatch, name_faults, other_order
from decompclip.diagnosis.pictures import NORMALISATIONS, corrected, denormalise, normalise
from decompclip.diagnosis.trials import Trial, better, compare, logit_scale_faults, weight_faults
from decompclip.intervals import Paired, Rate, mean_interval, noticeable

NAMES = PROPERTIES["shape"]
OWN = ((0.5,) * 3, (0.25,) * 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Paired differences


def test_the_interval_is_bonett_and_price_s() -> None:
    gained, lost, n, z = 17, 5, 100, norm.ppf(0.975)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    assert Paired(gained, lost, n).interval() == pytest.approx((up - down - half, up - down + half))


@pytest.mark.parametrize(
    ("gained", "lost", "total"), [(0, 0, 1), (0, 0, 50), (50, 0, 50), (0, 9, 9), (3, 4, 20)]
)
def test_the_interval_holds_the_value_and_turns_with_the_roles(gained: int, lost: int, total: int) -> None:
    paired, turned = Paired(gained, lost, total), Paired(lost, gained, total)
    low, high = paired.interval()
    assert -1 <= low <= paired.value <= high <= 1
    assert turned.interval() == pytest.approx((-high, -low))
    wide = paired.interval(8)
    assert wide[0] <= low and high <= wide[1] and wide != (low, high)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).multinomial(150, [0.08, 0.03, 0.89], size=2000)
    intervals = [Paired(int(g), int(lost), 150).interval() for g, lost, _ in draws]
    covered = np.mean([low <= 0.05 <= high for low, high in intervals])
    assert 0.94 <= covered <= 0.98


def test_pairs_are_counted_from_the_images() -> None:
    before, after = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 1, 0]).bool()
    assert Paired.of(before, after) == Paired(2, 1, 5)


@pytest.mark.parametrize("total", [1, 3, 10, 100, 500])
def test_what_is_noticeable_is_the_least_that_passes(total: int) -> None:
    passing = [g for g in range(total + 1) if Paired(g, 0, total).interval(7)[0] > 0.01]
    assert noticeable(total, comparisons=7, margin=0.01) == (passing[0] / total if passing else None)


def test_a_mean_s_interval() -> None:
    mean, low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    half = 4.302653 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    assert mean_interval(torch.tensor([1.0])) == (1, -math.inf, math.inf)


# Other settings


def said(**gains: tuple[int, int] | dict[str, tuple[int, int]]) -> list[tuple[str, str, str]]:
    """Check, severity and remedy of each fault, of a model that is right for 500 of 1000 images and of settings
    that gain and lose so many."""
    tried = []
    for check, choices in gains.items():
        for name, (gained, lost) in (choices if isinstance(choices, dict) else {"other": choices}).items():
            base, right = torch.arange(1000) < 500, torch.arange(1000) < 500 + gained
            right[:lost] = False
            trial: Any = Trial(check, name, lambda views: None, *(None, None), what="", remedy=name)  # pyright: ignore
            tried.append((trial, compare(trial, right, base, among=4)))
    return [(fault.check, fault.severity, fault.remedy) for fault in better(tried, Rate(500, 1000))]


def test_a_setting_is_found_only_where_its_interval_is_above_one_point() -> None:
    assert said(activation=(30, 12)) == []  # 1.8 points more, within chance
    assert said(activation=(12, 0)) == []  # beyond chance, and hardly a point
    assert said(activation=(0, 200)) == []
    assert said(activation=(40, 0)) == [("activation", "warning", "other")]
    assert said(activation=(120, 10)) == [("activation", "error", "other")]


def test_one_fault_a_check_is_told_and_the_costliest_first() -> None:
    normalisation = {"a": (100, 0), "b": (150, 0), "c": (149, 0)}
    found = said(geometry=(60, 0), normalisation=normalisation, activation=(0, 0))
    assert found == [("normalisation", "error", "b"), ("geometry", "warning", "other")]


def test_what_the_model_s_own_preprocessing_mends_is_no_fault_of_its_settings() -> None:
    assert [
        check for check, *_ in said(preprocessing=(100, 0), normalisation=(105, 0), channels=(90, 0))
    ] == ["preprocessing"]
    assert [check for check, *_ in said(preprocessing=(100, 0), normalisation=(300, 0))] == [
        "normalisation",
        "preprocessing",
    ]
    assert [check for check, *_ in said(preprocessing=(100, 0), activation=(90, 0))] == [
        "preprocessing",
        "activation",
    ]


# Pixels

PIXELS = torch.rand(6, 3, 8, 8, generator=generator())
PIXELS[0, :, 0, 0], PIXELS[0, :, 0, 1] = 0, 1


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ((255 * PIXELS).round().to(torch.uint8), "the pixels are integers (uint8)"),
        ((65535 * PIXELS).round().to(torch.int32), "the pixels are integers (int32)"),
        (255 * PIXELS, "the pixels are in 0..255, not in 0..1"),
        (PIXELS / 255, "the pixels are all but black: divided by 255 twice"),
        (normalise(PIXELS, OWN), "the pixels are normalised already"),
        (normalise(PIXELS, NORMALISATIONS["OpenAI's"]), "the pixels are normalised already"),
        (2 * PIXELS - 1, "the pixels are normalised already"),
        (PIXELS.permute(0, 2, 3, 1), "the channels stand last, [6, 8, 8, 3]"),
    ],
    ids=["uint8", "int32", "255", "twice", "own", "OpenAI's", "-1..1", "channels last"],
)
def test_pixels_are_brought_back_and_what_was_wrong_is_told(given: Tensor, what: str) -> None:
    pixels, faults = corrected(given, size=(8, 8), own=OWN)
    assert [fault.what for fault in faults] == [what]
    assert (pixels - PIXELS).abs().max() < 0.02


def test_good_pixels_are_left_alone() -> None:
    for pixels in (PIXELS, 1.1 * PIXELS - 0.05, torch.zeros_like(PIXELS), PIXELS.half()):
        same, faults = corrected(pixels, size=(8, 8), own=OWN)
        assert faults == ()
        assert torch.equal(same, pixels.float())


def test_pixels_in_no_known_range_are_stretched() -> None:
    pixels, faults = corrected(7 * PIXELS - 6, size=(8, 8), own=OWN)
    assert [fault.what for fault in faults] == ["the pixels are in no range that pixels are in"]
    assert pixels.min() == 0 and pixels.max() == 1


def test_normalisation_is_undone_exactly() -> None:
    for by in NORMALISATIONS.values():
        assert torch.allclose(denormalise(normalise(PIXELS, by), by), PIXELS, atol=1e-6)


# Labels and classes

LABELS = torch.arange(12).repeat(8)


def answers(labels: Tensor, *, wrong: float = 0.1) -> Tensor:
    """Right answers but for a share that is drawn."""
    drawn = torch.randint(0, 12, (len(labels),), generator=generator(1))
    return torch.where(torch.rand(len(labels), generator=generator(2)) < wrong, drawn, labels)


def order_of(classes: list[int], **options: object) -> str | None:
    """What is said where label `c` stands for class `classes[c]`; the order found has to be that one."""
    known: dict = {"reach": 0.2, "by_features": Rate(95, 96)} | options
    found = other_order(answers(torch.tensor(classes)[LABELS]), LABELS, NAMES, **known)
    if found is None:
        return None
    assert found[1].tolist() == classes
    return found[0].what


@pytest.mark.parametrize("by_features", [Rate(95, 96), None])
@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([11, *range(11)], "the labels are off by one (each class one place back): "),
        ([*range(1, 12), 0], "the labels are off by one (each class one place on): "),
        ([*range(11, -1, -1)], "the labels are in another order than the class names (reversed): "),
        (
            [NAMES.index(name) for name in sorted(NAMES)],
            "the labels are in another order than the class names (the alphabet's): 'circle' holds what the model calls "
            "'arrow'; 'square' holds what the model calls 'bolt'; 'triangle' holds what the model calls 'circle' and "
            f"{sum(a != b for a, b in zip(NAMES, sorted(NAMES), strict=True)) - 3} more",
        ),
    ],
    ids=["one back", "one on", "reversed", "alphabet"],
)
def test_a_simple_order_is_named(by_features: Rate | None, classes: list[int], words: str) -> None:
    told = order_of(classes, by_features=by_features)
    assert told is not None and told.startswith(words)


def test_any_order_is_found_where_there_are_images_enough() -> None:
    drawn = torch.randperm(12, generator=generator(5)).tolist()
    told = order_of(drawn)
    assert told is not None and told.startswith("the labels are in another order than the class names: ")
    assert order_of(drawn, by_features=None) is None


def test_two_swapped_classes_are_named_and_no_others() -> None:
    told = order_of([0, 1, 3, 2, *range(4, 12)])
    assert told == (
        "the labels are in another order than the class names: 'triangle' holds what the model calls 'star'; "
        "'star' holds what the model calls 'triangle'"
    )


def test_no_order_is_made_up() -> None:
    assert order_of([*range(12)]) is None
    for seed in range(
        20
    ):  # answers that have nothing to do with the labels, where some order always fits a little
        drawn = torch.randint(0, 12, (96,), generator=generator(seed))
        assert other_order(drawn, LABELS, NAMES, reach=0.1, by_features=Rate(20, 96)) is None
    shifted = [11, *range(11)]
    assert order_of(shifted, reach=0.95) is None  # another setting explains the answers as they are labelled
    few = LABELS[:12]
    assert other_order((few + 1) % 12, few, NAMES, reach=0.1, by_features=None) is None


def test_labels_are_checked() -> None:
    assert checked_labels(torch.tensor([0, 3], dtype=torch.int32), NAMES)[0].dtype == torch.long
    labels, (fault,) = checked_labels(torch.tensor([5, 12]), NAMES)
    assert labels.tolist() == [4, 11] and fault.what == "the labels count from 1 to 12"
    for labels in (torch.tensor([0, 12]), torch.tensor([-1, 3]), torch.tensor([1, 13])):
        with pytest.raises(
            ValueError, match=r"expected labels in 0\.\.11, the indices of 12 class names; received"
        ):
            checked_labels(labels, NAMES)
    for labels in (torch.tensor([]).long(), torch.tensor([[1]]), torch.tensor([True])):
        with pytest.raises(ValueError, match="expected labels .batch. of an integer type"):
            checked_labels(labels, NAMES)


def test_names_without_words_are_told() -> None:
    (fault,) = name_faults(["n01440764", "17", "n02 knot", "tench"])
    assert fault.what == "class names are identifiers, not words: n01440764, 17"
    assert not list(name_faults(NAMES))


def test_what_features_know_is_a_leave_one_out_nearest_mean() -> None:
    features = torch.randn(40, 6, generator=generator()) + 2 * F.one_hot(torch.arange(40) % 4, 6)
    labels = torch.arange(40) % 4
    centred = F.normalize((features - features.mean(0)).double(), dim=1)
    right = 0
    for i in range(40):  # the plain, slow way
        others = [centred[[j for j in range(40) if labels[j] == c and j != i]].sum(0) for c in range(4)]
        right += int(torch.stack([F.normalize(m, dim=0) @ centred[i] for m in others]).argmax()) == int(
            labels[i]
        )
    assert known_by_features(features, labels) == Rate(right, 40)
    assert right > 30
    assert known_by_features(features, torch.arange(40)) is None  # one image a class
    assert known_by_features(features[:10], labels[:10]) is None


def test_a_mismatch_is_told_from_weakness() -> None:
    good, guess = answers(LABELS), answers(LABELS, wrong=1.0)
    many, half, few = Rate(90, 96), Rate(45, 96), Rate(9, 96)
    assert mismatch(many, many, good, LABELS, 12) is None
    assert mismatch(half, many, good, LABELS, 12) is None  # zero-shot is often half as good
    for by_features, check in ((many, "text tower"), (few, "labels"), (None, "labels")):
        fault = mismatch(few, by_features, guess, LABELS, 12)
        assert fault is not None and fault.check == check
    constant = mismatch(few, few, torch.zeros_like(LABELS), LABELS, 12)
    assert constant is not None and constant.what.startswith("neither the answers nor the image features")
    assert mismatch(Rate(0, 8), None, guess[:8], LABELS[:8], 12) is None


# Weights


def model_like(**facts: object) -> SimpleNamespace:
    """What the checks of weights read of a model."""
    visual = nn.LayerNorm(3)
    nn.init.normal_(visual.weight, generator=generator())
    text: Any = nn.Module()
    text.logit_bias = None if not facts.pop("sigmoid", False) else nn.Parameter(torch.zeros(()))
    scale = torch.tensor(float(facts.pop("scale", 3.0)))  # pyright: ignore
    named = [("ln.weight", visual.weight), ("ln.bias", visual.bias)]
    return SimpleNamespace(
        visual=visual,
        text=text,
        provenance={},
        logit_scale=scale,
        cfg=SimpleNamespace(activation="gelu"),
        named_parameters=lambda: named,
        **facts,
    )


SIMILARITY = 0.3 * F.one_hot(LABELS, 12) + 0.05 * torch.randn(96, 12, generator=generator(3))


@pytest.mark.parametrize(
    ("scale", "words", "remedy"),
    [
        (29.5, "above ln 100: a factor is kept where its logarithm belongs", f": {math.log(29.5):.4f} here"),
        (100.0, "above ln 100: a factor is kept where its logarithm belongs", ": 4.6052 here"),
        (150.0, "far above ln 100", "keep the logarithm"),
        (4.9, "above ln 100, where training clamps it", "set it to at most 4.6052"),
        (-3.4, "negative: the logarithm of the temperature", ": 3.4000 here"),
        (0.07, "next to 0: the temperature itself", f": {-math.log(0.07):.4f} here"),
        (0.0, "next to 0: the temperature itself", "keep the logarithm"),
        (math.log(3.4), "the logarithm of a logarithm", ": 3.4000 here"),
        (math.log(math.log(100)), "the logarithm of a logarithm", ": 4.6052 here"),
        (math.inf, "not finite", "keep the logarithm"),
        (math.nan, "not finite", "keep the logarithm"),
        (math.log(1 / 0.07), "the one that CLIP's training starts with", "take it from the checkpoint"),
    ],
)  # fmt: skip
def test_a_wrong_logit_scale_is_told(scale: float, words: str, remedy: str) -> None:
    (fault,) = logit_scale_faults(model_like(scale=scale), SIMILARITY, LABELS)  # pyright: ignore
    assert words in fault.what and remedy in fault.remedy
    assert fault.severity == ("warning" if "starts with" in words else "error")


@pytest.mark.parametrize("scale", [math.log(100), 3.38, 2.0, 4.0])
def test_a_usual_logit_scale_is_not(scale: float) -> None:
    assert not list(logit_scale_faults(model_like(scale=scale), SIMILARITY, LABELS))  # pyright: ignore


def test_a_low_logit_scale_needs_a_loss_that_speaks_against_it() -> None:
    model = model_like(scale=1.2)
    assert not list(logit_scale_faults(model, None, LABELS))  # pyright: ignore
    assert not list(logit_scale_faults(model, torch.zeros(96, 12), LABELS))  # pyright: ignore
    (fault,) = logit_scale_faults(model, SIMILARITY, LABELS)  # pyright: ignore
    saved = fault.evidence[-1]
    by_hand = F.cross_entropy(SIMILARITY * math.exp(1.2), LABELS) - F.cross_entropy(
        SIMILARITY * math.exp(math.exp(1.2)), LABELS
    )
    assert saved.low is not None and 0 < saved.low < saved.value == pytest.approx(float(by_hand), rel=1e-4)


def test_sigmoid_losses_have_larger_scales() -> None:
    assert not list(logit_scale_faults(model_like(scale=4.77, sigmoid=True), None, LABELS))  # pyright: ignore
    (fault,) = logit_scale_faults(model_like(scale=math.log(10), sigmoid=True), None, LABELS)  # pyright: ignore
    assert "SigLIP's training starts with" in fault.what


def test_weights_that_are_not_finite_or_never_left_their_start_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("decompclip.diagnosis.trials.in_image_tower", lambda model: {"gelu"})
    model = model_like()
    assert not list(weight_faults(model))  # pyright: ignore
    trained = model.visual
    model.visual = nn.ModuleList([nn.LayerNorm(3), trained])
    (part,) = weight_faults(model)  # pyright: ignore
    assert (part.severity, part.what) == ("warning", "a part of the image tower looks untrained")
    assert [evidence.value for evidence in part.evidence] == [1, 2]
    model.visual = nn.LayerNorm(3)
    (whole,) = weight_faults(model)  # pyright: ignore
    assert (whole.severity, whole.what) == ("error", "the image tower looks untrained")
    model.visual, model.provenance = trained, {"pretrained": "random"}
    (asked,) = weight_faults(model)  # pyright: ignore
    assert asked.what == "the image tower has random weights, as was asked for"
    model.provenance = {}
    trained.bias.data[1] = math.nan
    (broken,) = weight_faults(model)  # pyright: ignore
    assert broken.what == "weights are not finite: ln.bias"


# The result


def result(*severities: str, **changes: Any) -> Diagnosis:
    shown = (
        Measurement("accuracy", 0.25, 0.2, 0.3, "%"),
        Measurement("difference", -0.1, -0.2, 0.05, "points"),
    )
    faults = [
        Fault(f"check {i}", f"<b>fault {i}", "mend it", shown, severity)  # pyright: ignore
        for i, severity in enumerate(severities)
    ]
    comparison = Comparison("channels", "blue, green, red", Rate(6, 10), Paired(1, 2, 10), (-0.4, 0.2))
    facts: dict[str, Any] = {
        "model": "shapes", "images": 10, "classes": 12, "accuracy": Rate(7, 10), "chance": 0.1,
        "findings": tuple(faults), "comparisons": (comparison,), "noticeable": 0.5,
    }  # fmt: skip
    return Diagnosis(**facts | changes)


def test_a_result_in_words() -> None:
    assert repr(result("error", unchecked=("geometry: no pictures",))) == (
        "Diagnosis of 'shapes': 1 finding; zero-shot accuracy 70.0 % [39.7, 89.2] on 10 images of 12 classes (expected at least 20 images)\n"
        "  error: <b>fault 0 (accuracy 25.0 % [20.0, 30.0]; difference -10.0 points [-20.0, +5.0]). Remedy: mend it.\n"
        "  settings that cost less than 50.0 points would not be noticed with so many images\n"
        "  not checked: geometry: no pictures"
    )
    assert repr(result()).startswith("Diagnosis of 'shapes': too few images to say; ")
    enough = repr(result(images=20))
    assert enough.startswith("Diagnosis of 'shapes': no finding; ") and "classes (chance 10.0 %)" in enough
    assert "on 1 image of 12 classes" in repr(result(images=1))
    assert result(images=20).ok and not result(images=19).ok and not result("warning", images=20).ok


def test_a_result_as_html_escapes_what_it_is_given() -> None:
    page = result("error")._repr_html_()
    assert "&lt;b&gt;fault 0" in page and "<b>" not in page
    assert page.count("<tr>") == 2 and "<table>" not in result()._repr_html_()


def test_a_result_as_a_table() -> None:
    frame = result("error", "warning").to_frame()
    assert frame["evidence"].tolist() == ["accuracy", "difference"] * 2
    assert frame["severity"].tolist() == ["error"] * 2 + ["warning"] * 2
    empty = result().to_frame()  # its columns are the same where nothing was found
    assert len(empty) == 0 and list(empty.columns) == list(frame.columns)


def test_a_result_as_json() -> None:
    told = json.loads(json.dumps(result("error").to_dict()))
    assert told["ok"] is False and told["findings"][0]["evidence"][0]["low"] == 0.2
    assert told["comparisons"][0]["difference"]["value"] == -0.1


def test_a_result_as_a_figure() -> None:
    figure: Any = result().figure()
    trace, chance, bars = figure.data
    assert list(figure.layout.yaxis.ticktext) == ["as it is", "blue, green, red"]
    assert list(trace.x) == [70, 60]
    assert set(chance.x) == {100 * result().chance}
    assert bars.name == "95 % interval"
