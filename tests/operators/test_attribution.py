"""Contributions are the terms' products with a direction, one at a time, and sum to the model's own score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from decompclip.data.shapes import Shapes
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import everything, heads, mlps, neurons, pool
from decompclip.decomposition.decomposition import Decomposition
from decompclip.intervals import mean_interval
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators.attribution import Attribution, attribute
from decompclip.operators.inputs import encode_texts
from decompclip.operators.neurons import neuron_terms
from decompclip.operators.scores import ClassScore, direction, label as name_of
from tests.conftest import MakeTower
from tests.decomposition.test_families import FAMILIES

TEXTS = ["a star", "a ring", "a red star"]


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return load_bundled("shapes")


@pytest.fixture(scope="module")
def world(model: HookedCLIP) -> Any:
    return Shapes(12, seed=5).draw(range(12))


@pytest.fixture(scope="module")
def terms(model: HookedCLIP, world: Any) -> Decomposition:
    return model.decompose(model.normalize(world.images), normalize=True, tokens=heads[-1])


@pytest.fixture(scope="module")
def stars(model: HookedCLIP, terms: Decomposition) -> Attribution:
    return attribute(terms, "a star", model=model)


def slow(d: Decomposition, along: Tensor) -> dict[str, Tensor]:
    """One product after another."""
    found = {}
    for layer in range(d.n_layers):
        for head in range(d.n_heads):
            found[f"heads[{layer}, {head}]"] = torch.stack([x @ along for x in d.heads[:, layer, head]])
        found[f"mlps[{layer}]"] = torch.stack([x @ along for x in d.mlps[:, layer]])
    found["embed"] = torch.stack([x @ along for x in d.embed])
    if d.has_pool:
        found["pool"] = torch.stack([x @ along for x in d.pool[:, 0]])
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_contributions_are_products_of_terms_and_sum_to_the_towers_score(
    make_tower: MakeTower, images: Tensor, name: str, convention: Any
) -> None:
    visual = make_tower(dtype=torch.float64, **FAMILIES[name])
    texts = torch.randn(
        3, visual.cfg.d_embed, dtype=torch.float64, generator=torch.Generator().manual_seed(6)
    )
    for normalize in (False, True):
        d = decompose(visual, images.double(), convention=convention, normalize=normalize, tokens=heads[-1])
        found = attribute(d, texts)
        features = visual(images.double())
        features = F.normalize(features, dim=-1) if normalize else features
        torch.testing.assert_close(found.score, features @ texts.T, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.rest, d.bias @ texts.T, rtol=0, atol=1e-11)
        for place, along in enumerate(texts):
            expected = slow(d, along)
            assert set(found.labels) == set(expected)
            for label, values in zip(found.labels, found.values[..., place].T, strict=True):
                torch.testing.assert_close(values, expected[label], rtol=0, atol=1e-11)
        # tokens of a head sum to it; heads whose tokens were not kept stay whole
        split = attribute(d, texts, tokens=True)
        assert split.labels[:5] == found.labels[:5]
        own = [i for i, part in enumerate(split.parts) if str(part) == "heads[2, 1]"]
        assert [split.tokens[i] for i in own] == list(range(visual.cfg.n_tokens))
        torch.testing.assert_close(split.values[:, own], d.token_logits(texts, 2, 1), rtol=0, atol=1e-11)
        torch.testing.assert_close(split.rest, found.rest, rtol=0, atol=1e-11)
        if visual.cfg.norm == "post":
            continue
        several = neuron_terms(
            visual, images.double(), neurons[1, [3, 40]], convention=convention, normalize=normalize
        )
        apart = attribute(d, texts, neurons=several)
        assert "mlps[1]" not in apart.labels and apart.labels[12:16] == (
            "mlps[0]", "neurons[1, 3]", "neurons[1, 40]", "mlps[2]",
        )  # fmt: skip
        for j, label in enumerate(("neurons[1, 3]", "neurons[1, 40]")):
            at = apart.labels.index(label)
            torch.testing.assert_close(apart.values[:, at], several.terms[:, j] @ texts.T, rtol=0, atol=1e-11)
        torch.testing.assert_close(apart.values.sum(1) + apart.rest, apart.score, rtol=0, atol=1e-11)


def test_a_text_is_its_unit_feature_and_the_score_a_cosine(
    model: HookedCLIP, world: Any, terms: Decomposition, stars: Attribution
) -> None:
    with torch.no_grad():
        text = F.normalize(model.encode_text("a star"), dim=-1)[0]
        cosine = F.normalize(model.encode_image(model.normalize(world.images)), dim=-1) @ text
    torch.testing.assert_close(stars.score[:, 0], cosine, rtol=0, atol=1e-5)
    rings = attribute(terms, "a ring", model=model)
    apart = attribute(terms, "a star", against="a ring", model=model)
    torch.testing.assert_close(apart.values, stars.values - rings.values, rtol=0, atol=1e-6)
    both = attribute(terms, encode_texts(model, ["a star", "a ring"]))
    torch.testing.assert_close(both.values, torch.cat([stars.values, rings.values], 2), rtol=0, atol=1e-6)
    fewer = attribute(terms, encode_texts(model, TEXTS), against="a ring", model=model)
    torch.testing.assert_close(fewer.values[..., 0], apart.values[..., 0], rtol=0, atol=1e-6)
    assert (stars.texts, both.texts) == (("a star",), ("a star", "a ring"))
    assert fewer.texts[0] == "a star against a ring"
    assert attribute(terms, ["a star", "the star"], model=model).texts == ("'a star' and 1 more",)
    assert name_of(["a star"]) == name_of("a star") == "'a star'"


@pytest.mark.parametrize("metric", ["logit", "logit_difference"])
@pytest.mark.parametrize("against", [None, 2])
def test_a_target_is_scored_as_everywhere(
    model: HookedCLIP, world: Any, terms: Decomposition, metric: Any, against: Any
) -> None:
    if metric == "logit" and against is not None:
        return
    classifier = model.zero_shot_classifier(Shapes(1).class_names)
    for target in (3, world.labels):
        found = attribute(terms, classifier, target, metric=metric, against=against, tokens=True)
        wanted = ClassScore(classifier, target, metric=metric, against=against)(terms.features)
        torch.testing.assert_close(found.score[:, 0].double(), wanted, rtol=0, atol=1e-5)
        one = ClassScore(classifier, target, metric=metric, against=against).directions(slice(0, 12)).float()
        by_hand = (terms.heads[:, 1, 2] * one).sum(1)
        at = found.labels.index("heads[1, 2]")
        torch.testing.assert_close(found.values[:, at, 0], by_hand, rtol=0, atol=1e-6)
    other = "all others" if against is None else "class 2"
    assert found.texts == ("each image's class" + (f" against {other}" if metric != "logit" else ""),)
    texts = encode_texts(model, TEXTS)
    named = attribute(terms, texts, 1, metric=metric, against=against)
    plain = attribute(terms, texts.features, 1, metric=metric, against=against)
    torch.testing.assert_close(named.values, plain.values, rtol=0, atol=0)


def test_directions_of_a_classifier_on_a_gpu_are_where_the_terms_are() -> None:
    for target in (3, torch.tensor([3, 1, 2])):
        score = ClassScore(torch.eye(4), target)
        on_cpu = score.directions(slice(0, 3))
        with FakeTensorMode():  # a GPU that need not be there
            score.classifier = torch.empty(4, 4, device="cuda")
            score.target = (
                target if isinstance(target, int) else torch.empty(3, dtype=torch.long, device="cuda")
            )
            found = score.directions(slice(0, 3))
        assert found.device.type == "cpu" and found.shape == on_cpu.shape


def test_batches_and_their_order_change_nothing(
    model: HookedCLIP, world: Any, terms: Decomposition, stars: Attribution
) -> None:
    stream = attribute((terms[i : i + 5] for i in (0, 5, 10)), "a star", model=model)
    torch.testing.assert_close(stream.values, stars.values, rtol=0, atol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = attribute(terms[order], "a star", model=model)
    torch.testing.assert_close(mixed.values, stars.values[order], rtol=0, atol=1e-6)
    classifier = model.zero_shot_classifier(Shapes(1).class_names)
    own = attribute(terms, classifier, world.labels)
    parts = attribute([terms[:0], terms[:7], terms[7:]], classifier, world.labels)
    torch.testing.assert_close(parts.values, own.values, rtol=0, atol=1e-6)
    several = neuron_terms(model.visual, model.normalize(world.images), neurons[2, :4], normalize=True)
    whole, split = (
        attribute(x, classifier, world.labels, neurons=several) for x in (terms, terms[:0].cat([terms]))
    )
    halves = attribute([terms[:7], terms[7:]], classifier, world.labels, neurons=several)
    torch.testing.assert_close(halves.values, whole.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(split.values, whole.values, rtol=0, atol=0)


def test_what_is_left_out_stays_in_the_rest(
    terms: Decomposition, stars: Attribution, model: HookedCLIP
) -> None:
    last = attribute(terms, "a star", model=model, components=heads[-1])
    assert last.labels == tuple(f"heads[5, {head}]" for head in range(8))
    at = [stars.labels.index(label) for label in last.labels]
    torch.testing.assert_close(last.values, stars.values[:, at], rtol=0, atol=1e-6)
    torch.testing.assert_close(last.values.sum(1) + last.rest, stars.score, rtol=0, atol=1e-6)
    top = stars.top(3)
    sizes = stars.mean.abs()[:, 0].sort(descending=True).values
    torch.testing.assert_close(top.mean.abs()[:, 0], sizes[:3])
    torch.testing.assert_close(top.values.sum(1) + top.rest, stars.score, rtol=0, atol=1e-6)
    assert len(stars.top(1000)) == len(stars) == 55


def test_tables_and_maps_say_the_same(stars: Attribution, terms: Decomposition, model: HookedCLIP) -> None:
    frame = stars.to_frame()
    assert list(frame["part"]) == [*stars.labels, "rest"]
    assert frame["mean"].sum() == pytest.approx(float(stars.score.mean()), abs=1e-5)
    row = frame[frame["part"] == "heads[4, 2]"].iloc[0]
    values = stars.values[:, stars.labels.index("heads[4, 2]"), 0]
    mean, low, high = mean_interval(values)
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([mean, low, high], abs=1e-6)
    assert mean - low == pytest.approx(2.200985 * float(values.std()) / 12**0.5, rel=1e-5)  # t of 12 values
    assert float(stars.heads()[4, 2]) == pytest.approx(mean, abs=1e-6)
    assert float(stars.mlps()[1]) == pytest.approx(float(stars.mean[stars.labels.index("mlps[1]"), 0]))
    every = stars.to_frame(images=True)
    assert every.index.tolist() == list(range(12 * 56))
    assert [every[every["image"] == i]["value"].sum() for i in range(12)] == pytest.approx(
        stars.score[:, 0].numpy(), abs=1e-5
    )
    one: Any = stars.select(images=[3])
    assert (
        one.names == ("3",) and bool(one.error.isnan().all()) and "image 3" in one.figure().layout.title.text
    )
    split = attribute(terms, "a star", model=model, tokens=True, components=heads[-1])
    assert split.to_frame()["token"].notna().sum() == len(split)
    none = attribute(terms, "a star", model=model, components=mlps).to_frame()["head"]
    assert none.dtype == split.to_frame()["head"].dtype == "Int64" and none.isna().all()
    several = attribute(
        terms, encode_texts(model, TEXTS), names=[f"picture {i}" for i in range(12)], label=["s", "r", "rs"]
    )
    assert several.select(["r"]).texts == ("r",) and several.names[3] == "picture 3"
    torch.testing.assert_close(several.heads("r"), several.heads(1))


def test_figures_show_the_numbers(stars: Attribution, terms: Decomposition, model: HookedCLIP) -> None:
    top = stars.top(20)
    plot: Any = stars.figure()
    *bars, intervals = plot.data
    assert intervals.name == "95 % interval over images"
    assert all(bar.marker.color == bar.marker.line.color for bar in bars)  # filled, all kinds of them
    two: Any = stars.select(images=[0, 1]).figure()
    assert "mean of 2 images" in two.layout.title.text and two.data[0].error_x.array is not None
    drawn = {name[0]: x for bar in bars for name, x in zip(bar.customdata, bar.x, strict=True)}
    assert len(drawn) == 21 and drawn.pop("all others and constants") == pytest.approx(float(top.rest.mean()))
    assert drawn == pytest.approx(dict(zip(top.labels, top.mean[:, 0].tolist(), strict=True)))
    assert "a star: " in plot.layout.title.text and "mean of 12 images" in plot.layout.title.text
    assert (
        plot.layout.xaxis.title.text == "contribution to the cosine"
        and plot.data[0].error_x.array is not None
    )
    cells: Any = stars.figure("map")
    grid, beside = cells.data
    assert torch.equal(torch.tensor(grid.z), stars.heads())
    assert torch.equal(torch.tensor(grid.customdata), stars._cells(stars.error, 0)[0])
    assert torch.equal(torch.tensor(beside.customdata)[:, 0], stars._cells(stars.error, 0)[1])
    assert cells.layout.title.text == plot.layout.title.text
    assert cells.layout.coloraxis.cmin == -cells.layout.coloraxis.cmax
    several: Any = attribute(terms, encode_texts(model, TEXTS))
    drawn_table: Any = several.figure()
    (table,) = drawn_table.data
    assert list(table.x) == TEXTS and len(table.y) == 20 and drawn_table.layout.xaxis.side == "top"
    assert torch.equal(torch.tensor(table.customdata), several.top(20).error)
    assert drawn_table.layout.coloraxis.cmin == -drawn_table.layout.coloraxis.cmax
    pair: Any = several.select([0, 1]).figure()
    assert list(pair.data[0].x) == TEXTS[:2]
    for drawn_colours in (cells, drawn_table):
        assert drawn_colours.layout.coloraxis.colorbar.title.text == "contribution to the cosine"
    assert "a star" in repr(stars) and "rest" not in stars.top(2)._repr_html_()[:40]


@pytest.mark.usefixtures("ours_alone")
def test_mistakes_are_told(terms: Decomposition, model: HookedCLIP, world: Any, stars: Attribution) -> None:
    text = direction(model, "a star")
    classifier = model.zero_shot_classifier(Shapes(1).class_names)
    foreign = load_bundled("shapes-badnet")
    other = encode_texts(foreign, ["a star"])
    images = model.normalize(world.images)
    of_other = neuron_terms(foreign.visual, images, neurons[2], normalize=True)
    of_neurons = neuron_terms(model.visual, images[:4], neurons[2], normalize=True)
    mistakes: list[tuple[Any, dict[str, Any], str]] = [
        ("a star", {}, "model=model"),
        (text[:5], {}, r"a direction \[128\]"),
        (text[None, :5], {}, "as wide as the joint space"),
        (lambda features: features[:, 0], {}, "a function"),
        (other, {}, "other weights"),
        ("a star", {"model": load_bundled("shapes-badnet")}, "other weights"),
        (text, {"label": ["a", "b"]}, "a label for each of 1"),
        (text, {"names": ["a"]}, "a name for each of 12"),
        (classifier, {"target": 3, "metric": "accuracy"}, "no product"),
        ("a star", {"target": 3}, "beside a target"),
        (encode_texts(foreign, TEXTS), {"target": 1}, "other weights"),
        (classifier[:, :5], {"target": 3}, "as wide as the joint space"),
        (classifier, {"target": world.labels[:5]}, "one class, or one for each"),
        (text, {"neurons": of_neurons}, "neuron terms of 12 images"),
        (text, {"neurons": neuron_terms(model.visual, images, neurons[2])}, "normalize=True"),
        (text, {"neurons": of_other}, "neuron terms of the model that was decomposed"),
    ]
    for wrong, options, words in mistakes:
        with pytest.raises(ValueError, match=words):
            attribute(terms, wrong, **options)
    with pytest.raises(ValueError, match=r"without mlps\[2\]"):
        whole = neuron_terms(model.visual, images, neurons[2], normalize=True)
        attribute(terms, text, neurons=whole, components=everything - mlps[2])
    others: list[tuple[Any, Any, dict[str, Any], str]] = [
        (terms, 7, {}, "a text as a string, or several in a list; received 7"),
        (terms, ["a star", 3], {}, "as a string, or several in a list; received 3"),
        (terms, None, {}, "received None"),
        (terms, "a star", {"against": 3}, "received 3"),
        (terms, classifier, {"target": "star"}, r"take class_names.index\('star'\)"),
        (
            images,
            "a star",
            {},
            r"expected a decomposition, as model.decompose\(images\) gives; received a Tensor",
        ),
        ([terms, images], "a star", {}, "received a Tensor"),
        (model, "a star", {}, "received a HookedCLIP"),
    ]
    for what, wrong, options, words in others:
        with pytest.raises(TypeError, match=words):
            attribute(what, wrong, model=model, **options)
    with pytest.raises(IndexError, match="layer 7"):
        attribute(terms, text, components=heads[7])
    with pytest.raises(IndexError, match="pooling has an MLP"):
        attribute(terms, text, components=pool)
    with pytest.raises(IndexError, match="rows of the classifier"):
        attribute(terms, classifier, 99)
    paper = model.decompose(images, normalize=True, convention="paper")
    with pytest.raises(
        ValueError, match="convention='centred', as those before; received convention='paper'"
    ):
        attribute([terms, paper], text)
    with pytest.raises(LookupError, match="kept its tokens"):
        attribute(model.decompose(images), text, tokens=True)
    with pytest.raises(ValueError, match="for an image tower, which reads no text; received"):
        attribute(terms, "a star", model=model.visual)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least one image"):
        attribute(terms[:0], text)
    with pytest.raises(LookupError, match="a text of 1: 'a star'; received 'a ring'"):
        stars.heads("a ring")
    with pytest.raises(LookupError, match="an? image of 12"):
        stars.select(images=[12])
    with pytest.raises(ValueError, match="a whole number of parts, at least 1; received"):
        stars.top("3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'bars' or 'map'"):
        stars.figure("pie")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="split into tokens"):
        attribute(terms, text, tokens=True).figure("map")
