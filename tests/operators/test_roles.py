"""Change of role: identities of the measures, and their intervals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompclip.operators.roles import Described, RoleChange, role_change


def features(seed: int, n: int, width: int = 16) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def described(x: Tensor, first: int = 0) -> Any:
    return SimpleNamespace(texts=[f"text {first + i}" for i in range(len(x))], features=x)


@pytest.fixture(scope="module")
def pool() -> Tensor:
    return features(9, 60) + 2  # with a mean that all share, as CLIP's texts have


def test_a_description_has_not_changed_from_itself(pool: Tensor) -> None:
    for centre in (None, pool):
        same = role_change(described(pool[:6]), described(pool[:6]), draws=50, pool=centre)
        for estimate in same.measures.values():
            assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))
        torch.testing.assert_close(same.angles, torch.zeros(6).double(), atol=1e-5, rtol=0)
        assert same.shared == same.before


def test_the_order_length_and_side_of_texts_do_not_matter(pool: Tensor) -> None:
    x, y = features(0, 5), features(1, 7)
    base = role_change(described(x), described(y), pool=pool, draws=1)
    lengths = torch.linspace(1e-2, 10, len(pool))[:, None]
    scaled = role_change(described(3 * x.flip(0)), described(0.5 * y), pool=lengths * pool, draws=1)
    mirrored = role_change(described(y), described(x), pool=pool, draws=1)
    names = list(base.measures)
    crossed = ["text similarity", "span overlap", "after by before", "before by after"]
    for name, other in zip(names, crossed, strict=True):
        assert scaled.measures[name].value == pytest.approx(base.measures[name].value)
        assert scaled.measures[name].chance == pytest.approx(base.measures[name].chance)
        assert mirrored.measures[other].value == pytest.approx(base.measures[name].value)


def test_measures_are_what_they_say() -> None:
    x, y = features(0, 4), features(1, 3)
    found = role_change(described(x), described(y), draws=1)
    u, v = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x, y))
    nearest = [max(float(a @ b) for b in v) for a in u], [max(float(a @ b) for a in u) for b in v]
    assert found.similarity.value == pytest.approx((np.mean(nearest[0]) + np.mean(nearest[1])) / 2)
    torch.testing.assert_close(found.cosines, u @ v.T)

    P, Q = (t.T @ torch.linalg.inv(t @ t.T) @ t for t in (u, v))
    shared = float((P @ Q).trace())
    assert found.overlap.value == pytest.approx((shared / 4 + shared / 3) / 2)
    assert found.angles.deg2rad().cos().square().sum().item() == pytest.approx(shared)
    assert (found.angles.diff() >= 0).all()
    assert found.measures["before by after"].value == pytest.approx(float((u @ Q @ u.T).trace()) / 4)
    assert found.measures["after by before"].value == pytest.approx(float((v @ P @ v.T).trace()) / 3)


def test_known_spans() -> None:
    axes = torch.eye(6)
    half = role_change(described(axes[:2]), described(axes[1:3]), draws=1)
    assert half.angles.tolist() == pytest.approx([0, 90])
    assert half.overlap.value == pytest.approx(0.5)
    assert half.similarity.value == pytest.approx(0.5)
    assert half.measures["before by after"].value == pytest.approx(0.5)
    apart = role_change(described(axes[:2]), described(axes[3:]), draws=1)
    assert [estimate.value for estimate in apart.measures.values()] == pytest.approx([0, 0, 0, 0])
    # A text said twice, or one that the others span already, adds no axis.
    twice = role_change(described(torch.cat([axes[:2], axes[:1]])), described(axes[:2]), draws=1)
    assert twice.overlap.value == pytest.approx(1)


def test_terms_are_explained_by_texts(pool: Tensor) -> None:
    x, y = pool[:3], pool[3:6]
    span = torch.linalg.qr(x.double().T).Q
    inside = features(2, 30, 3).double() @ span.T
    outside = features(3, 40).double()
    outside = outside - outside @ span @ span.T
    shift = features(4, 1).double()
    found = role_change(described(x), described(y), terms=(inside + shift, outside), pool=pool, draws=20)
    values = {name: estimate.value for name, estimate in found.measures.items()}
    assert list(values)[2:] == ["before by before", "before by after", "after by before", "after by after"]
    assert values["before by before"] == pytest.approx(1)  # whatever their mean
    assert values["after by before"] == pytest.approx(0, abs=1e-9)
    other = torch.linalg.qr(y.double().T).Q
    centred = outside - outside.mean(0)
    share = (centred @ other).square().sum() / centred.square().sum()
    assert values["after by after"] == pytest.approx(float(share))
    chance = found.measures["before by before"].chance
    assert chance is not None and 0 < chance < 0.6
    # Texts explain terms as they are: what all texts of the pool share is in every span.
    common = torch.outer(torch.arange(5.0), pool.mean(0))
    shared = role_change(described(x), described(y), terms=(common, common), pool=pool, draws=20)
    chance = shared.measures["before by after"].chance
    assert chance is not None and chance > 0.8


def test_intervals_hold_the_value_and_shrink_with_the_texts() -> None:
    widths = []
    for n in (6, 60):
        base = features(5, n, 100)
        found = role_change(described(base), described(base + features(6, n, 100)), draws=300)
        for name, estimate in found.measures.items():
            assert estimate.low < estimate.value < estimate.high, name
        widths.append(found.similarity.high - found.similarity.low)
    assert widths[1] < 0.6 * widths[0]


def test_an_interval_has_the_width_of_its_confidence() -> None:
    """A share's interval against the normal one of a mean of 400 texts: neither 90 % nor 99 %."""
    axes, many = torch.eye(20)[:6], F.normalize(features(3, 400, 20), dim=1)
    found = role_change(described(many), described(axes), draws=4000).measures["before by after"]
    inside = many[:, :6].double().square().sum(1)
    assert found.value == pytest.approx(float(inside.mean()))
    half = 1.96 * float(inside.std()) / 20
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(found.value, abs=0.2 * half)


