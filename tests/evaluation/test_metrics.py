"""Rates, intervals, attack reports and AUROC: identities, published values, and the words of errors."""

from __future__ import annotations

import json
import math
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import beta, binomtest, norm
from torch import Tensor, tensor

from decompclip.evaluation.metrics import (
    AttackReport,
    GroupAccuracy,
    attack_report,
    attack_success,
    auroc,
    auroc_interval,
    clean_accuracy,
    group_accuracy,
    per_class_accuracy,
    predict,
)
from decompclip.intervals import Rate, Redrawn, difference_interval, wilson

# Six images, target class 2: the last two are of the target class.
LABELS = tensor([0, 0, 1, 1, 2, 2])
CLEAN = tensor([0, 2, 1, 0, 2, 2])
TRIGGERED = tensor([2, 2, 2, 1, 2, 0])


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave wrong shapes to the package's own checks, as in use: jaxtyping would speak first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


counts = st.integers(0, 400).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
rates = counts.map(lambda pair: Rate(*pair))


def test_wilson_equals_newcombes_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (count, total), interval in published.items():
        rate = Rate(count, total)
        assert (rate.low, rate.high) == pytest.approx(interval, abs=5e-5)


@given(counts.filter(lambda pair: pair[1] > 0))
def test_rate_has_scipys_wilson_interval_around_its_value(pair: tuple[int, int]) -> None:
    rate = Rate(*pair)
    expected = binomtest(*pair).proportion_ci(method="wilson")
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_difference_equals_newcombes_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10
    assert difference_interval(Rate(56, 70), Rate(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_interval(Rate(10, 10), Rate(0, 10)) == pytest.approx((0.6075, 1.0), abs=5e-5)


@given(rates, rates)
def test_difference_holds_its_value_and_turns_its_sign(a: Rate, b: Rate) -> None:
    low, high = difference_interval(a, b)
    assert -1 - 1e-12 <= low <= high <= 1 + 1e-12
    assert (-high, -low) == pytest.approx(difference_interval(b, a))
    if a.total and b.total:
        assert low <= a.value - b.value <= high


def test_rate_reads_well_and_goes_into_json() -> None:
    rate = Rate.of(torch.arange(1000) < 931)
    assert str(rate) == "93.1 % [91.4, 94.5]"
    assert json.loads(json.dumps(rate.to_dict())) == rate.to_dict()
    assert rate.to_dict()["count"] == 931


def test_a_rate_of_nothing_says_so() -> None:
    nothing = Rate.of(torch.zeros(0, dtype=torch.bool))
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0, 1)
    assert str(nothing) == "no images"
    assert nothing.to_dict()["value"] is None


@pytest.mark.parametrize("pair", [(3, 2), (-1, 2)])
def test_an_impossible_rate_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= count <= total; received count"):
        Rate(*pair)


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(
        ValueError, match=r"expected a share in 0\.\.1 of more than 0 trials; received 0.5 of 0"
    ):
        wilson(0.5, 0)


def test_predict_takes_the_first_of_equals() -> None:
    classifier = tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert predict(tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]]), classifier).tolist() == [0, 1, 0]


def test_predict_ignores_the_features_length_and_mixes_precisions() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 8, generator=generator)
    classifier = torch.randn(5, 8, generator=generator)
    assert torch.equal(predict(features, classifier), predict(7 * features, classifier))
    assert torch.equal(predict(features.double(), classifier), predict(features, classifier))


@pytest.mark.usefixtures("ours_alone")
def test_predict_refuses_other_widths_and_nan() -> None:
    with pytest.raises(ValueError, match=r"width 4; received one of width 5; build it with the text tower"):
        predict(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="received nan for 2 of 3 images; run the model in float32"):
        predict(tensor([[math.nan], [1.0], [math.nan]]), torch.ones(3, 1))


def test_accuracy_by_hand() -> None:
    assert clean_accuracy(CLEAN, LABELS) == Rate(4, 6)
    assert per_class_accuracy(CLEAN, LABELS, 4) == [Rate(1, 2), Rate(1, 2), Rate(2, 2), Rate(0, 0)]


def test_attack_success_by_hand() -> None:
    assert attack_success(TRIGGERED, LABELS, 2) == Rate(3, 4)
    assert attack_success(CLEAN, LABELS, 2) == Rate(1, 4)
    assert attack_success(TRIGGERED, LABELS, 0) == Rate(1, 4)
    assert attack_success(TRIGGERED[4:], LABELS[4:], 2) == Rate(0, 0)


