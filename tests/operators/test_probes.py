"""Ground truth on the Shapes world: probes, what texts name, and whether the two agree."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional as F

from decompclip.data.shapes import PROPERTIES, Shapes, shapes_captions
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.operators.naming import agreement, named_property
from decompclip.operators.probes import COPY, Probes, _explained, _groups, probe
from decompclip.tower.vit import HookedViT

N = 120


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "shape": torch.randint(3, (N,), generator=generator),
        "colour": torch.randint(4, (N,), generator=generator),
        "luck": torch.randint(2, (N,), generator=generator),
    }


@pytest.fixture(scope="module")
def planted(tower: HookedViT, truth: dict[str, Tensor]) -> Decomposition:
    """Heads of layer 1 that know the shape (head 0), the colour (head 1), both (head 2), or nothing (head 3)."""
    images = torch.randn(4, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    d = decompose(tower, images)[[0] * N]
    noise = torch.Generator().manual_seed(2)
    coords = 0.1 * torch.randn(d.coords.shape, generator=noise)
    shape, colour = (
        torch.randn(n, 8, generator=noise)[truth[name]] for n, name in ((3, "shape"), (4, "colour"))
    )
    coords[:, 1, 0] += shape
    coords[:, 1, 1] += colour
    coords[:, 1, 2] += 0.5 * shape + 2 * colour
    return d.edit(coords=coords)


@pytest.fixture(scope="module")
def probes(planted: Decomposition, truth: dict[str, Tensor]) -> Probes:
    return probe(planted, truth, components=heads[1] | mlps[0])


def test_probes_find_what_was_planted(probes: Probes) -> None:
    assert [str(part) for part in probes.parts] == [*(f"heads[1, {i}]" for i in range(4)), "mlps[0]"]
    gain = probes.gain
    assert (gain[[0, 1, 2, 2], [0, 1, 0, 1]] > 0.85).all()
    assert (gain[[0, 1, 3, 3], [1, 0, 0, 1]] < 0.5).all()
    assert (gain[:, 2] < 0.5).all()
    explained = probes.explained
    assert (explained[[0, 1], [0, 1]] > 0.8).all()
    assert explained[2, 1] > explained[2, 0] > 0.02  # predicted as well, but a smaller share
    assert (explained[3].abs() < 0.1).all()
    assert explained[4].tolist() == [0, 0, 0]  # an MLP that never varies
    absent = torch.full((4,), torch.nan, dtype=torch.float64)
    expected = torch.stack([absent, gain[:4, 1], absent])
    torch.testing.assert_close(probes.heads("colour"), expected, equal_nan=True)


def test_accuracy_is_that_of_a_plain_fit_on_the_terms(
    planted: Decomposition, truth: dict[str, Tensor]
) -> None:
    """Coordinates and terms differ by an invertible map: a plain linear probe is the same on both."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    found = probe(planted, truth, components=heads[1], estimator=LinearDiscriminantAnalysis())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).numpy()
    train, test = order[:84], order[84:]
    assert found.counts == (84, 36)
    for head in range(4):
        # Eight axes hold a head's terms; the rest of the joint space is rounding.
        terms = planted.heads[:, 1, head].double()
        x = (terms @ torch.linalg.svd(planted.maps.heads[1, head].double())[2][:8].T).numpy()
        for j, name in enumerate(found.properties):
            y = truth[name].numpy()
            plain = LinearDiscriminantAnalysis().fit(x[train], y[train]).score(x[test], y[test])
            assert float(found.accuracy[head, j]) == pytest.approx(plain)
            groups = [x[y == value] for value in np.unique(y)]
            within = sum(np.square(group - group.mean(0)).sum() for group in groups) / (N - len(groups))
            share = 1 - within / x.var(0, ddof=1).sum()
            assert float(found.explained[head, j]) == pytest.approx(share, abs=1e-5)
            mode = np.bincount(y[train]).argmax()
            assert float(found.chance[j]) == pytest.approx((y[test] == mode).mean())


def test_the_explained_share_is_zero_for_chance_and_one_for_identity(
    planted: Decomposition, truth: dict[str, Tensor]
) -> None:
    groups = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))[truth["shape"]]
    exact = planted.edit(
        coords=planted.coords.clone().index_fill_(1, torch.tensor(0), 0) + 0 * planted.coords
    )
    exact.coords[:, 0, 0] = groups
    found = probe(exact, truth, components=heads[0, 0])
    assert float(found.explained[0, 0]) == pytest.approx(1)
    generator = torch.Generator().manual_seed(6)
    shares = [
        float(probe(planted[:40], {"luck": torch.randint(2, (40,), generator=generator)}, components=heads[0, 0],
                    seed=i).explained)
        for i in range(30)
    ]  # fmt: skip
    assert abs(np.mean(shares)) < 3 * np.std(shares) / 30**0.5 + 1e-3