def test_rounding_is_no_axis_and_a_small_difference_is_one() -> None:
    """Two texts that differ by less than features are computed to span one axis; by more, two."""
    x = torch.eye(8, dtype=torch.double)[:2]
    for shift, axes in ((1e-9, 1), (1.5e-6, 1), (4e-6, 2), (1e-3, 2)):  # half of it, against the other axis
        alike = torch.stack([x[0], x[0] + shift * x[1]])
        found = role_change(described(alike), described(x[:1]), draws=1)
        assert found.overlap.value == pytest.approx((1 / axes + 1) / 2, abs=1e-6)
        assert found.measures["before by after"].value == pytest.approx(1, abs=1e-5)
        other = role_change(described(x[1:]), described(alike), draws=1)
        assert other.measures["before by after"].value == pytest.approx(axes - 1, abs=1e-6)
        assert other.overlap.value == pytest.approx(0.75 * (axes - 1), abs=1e-6)


def test_few_texts_have_the_interval_of_student_s_t() -> None:
    """Shares .2, .2 and .5 in an axis: redrawn they give .2 to .5, and 4.303 / 1.960 times as much of it, by the root of 3/2."""
    shares = torch.tensor([0.2, 0.2, 0.5], dtype=torch.float64)
    three = torch.zeros(3, 5, dtype=torch.float64)
    three[:, 0], three[range(3), [1, 2, 3]] = shares.sqrt(), (1 - shares).sqrt()
    found = role_change(described(three), described(torch.eye(5)[[0, 0, 0]]), draws=4000)
    wider = 4.30265 / 1.95996 * 1.5**0.5
    share, cosine = found.measures["before by after"], found.similarity
    expected = 0.3, 0.3 - 0.1 * wider, 0.3 + 0.2 * wider
    assert (share.value, share.low, share.high) == pytest.approx(expected, abs=1e-5)
    # Half of a similarity is the other side's, whose three texts are one.
    cosines = shares.sqrt()
    mean, most = float(cosines.mean()), float(cosines.max())
    expected = (mean + most) / 2 + wider / 2 * torch.tensor([0, float(cosines.min()) - mean, most - mean])
    assert (cosine.value, cosine.low, cosine.high) == pytest.approx(expected.tolist(), abs=1e-5)


def test_intervals_end_where_the_measures_do() -> None:
    """One text, or image, does not show how much they differ; two do."""
    axes = torch.eye(4)
    for before, measure, expected in (
        (torch.stack([axes[0], -axes[0]]), "text similarity", (0.5, -1, 1)),
        (torch.stack([axes[0], -axes[0]]), "before by after", (1, 1, 1)),
        (axes[:2], "before by after", (0.5, 0, 1)),
        (axes[:1], "text similarity", (1, -1, 1)),
        (axes[:1], "before by after", (1, 0, 1)),
    ):
        found = role_change(described(before), described(axes[[0, 0]]), draws=200).measures[measure]
        assert (found.value, found.low, found.high) == pytest.approx(expected)
    two = role_change(described(axes[:1]), described(axes[:1]), terms=(axes[:2], axes[:2]), draws=200)
    assert two.measures["before by before"].value == pytest.approx(0.5)