def test_report_by_hand() -> None:
    report = attack_report(CLEAN, LABELS, TRIGGERED, LABELS, 2)
    assert (report.cacc, report.control) == (Rate(4, 6), Rate(1, 4))
    assert (report.asr, report.asr_with_target) == (Rate(3, 4), Rate(4, 6))
    assert report.excess == pytest.approx(0.5)
    assert report.excess_interval == pytest.approx(difference_interval(Rate(3, 4), Rate(1, 4)))
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["excess"]["value"] == pytest.approx(0.5)


def test_a_model_that_always_answers_the_target_has_no_excess() -> None:
    always = torch.full((200,), 2)
    labels = torch.arange(200) % 2
    report = attack_report(always, labels, always, labels, 2)
    assert report.asr == Rate(200, 200)
    assert report.excess == 0
    low, high = report.excess_interval or (1, -1)
    assert low < 0 < high


def test_report_leaves_open_what_it_cannot_know() -> None:
    untargeted = attack_report(CLEAN, LABELS, TRIGGERED, LABELS)
    assert untargeted.cacc == Rate(4, 6)
    assert (untargeted.asr, untargeted.asr_with_target, untargeted.control) == (None, None, None)
    assert untargeted.excess is None
    assert untargeted.excess_interval is None
    assert untargeted.to_dict()["excess"] is None

    unlabelled = attack_report(CLEAN, None, TRIGGERED, None, 2)
    assert (unlabelled.cacc, unlabelled.asr, unlabelled.control) == (None, None, None)
    assert unlabelled.asr_with_target == Rate(4, 6)

    for one in (AttackReport(None, Rate(3, 4), None, None), AttackReport(None, None, None, Rate(1, 4))):
        assert one.excess is None and one.excess_interval is None

    only_target = attack_report(CLEAN, LABELS, TRIGGERED[4:], LABELS[4:], 2)
    assert only_target.to_dict()["excess"] is None


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize(
    ("predictions", "labels", "target", "words"),
    [
        (
            CLEAN,
            LABELS[:4],
            2,
            "one label for each prediction; received 6 predictions and 4 labels; take both",
        ),
        (CLEAN[:0], LABELS[:0], 2, "at least one image; received none; check the image source"),
        (
            CLEAN,
            LABELS,
            -1,
            r"target in 0\.\.2, .*; received -1; `decompclip.data.images.class_index`",
        ),
        (CLEAN, LABELS, 3, r"target in 0\.\.2, .*; received 3; "),
    ],
)
def test_wrong_input_is_named(predictions: Tensor, labels: Tensor, target: int, words: str) -> None:
    for pair in ((CLEAN, LABELS, predictions, labels), (predictions, labels, CLEAN, LABELS)):
        with pytest.raises(ValueError, match=words):
            attack_report(*pair, target, n_classes=3)
    if target == 2:
        with pytest.raises(ValueError, match=words):
            attack_success(predictions, labels, target)
        with pytest.raises(ValueError, match=words):
            clean_accuracy(predictions, labels)
        with pytest.raises(ValueError, match=words):
            per_class_accuracy(predictions, labels, 3)


def test_labels_past_the_classes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected labels in 0\.\.1; received 0\.\.2; label the images with"
    ):
        per_class_accuracy(CLEAN, LABELS, 2)


scores = st.lists(st.integers(0, 12), min_size=1, max_size=30).map(lambda values: tensor(values))