def test_what_tells_nothing_explains_nothing(planted: Decomposition, truth: dict[str, Tensor]) -> None:
    """Terms that are zero, or alike but for rounding; and values of one image each, of which none is left to adjust by."""
    luck = {"luck": truth["luck"]}
    assert not probe(planted.edit(mlps=0 * planted.mlps), luck, components=mlps[0]).explained.any()
    assert not probe(planted[:10], {"number": torch.arange(10)}, components=heads[1, 3]).explained.any()
    alike = 1e6 * (1 + 1e-13 * np.random.default_rng(0).standard_normal((N, 3)))
    assert _explained(alike, truth["luck"].numpy()) == 0


def test_a_probe_goes_on_until_it_has_converged(planted: Decomposition) -> None:
    """Axes of very different lengths, all of which matter: more steps than scikit-learn takes by default."""
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(2000, 20, generator=draw)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=draw)).Q
    terms = plain * torch.logspace(0, -3, 20) @ turn
    answers = (plain @ torch.randn(20, 5, generator=draw)).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        d = planted[[0] * 2000].edit(mlps=terms[:, None].expand(-1, 3, -1))
        assert float(probe(d, {"answer": answers}, components=mlps[0], held_out=0.1).gain) > 0.3


@pytest.mark.usefixtures("ours_alone")
def test_copies_of_an_image_are_on_one_side(planted: Decomposition, truth: dict[str, Tensor]) -> None:
    """A probe of a part that knows nothing names the value of a copy that it was trained on; decomposed in another batch or not."""
    names = torch.arange(40)
    nothing = planted[:40]
    twice = Decomposition.cat([nothing, nothing.edit(mlps=nothing.mlps * (1 + 1e-7))])
    luck = {"luck": truth["luck"][:40].repeat(2)}
    from sklearn.neighbors import KNeighborsClassifier

    options: dict[str, Any] = {
        "components": heads[1, 3],
        "estimator": KNeighborsClassifier(1),
        "held_out": 0.5,
    }
    found = probe(twice, luck, **options)
    assert sum(found.counts) == 80 and all(count % 2 == 0 for count in found.counts)
    assert found.accuracy.item() < 0.75  # of a copy it would be 1
    # Images that belong together by a number that is given, though their terms differ.
    other = planted[40:80]
    pair = Decomposition.cat([nothing, other])
    grouped = probe(pair, luck, groups=names.repeat(2), **options)
    assert all(count % 2 == 0 for count in grouped.counts)
    alone = probe(pair, luck, **options)
    assert alone.counts == (40, 40)
    with pytest.raises(ValueError, match=r"one number for each of 80 images; received \[40\]"):
        probe(pair, luck, groups=names, **options)
    with pytest.raises(ValueError, match="received 5 copies of the same; add images"):
        probe(planted[[0] * 5], {"luck": torch.tensor([0, 1, 0, 1, 0])}, components=heads[1, 3])


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_copies_are_told_by_their_distance_as_a_share_of_their_length(length: float) -> None:
    """Beside the slow reference: every pair is compared. Images that are near, but no copies, stay apart."""
    draw = torch.Generator().manual_seed(0)
    one = F.normalize(torch.randn(60, 8, dtype=torch.float64, generator=draw), dim=1)
    aside = F.normalize(torch.randn(60, 8, dtype=torch.float64, generator=draw), dim=1)
    features = length * torch.cat([one, one[:20] + 0.3 * COPY * aside[:20], one[20:] + 3 * COPY * aside[20:]])
    apart = (features[:, None] - features).norm(dim=-1) / length
    found = torch.from_numpy(_groups(features, None))
    assert torch.equal(found[:, None] == found, apart < COPY)
    assert len(found.unique()) == 100


def test_images_of_which_nothing_is_left_are_copies() -> None:
    assert set(_groups(torch.zeros(3, 8), None)) == {0}


def test_streams_give_the_same(planted: Decomposition, truth: dict[str, Tensor], probes: Probes) -> None:
    stream = probe((planted[i : i + 50] for i in (0, 50, 100)), truth, components=heads[1] | mlps[0])
    torch.testing.assert_close(stream.accuracy, probes.accuracy, atol=0.03, rtol=0)
    torch.testing.assert_close(stream.explained, probes.explained, atol=1e-5, rtol=1e-4)