@pytest.mark.parametrize("measure", ["text similarity", "span overlap", "before by after", "after by before"])
def test_an_interval_covers_the_truth_as_often_as_it_says(measure: str) -> None:
    """Many samples of texts to be described: their mean value is the truth, for a describing side as it is."""
    axis = torch.eye(40)[:8]
    many, others = (F.normalize(features(seed, 6000, 40), dim=1) for seed in (7, 8))
    estimates, truths = [], []
    for i in range(300):
        rows = slice(20 * i, 20 * (i + 1))
        before = axis if measure == "after by before" else many[rows]
        after = axis if measure == "before by after" else others[rows]
        estimates.append(
            role_change(described(before), described(after), draws=200, seed=i).measures[measure]
        )
        if measure == "text similarity":  # each side describes the other: all texts against this side
            sides = (many @ after.T).amax(1).mean(), (others @ before.T).amax(1).mean()
            truths.append(float(sum(sides)) / 2)
    truths = truths or [np.mean([estimate.value for estimate in estimates])] * 300
    covered = sum(e.low <= truth <= e.high for e, truth in zip(estimates, truths, strict=True)) / 300
    # An overlap adds its sides' errors as if they always went together, and so is wider than it says.
    assert 0.925 <= covered <= (1 if measure == "span overlap" else 0.98)


def test_intervals_of_explained_terms_cover_the_truth() -> None:
    """What texts explain of terms: images are the sample, and all images give the truth."""
    texts, others = described(torch.eye(30)[:6]), described(torch.eye(30)[10:14])
    scale = torch.linspace(2, 0.2, 30)
    many = features(3, 40000, 30) * scale
    truth = {
        "before by before": float(scale[:6].square().sum() / scale.square().sum()),
        "before by after": float(scale[10:14].square().sum() / scale.square().sum()),
    }
    covered = dict.fromkeys(truth, 0)
    for i in range(100):
        terms = many[200 * i : 200 * (i + 1)], many[20000 + 200 * i : 20000 + 200 * (i + 1)]
        measures = role_change(texts, others, terms=terms, draws=200, seed=i).measures
        for name, value in truth.items():
            covered[name] += measures[name].low <= value <= measures[name].high
    assert min(covered.values()) >= 85


def test_chance_is_what_random_texts_give(pool: Tensor) -> None:
    draw = torch.Generator().manual_seed(1)
    levels = []
    for seed in range(25):
        x, y = (described(pool[torch.randperm(60, generator=draw)[:5]]) for _ in range(2))
        levels.append(role_change(x, y, pool=pool, draws=1, seed=seed))
    for name in levels[0].measures:
        values = [level.measures[name].value for level in levels]
        chances = [level.measures[name].chance for level in levels]
        assert (
            abs(np.mean(values) - np.mean([c for c in chances if c is not None]))
            < 3 * np.std(values) / 25**0.5
        )
    # Off the shared mean, random texts are no longer alike.
    raw = role_change(described(pool[:5]), described(pool[5:10]), draws=1)
    assert raw.similarity.value > 0.7 > max(level.similarity.value for level in levels)
    assert levels[0].centred and not raw.centred


def test_the_seed_decides_the_intervals(pool: Tensor) -> None:
    def run(seed: int) -> RoleChange:
        return role_change(described(pool[:5]), described(pool[3:8], 3), pool=pool, draws=30, seed=seed)

    assert run(0).measures == run(0).measures
    assert run(0).measures != run(1).measures
    assert run(0).shared == ("text 3", "text 4")


def test_the_result_speaks(pool: Tensor) -> None:
    found = role_change(described(pool[:5]), described(pool[3:8], 3), pool=pool, draws=30)
    assert isinstance(described(pool), Described)
    frame = found.to_frame()
    assert frame["measure"].tolist() == list(found.measures)
    assert list(frame.columns) == ["measure", "value", "low", "high", "chance"]
    assert "2 of 5 texts kept" in repr(found) and "chance" in repr(found)
    assert "span overlap" in found._repr_html_()
    plot = found.figure()
    traces: Any = plot.data
    assert list(traces[0].x) == [estimate.value for estimate in found.measures.values()]
    np.testing.assert_array_equal(traces[-1].z, found.cosines.numpy())
    plain: Any = role_change(described(pool[:5]), described(pool[3:8]), draws=3).figure().data
    assert len(plain) == 2  # no chance without a pool


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(pool: Tensor) -> None:
    good = described(pool[:4])

    def fails(words: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            role_change(*args, **options)

    fails("draws to be a whole number of draws, at least 1; received 0", good, good, draws=0)
    fails(
        "received 3 texts and 4 features before; encode",
        SimpleNamespace(texts=["a", "b", "c"], features=pool[:4]),
        good,
    )
    fails("received 0 texts and 0 features after", good, SimpleNamespace(texts=[], features=pool[:0]))
    fails("a list of texts", good, SimpleNamespace(texts="abcd", features=pool[:4]))
    fails(r"after of width 16, as the features before; received \[4, 9\]", good, described(pool[:4, :9]))
    fails(r"pool of width 16, .*received \[60, 9\]; take all from one model", good, good, pool=pool[:, :9])
    fails(r"terms of width 16", good, good, terms=(pool, pool[:, :9]))
    fails("terms of at least two images; received 1", good, good, terms=(pool[:1], pool))
    fails("features of some length; received one of length zero", described(0 * pool[:4]), good)
    fails("give the whole pool", described(pool[:1]), described(pool[:1]), pool=pool[:1])