def test_a_rate_after_several_draws_covers_what_one_more_draw_gives() -> None:
    """On fresh images: draws differ by 7 points, and Wilson's interval of a single one mostly misses the next."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    for _ in range(400):
        truth = np.clip(rng.normal(0.79, 0.07, size=6), 0, 1)
        images = rng.random(900)  # the same for every draw
        rates = [Rate(int((images < share).sum()), 900) for share in truth[:5]]
        fresh = rng.binomial(100_000, truth[5]) / 100_000
        found = Redrawn(tuple(rates))
        covered += found.low <= fresh <= found.high
        alone += rates[0].low <= fresh <= rates[0].high
    assert 0.92 * 400 <= covered <= 0.98 * 400
    assert alone < 0.5 * 400


def test_draws_that_agree_leave_wilson_s_interval_and_one_draw_tells_nothing() -> None:
    one = Rate(30, 200)
    same = Redrawn((one,) * 5)
    assert (same.value, same.low, same.high) == pytest.approx((one.value, one.low, one.high))
    assert same.to_dict()["draws"] == [0.15] * 5 and str(same) == str(one)
    alone = Redrawn((one,))
    assert (alone.low, alone.high) == (0.0, 1.0)
    two = Redrawn((Rate(20, 200), Rate(40, 200)))
    half = 12.7062047 * np.std([0.1, 0.2], ddof=1) * math.sqrt(1.5)
    assert two.high == pytest.approx(min(1.0, 0.15 + math.hypot(half, wilson(0.15, 200)[1] - 0.15)))
    with pytest.raises(
        ValueError, match=r"rates on the same images, .* received 2 rates of \[100, 200\] images"
    ):
        Redrawn((one, Rate(3, 100)))
    with pytest.raises(ValueError, match="received 0 rates of"):
        Redrawn(())


@given(scores, scores)
def test_auroc_counts_ordered_pairs(clean: Tensor, suspect: Tensor) -> None:
    pairs = suspect[:, None].double() - clean
    assert auroc(clean, suspect) == pytest.approx(float(((pairs.sign() + 1) / 2).mean()))
    assert auroc(clean, suspect) == pytest.approx(1 - auroc(suspect, clean))


@given(scores, scores)
def test_auroc_interval_holds_its_value_and_mirrors(clean: Tensor, suspect: Tensor) -> None:
    low, high = auroc_interval(clean, suspect)
    assert 0 <= low <= auroc(clean, suspect) + 1e-12
    assert auroc(clean, suspect) - 1e-12 <= high <= 1
    assert auroc_interval(suspect, clean) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("area", "n", "narrower"), [(0.99, 200, 0.9), (0.99, 1000, 0.85), (0.999, 1000, 0.75)]
)
def test_auroc_interval_near_one_is_no_wider_than_the_images_ask_for(
    area: float, n: int, narrower: float
) -> None:
    """Of two normal laws, where many images bear the variance: it covers, and is narrower than so many coin flips would be."""
    rng, covered, width = np.random.default_rng(0), 0, 0.0
    for _ in range(150):
        clean = tensor(rng.normal(size=n))
        suspect = tensor(rng.normal(size=n) + math.sqrt(2) * norm.ppf(area))
        low, high = auroc_interval(clean, suspect)
        covered += low <= area <= high
        width += (high - low) / 150
    plain = wilson(area, 2 * n)
    assert covered >= 0.93 * 150
    assert width < narrower * (plain[1] - plain[0])


@pytest.mark.parametrize("n", [50, 200])
def test_auroc_interval_holds_where_few_suspects_look_clean(n: int) -> None:
    """A share of them does, all others are far: hardly an image tells so, and a variance alone would be sure of itself."""
    area, rng, covered = 0.99, np.random.default_rng(1), 0
    for _ in range(200):
        alike = rng.random(n) < 2 * (1 - area)
        clean, suspect = rng.normal(size=n), rng.normal(size=n) + np.where(alike, 0, 50)
        low, high = auroc_interval(tensor(clean), tensor(suspect))
        covered += low <= area <= high
    assert covered >= 0.9 * 200


def test_auroc_interval_of_a_perfect_detector_is_no_point() -> None:
    low, high = auroc_interval(torch.zeros(50), torch.ones(50))
    assert high == 1
    assert low == pytest.approx(Rate(100, 100).low)


@pytest.mark.parametrize(("n", "m"), [(30, 50), (50, 30)])
def test_a_perfect_detector_is_as_sure_as_twice_the_smaller_sample(n: int, m: int) -> None:
    low, high = auroc_interval(torch.zeros(n), torch.ones(m))
    assert (low, high) == pytest.approx((Rate(60, 60).low, 1))
    assert auroc_interval(torch.ones(n), torch.zeros(m)) == pytest.approx((0, Rate(0, 60).high))


@pytest.mark.parametrize(
    ("n", "m", "overlap"), [(7, 5, None), (25, 30, None), (40, 9, None), (25, 30, 3), (40, 9, 3), (2, 30, 3)]
)
def test_auroc_interval_stands_on_delong_s_variance(n: int, m: int, overlap: int | None) -> None:
    """Plain loops over pairs; the variance becomes trials of Wilson's interval, and few images bear it where the sides hardly overlap."""
    draw = np.random.default_rng(n)
    clean, suspect = draw.integers(-3, 4, n), draw.choice([-9, 0, 9], m, p=[0.3, 0.2, 0.5])
    clean, suspect = (torch.from_numpy(x).double() for x in (clean, suspect))
    if overlap is not None:
        clean, suspect = torch.arange(n).double(), torch.arange(m).double() + n - overlap
    wins = [[float(s > c) + 0.5 * float(s == c) for s in suspect] for c in clean]
    area = np.mean(wins)
    of_clean, of_suspect = np.mean(wins, axis=1), np.mean(wins, axis=0)
    variance = sum(
        sum((x - np.mean(side)) ** 2 for x in side) / (len(side) - 1) / len(side)
        for side in (of_clean, of_suspect)
    )
    trials, most = area * (1 - area) / variance, 2 * min(n, m)
    assert (trials > most) == (overlap is not None)
    if trials > most:
        shares = [((x - np.mean(side)) / len(side)) ** 2 for side in (of_clean, of_suspect) for x in side]
        bearing = sum(shares) ** 2 / sum(share**2 for share in shares)
        trials = most + (trials - most) * bearing / (bearing + 20)
    assert auroc_interval(clean, suspect) == pytest.approx(wilson(float(area), float(trials)))


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_auroc_interval_covers_the_truth(shift: float) -> None:
    generator = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(shift / 2))  # of two normals, `shift` deviations apart
    covered = 0
    for _ in range(600):
        clean, suspect = torch.from_numpy(generator.normal([[0.0], [shift]], size=(2, 60)))
        low, high = auroc_interval(clean, suspect)
        covered += low <= truth <= high
    assert 0.93 * 600 <= covered <= 0.985 * 600


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    with pytest.raises(ValueError, match="scores of clean and of suspect images; received no suspect ones"):
        auroc(torch.ones(3), torch.ones(0))
    with pytest.raises(
        ValueError, match="finite scores; received 1 infinite or nan among 3 clean ones; leave"
    ):
        auroc_interval(tensor([math.inf, 0.0, 1.0]), torch.ones(3))