def test_texts_name_a_property() -> None:
    vocabulary = PROPERTIES
    found = named_property(["a small red circle", "RED stars", "a cyan object at the top left"], vocabulary)
    assert found.shares["colour"] == 1 and found.shares["size"] == pytest.approx(1 / 3)
    assert found.values["colour"] == ("red", "cyan")
    assert found.values["position"] == ("top left",)
    assert found.property == "colour"
    # "stars" is no "star", and "ring" does not stand in "string".
    assert named_property(["a string of stars"], vocabulary).values["shape"] == ()
    assert named_property(["nothing at all"], vocabulary).property == "none"
    assert named_property(["nothing at all"], {"colour": ["red"]}).property == "none"
    assert named_property(["red"], {"colour": ["red"], "warning": ["red"]}).property == "none"  # a tie
    weights: Any = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    heavy = named_property(["red", "small"], vocabulary, weights=weights)
    assert heavy.shares["size"] == 0.75 and heavy.property == "size"
    alone = named_property(["red", "small"], vocabulary, weights=[0.0, 0.5])
    assert alone.shares == {name: float(name == "size") for name in vocabulary}


def test_what_all_texts_name_says_nothing() -> None:
    pool = shapes_captions(Shapes(300).draw(range(300)).attributes, range(300), seed=1)
    picked = [text for text in pool if " striped " in text or " dotted " in text or " plain " in text][:12]
    plain, against = named_property(picked, PROPERTIES), named_property(picked, PROPERTIES, pool=pool)
    assert plain.shares["texture"] == 1 and plain.shares["shape"] > 0.7
    assert against.usual["shape"] > 0.8
    assert against.property == "texture"


def test_a_longer_value_comes_before_the_one_that_it_begins_with() -> None:
    found = named_property(["a red star"], {"thing": ["red", "Red star"], "colour": ["blue"]})
    assert found.values["thing"] == ("red star",)


def test_a_naming_speaks() -> None:
    found = named_property(
        ["a small red circle", "RED stars"], PROPERTIES, pool=["red", "blue", "no word of it"]
    )
    frame = found.to_frame().set_index("property")
    assert frame.loc["colour"].tolist() == [1.0, pytest.approx(2 / 3), "red"]
    # Shape and size are named by as much more than usual: texts do not decide.
    assert repr(found).startswith("Naming(none: shape 50%, colour 100%")
    assert "colour" in found._repr_html_()
    plot: Any = found.figure()
    bars = plot.data
    assert plot.layout.xaxis.tickformat == ".0%" and ["colour", "red"] in [
        list(row) for row in bars[0].customdata
    ]
    assert plot.layout.xaxis.title.text == "share of texts that name a value"
    assert list(bars[0].x) == list(found.shares.values()) and list(bars[1].x) == list(found.usual.values())


def test_agreement_counts_and_kappa(probes: Probes) -> None:
    words = {
        "shape": ["ring", "star", "bolt"],
        "colour": ["red", "blue", "cyan", "pink"],
        "luck": ["good", "bad"],
    }
    texts = {
        "heads[1, 0]": ["a ring", "a star", "a red bolt"],
        "heads[1, 1]": ["red things", "blue things"],
        "heads[1, 2]": ["a ring", "a bolt"],
        "heads[1, 3]": ["a red ring"],
    }
    found = agreement(probes, texts, words)
    assert found.probed == ("shape", "colour", "colour")
    assert found.named == ("shape", "colour", "shape")
    assert found.count == 2 and found.share == pytest.approx(2 / 3)
    assert [str(part) for part in found.left_out] == ["heads[1, 3]"]
    # By hand: agreement 2/3, by chance (1/3 * 2/3 + 2/3 * 1/3) = 4/9.
    assert found.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    low, high = found.interval
    assert low < found.share < high
    assert found.to_frame()["agree"].tolist() == [True, True, False]
    assert "2 of 3 parts, 67 %" in repr(found) and "heads[1, 2]" in found._repr_html_()
    plot: Any = found.figure()
    (grid,), layout = plot.data, plot.layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("named by the texts", "found by the probe")
    assert grid.texttemplate == "%{z}"
    assert grid.z.sum() == 3 and grid.z[list(grid.y).index("colour"), list(grid.x).index("shape")] == 1
    weights = {"heads[1, 0]": [1.0, 1.0, 9.0], "heads[1, 1]": [1.0, 1.0], "heads[1, 2]": [1.0, 1.0]}
    weighted = agreement(
        probes, {**texts, "heads[1, 0]": ["a ring", "a star", "all red"]}, words, weights=weights
    )
    assert weighted.named[0] == "colour"  # the last text outweighs the others
    common = agreement(probes, {"heads[1, 0]": texts["heads[1, 0]"]}, words, pool=["a ring", "a star"])
    assert common.named == ("colour",)  # what all of the pool's texts name says nothing
    bar = float(probes.explained[2].max())  # what reaches the bar counts
    left = [agreement(probes, texts, words, least=x).left_out for x in (bar, np.nextafter(bar, 2))]
    assert ["heads[1, 2]" in map(str, parts) for parts in left] == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of nothing to divide by
        alone = agreement(probes, {"heads[1, 0]": ["a star"]}, words, by="accuracy")
    assert np.isnan(alone.kappa) and alone.share == 1