# Groups of a class and a cue


def answers(seed: int, n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels, cues = torch.randint(2, (n,), generator=draws), torch.randint(3, (n,), generator=draws)
    wrong = torch.rand(n, generator=draws) < 0.1 + 0.2 * (labels != cues)
    return torch.where(wrong, 1 - labels, labels), labels, cues


def test_groups_equal_plain_counts_and_the_worst_is_the_least() -> None:
    predictions, labels, cues = answers(0)
    found = group_accuracy(predictions, labels, cues, class_names=["bird", "cat"], cue_names=["a", "b", "c"])
    values = {}
    for name, label in (("bird", 0), ("cat", 1)):
        for cue, place in (("a", 0), ("b", 1), ("c", 2)):
            own = [
                p == label
                for p, y, c in zip(predictions, labels, cues, strict=True)
                if (y, c) == (label, place)
            ]
            values[name, cue] = sum(map(bool, own)) / len(own)
    assert list(values) == list(found.names)
    assert [rate.value for rate in found.rates] == list(values.values())
    assert found.worst == min(values.values()) == values[found.worst_group]
    assert found.accuracy.value == clean_accuracy(predictions, labels).value
    frame = found.to_frame()
    assert frame["images"].sum() == 400 and frame["accuracy"].tolist() == list(values.values())
    assert list(zip(frame["class"], frame["cue"], strict=True)) == list(values)
    plot: Any = found.figure()
    seen = {trace.name: list(trace.x) for trace in plot.data}
    for cue in "abc":
        assert seen[cue] == pytest.approx([100 * values["bird", cue], 100 * values["cat", cue]])
    assert (plot.layout.xaxis.title.text, plot.data[-1].name) == ("accuracy, %", "95 % interval")
    assert list(plot.layout.yaxis.ticktext) == ["bird", "cat"]
    said = json.loads(json.dumps(found.to_dict()))
    assert said["worst"]["value"] == found.worst and tuple(said["worst"]["group"]) == found.worst_group
    assert f"worst {100 * found.worst:.1f} %: {found.worst_group[0]}" in repr(found)


def test_intervals_of_the_worst_group_are_those_of_plain_draws() -> None:
    found = group_accuracy(*answers(1))
    draws, worst = np.random.default_rng(5), []
    own = [found.right[found.group == place].numpy() for place in range(len(found))]
    for _ in range(4000):
        worst.append(min(draws.choice(x, len(x)).mean() for x in own))
    ends = np.quantile(worst, [0.025, 0.975])
    low, high = found.interval(draws=4000)
    assert (low, high) == pytest.approx(tuple(ends), abs=0.012)
    assert low < found.worst < high and (low, high) == found.interval(draws=4000)
    assert len({found.interval(seed=seed, draws=50) for seed in range(-1, 4)}) > 1


def test_few_images_make_no_group_certain() -> None:
    right = tensor([0, 1] * 5)
    before = group_accuracy(1 - right, right, right * 0)
    after = group_accuracy(right, right, right * 0)
    # the worse of two posteriors of five out of five
    ends = beta.ppf(1 - np.sqrt(1 - np.array([0.025, 0.975])), 5.5, 0.5)
    assert after.interval(draws=200_000) == pytest.approx(ends, abs=0.003)
    value, least, most = after.gain(before)
    assert value == 1 and 0.3 < least < most < 1


def test_intervals_of_the_worst_group_hold_it_as_often_as_they_say() -> None:
    """The truth is known here: three groups of thirty images, one of which is worse than the others."""
    truth, held, times = tensor([0.95, 0.9, 0.7]), 0, 400
    generator = torch.Generator().manual_seed(0)
    cues = torch.arange(90) % 3
    for _ in range(times):
        wrong = (torch.rand(90, generator=generator) > truth[cues]).long()
        low, high = group_accuracy(wrong, wrong * 0, cues).interval(draws=400)
        held += low <= 0.7 <= high
    assert 0.92 <= held / times <= 0.99


def test_a_gain_is_of_the_same_images() -> None:
    predictions, labels, cues = answers(2)
    before = group_accuracy(predictions, labels, cues)
    better = predictions.clone()
    better[:200] = labels[:200]
    after = group_accuracy(better, labels, cues)
    value, low, high = after.gain(before)
    assert value == after.worst - before.worst > 0 and 0 <= low < value < high
    value, low, high = before.gain(before)
    assert value == 0 and -0.05 < low <= 0 <= high < 0.05
    # of the same images it is narrower than that of two sets would be
    apart = [end - start for start, end in (after.interval(), before.interval())]
    assert high - low < math.hypot(*apart)
    with pytest.raises(ValueError, match="the same images in the same groups"):
        after.gain(group_accuracy(predictions, labels, cues.flip(0)))


def test_a_place_of_a_class_is_a_whole_number_an_image(ours_alone: None) -> None:
    """Scores in the place of predictions gave a share of all scores; small whole numbers counted groups past 255 from 0 again."""
    labels, cues = torch.arange(200).repeat(2), torch.arange(2).repeat_interleave(200)
    small = group_accuracy(labels.byte(), labels.byte(), cues.byte())
    assert len(small) == 400 and small.worst == 1 and torch.equal(small.group, labels * 2 + cues)
    assert group_accuracy(labels, labels, cues.bool()).names == small.names
    for odd in (torch.rand(400, 400), torch.rand(400), labels[:, None], labels.tolist()):
        for answers_of in ((odd, labels, cues), (labels, odd, cues), (labels, labels, odd)):
            with pytest.raises(ValueError, match=r"a whole number an image, .* of scores take \.argmax"):
                group_accuracy(*answers_of)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="a whole number an image"):
            clean_accuracy(odd, labels)  # pyright: ignore[reportArgumentType]
    for names in (["a", "a"], "ab", []):
        with pytest.raises(ValueError, match="a list of names of cues, each once; received"):
            group_accuracy(labels, labels, cues, cue_names=names)
    with pytest.raises(ValueError, match="draws to be a whole number of draws, at least 1; received 0"):
        small.interval(draws=0)