def test_the_result_speaks(probes: Probes) -> None:
    frame = probes.to_frame()
    assert len(frame) == 5 * 3
    row = frame[(frame["part"] == "heads[1, 1]") & (frame["property"] == "colour")].iloc[0]
    assert row["low"] < row["accuracy"] <= row["high"]
    assert row["explained"] == pytest.approx(float(probes.explained[1, 1]))
    assert repr(probes) == "Probes(5 parts, shape, colour, luck; trained on 84 images, scored on 36)"
    assert "heads[1, 1]" in probes._repr_html_()
    plot: Any = probes.figure()
    (heat,), layout = plot.data, plot.layout
    assert layout.xaxis.side == "top"
    low: Any = replace(probes, accuracy=0.9 * probes.accuracy).figure().layout
    assert (low.coloraxis.cmin, low.coloraxis.cmax) == (0, 1)  # whatever the largest gain
    np.testing.assert_array_equal(heat.customdata, torch.stack([probes.accuracy, probes.explained], -1))
    assert probes.accuracy.dtype == probes.chance.dtype == torch.float64
    np.testing.assert_allclose(heat.z, probes.gain.clamp_min(0).numpy())


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(planted: Decomposition, truth: dict[str, Tensor], probes: Probes) -> None:
    def fails(kind: type[Exception], words: str, call: Any) -> None:
        with pytest.raises(kind, match=words):
            call()

    fails(ValueError, "at least one property; received none", lambda: probe(planted, {}))
    fails(
        ValueError,
        r"one value of 'shape' for each of 100 images; received \[120\]; give them in the order",
        lambda: probe(planted[:100], truth),
    )
    fails(ValueError, "received 120 images and held_out=1.5", lambda: probe(planted, truth, held_out=1.5))
    three = {name: values[:3] for name, values in truth.items()}
    fails(
        ValueError,
        "two values of 'shape' among the 1 images",
        lambda: probe(planted[:3], three, held_out=0.7),
    )
    still = {"shape": torch.zeros(N, dtype=torch.long)}
    fails(
        ValueError,
        r"two values of 'shape' among the 84 images.*received \[0\]",
        lambda: probe(planted, still),
    )
    fails(IndexError, "received head 9", lambda: probe(planted, truth, components=heads[0, 9]))
    fails(
        ValueError,
        r"a property of \('shape', 'colour', 'luck'\); received 'age'",
        lambda: probes.heads("age"),
    )
    fails(
        ValueError,
        "a list of at least one text as texts; received 'red'",
        lambda: named_property("red", PROPERTIES),
    )
    fails(ValueError, r"as pool; received \[\]", lambda: named_property(["red"], PROPERTIES, pool=[]))
    fails(ValueError, "properties and their values", lambda: named_property(["red"], {}))
    for odd in ([], "red", [""]):  # as a pattern these would stand in any text
        fails(
            ValueError,
            "list of the values of 'colour'",
            lambda odd=odd: named_property(["red"], {"colour": odd}),
        )
    for weights in ([1.0, 2.0], [0.0], [-1.0]):
        fails(
            ValueError,
            "one weight for each of 1 texts, none negative, not all zero",
            lambda weights=weights: named_property(["red"], PROPERTIES, weights=weights),
        )
    words = {name: ["red"] for name in truth}
    fails(ValueError, "by of .*received 'size'", lambda: agreement(probes, {}, words, by="size"))  # pyright: ignore
    fails(ValueError, "vocabulary of the probed properties", lambda: agreement(probes, {}, PROPERTIES))
    fails(ValueError, "received 0 parts with less; lower least=", lambda: agreement(probes, {}, words))
    fails(KeyError, r"received heads\[9\]", lambda: agreement(probes, {"heads[9]": ["red"]}, words))