def test_groups_without_images_are_refused(ours_alone: None) -> None:
    predictions, labels, cues = answers(3)
    none = (labels == 1) & (cues == 2)
    rest = [x[~none] for x in (predictions, labels, cues)]
    few = torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"received none in 4: 0, 1; 0, 2; 1, 0 and 1 more; take more images"
    ):
        group_accuracy(few, few, few, cue_names=["0", "1", "2"])
    with pytest.raises(ValueError, match=r"received none in 2: 0, 1; 1, 0; take more images"):
        group_accuracy(few, few, few)
    with pytest.raises(ValueError, match="received none in 1: 1, 2; take more images"):
        group_accuracy(*rest)
    with pytest.raises(ValueError, match="none in 6: x, d; y, d; z, a and 3 more;"):
        group_accuracy(predictions, labels, cues, cue_names=["a", "b", "c", "d"], class_names=["x", "y", "z"])
    with pytest.raises(ValueError, match=r"cues in 0\.\.1, one of a, b; received 0\.\.2"):
        group_accuracy(predictions, labels, cues, cue_names=["a", "b"])
    with pytest.raises(ValueError, match="labels in"):
        group_accuracy(predictions, labels - 1, cues)
    for short in ((predictions, labels[:5], cues), (predictions, labels, cues[:5])):
        with pytest.raises(ValueError, match="received 400 predictions and 5 labels; take both"):
            group_accuracy(*short)
    with pytest.raises(ValueError, match="at least one image"):
        group_accuracy(predictions[:0], labels[:0], cues[:0])
    assert isinstance(group_accuracy(predictions, labels, cues), GroupAccuracy)
