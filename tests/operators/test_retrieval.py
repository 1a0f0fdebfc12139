"""Neighbours are those of the terms themselves, compared one by one; heads of a property are those that retrieve it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import embed, heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators.inputs import encode_texts
from decompclip.operators.parts import part_at, place_of
from decompclip.operators.probes import probe
from decompclip.operators.retrieval import heads_for, nearest
from decompclip.operators.scores import direction
from decompclip.operators.textspan import textspans
from tests.conftest import MakeTower
from tests.decomposition.test_families import FAMILIES

COUNT = 160


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return load_bundled("shapes")


@pytest.fixture(scope="module")
def batch() -> Any:
    return Shapes(COUNT, seed=5).draw(range(COUNT))


@pytest.fixture(scope="module")
def terms(model: HookedCLIP, batch: Any) -> Decomposition:
    return model.decompose(model.normalize(batch.images), normalize=True)


def ranked(terms: Tensor, query: Tensor, k: int, skip: int | None = None) -> tuple[list[int], list[float]]:
    """The nearest, one cosine after another."""
    found = [
        (float(F.cosine_similarity(row, query, dim=0)), -i)
        for i, row in enumerate(terms.double())
        if i != skip
    ]
    best = sorted(found, reverse=True)[:k]
    return [-i for _, i in best], [value for value, _ in best]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_neighbours_are_those_of_the_terms(make_tower: MakeTower, name: str) -> None:
    visual = make_tower(dtype=torch.float64, **FAMILIES[name])
    images = torch.randn(9, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    d, others = decompose(visual, images[:7]), decompose(visual, images[7:])
    along = torch.randn(visual.cfg.d_embed, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for part, of in (
        (heads[1, 2], lambda x: x.heads[:, 1, 2]),
        (mlps[0], lambda x: x.mlps[:, 0]),
        (embed, lambda x: x.embed),
    ):
        for centred in (False, True):
            shift = of(d).mean(0) if centred else 0.0
            found = nearest(d, part, [4, -1], k=9, centred=centred)  # all but the image itself
            for place, image in enumerate((4, 6)):
                order, values = ranked(of(d) - shift, of(d)[image] - shift, 6, image)
                assert part is embed or found.indices[place].tolist() == order  # class tokens are all alike
                assert found.similarity[place].tolist() == pytest.approx(values, abs=1e-9)
            foreign = nearest(d, part, others, k=9, centred=centred)
            assert foreign.indices.shape == (2, 7) and foreign.queries == ("query 0", "query 1")
            for place in range(2):
                order, values = ranked(of(d) - shift, of(others)[place] - shift, 7)
                assert part is embed or foreign.indices[place].tolist() == order
                assert foreign.similarity[place].tolist() == pytest.approx(values, abs=1e-9)
            toward = nearest(d, part, 3 * along, k=7, centred=centred)
            order, values = ranked(of(d) - shift, along, 7)
            assert part is embed or toward.indices[0].tolist() == order
            assert toward.similarity[0].tolist() == pytest.approx(values, abs=1e-9)


def test_texts_are_encoded_and_averaged(model: HookedCLIP, terms: Decomposition) -> None:
    along = direction(model, "a green object")
    found = nearest(terms, heads[1, 4], "a green object", model=model, k=5)
    assert torch.equal(found.indices, nearest(terms, heads[1, 4], along, k=5).indices)
    assert found.queries == ("a green object",)
    two = nearest(terms, heads[1, 4], ["green", "a green object"], model=model, k=5)
    assert two.queries == ("'green' and 1 more",) and two.indices.shape == (1, 5)


@pytest.mark.parametrize("centred", [False, True])
def test_many_directions_are_a_query_each(model: HookedCLIP, terms: Decomposition, centred: bool) -> None:
    texts = ["a green object", "a red object", "a star"]
    encoded = encode_texts(model, texts)
    singles = [
        nearest(terms, heads[1, 4], one, model=model, k=5, centred=centred)
        for one in (*texts, encoded.features[1])
    ]
    found = nearest(terms, heads[1, 4], encoded, k=5, centred=centred)
    assert found.queries == tuple(texts) and found.indices.shape == (3, 5)
    lengths = torch.tensor([[2.0], [0.5], [3.0]])  # cosines do not know them
    plain = nearest(terms, heads[1, 4], lengths * encoded.features, k=5, centred=centred)
    assert plain.queries == ("text 0", "text 1", "text 2")
    for row, single in zip((0, 1, 2, 1), singles, strict=True):
        for several in (found, plain):
            assert torch.equal(several.indices[row], single.indices[0])
            torch.testing.assert_close(several.similarity[row], single.similarity[0], rtol=0, atol=1e-5)
    other = encode_texts(load_bundled("shapes-badnet"), texts)
    with pytest.raises(ValueError, match="other weights"):
        nearest(terms, heads[1, 4], other)


@pytest.mark.parametrize("name", ["colour", "background", "size"])
def test_heads_of_a_property_find_images_alike_in_it(
    model: HookedCLIP, terms: Decomposition, batch: Any, name: str
) -> None:
    y = getattr(batch.attributes, name)
    by_probe, by_texts = heads_for(terms, name, labels=y), heads_for(terms, name, model=model)
    assert (by_probe.by, by_texts.by, by_texts.values) == ("probe", "texts", PROPERTIES[name])
    assert bool((by_probe.score.diff() <= 0).all()) and bool((by_texts.score.diff() <= 0).all())
    few = heads_for(terms, name, labels=y, components=mlps, seed=3)
    other = probe(terms, {name: y}, components=mlps, seed=3)
    torch.testing.assert_close(few.score, other.gain[:, 0].sort(descending=True).values)
    found = probe(terms, {name: y})
    for part, score in zip(by_probe.parts, by_probe.score, strict=True):
        assert float(found.gain[found.parts.index(part), 0]) == pytest.approx(float(score))
    # what texts name first, probes find among the best
    best = {str(part) for part in by_probe.parts[:12]}
    assert str(by_texts.parts[0]) in best
    chance = float((y.bincount().double() / COUNT).square().sum())
    alike = nearest(terms, by_texts.parts[0], range(COUNT), k=5)
    share = float((y[alike.indices] == y[:, None]).double().mean())
    assert share > chance + 0.4


def test_a_score_by_texts_is_the_variance_along_their_differences(
    model: HookedCLIP, terms: Decomposition
) -> None:
    values, prompts = ["red", "green", "blue"], ["a {} object"]
    found = heads_for(terms, "paint", values, model=model, templates=prompts)
    texts = torch.stack([direction(model, f"a {value} object") for value in values]).double()
    basis = torch.linalg.qr((texts[1:] - texts[0]).T).Q
    for part, score in zip(found.parts[:5], found.score[:5].tolist(), strict=True):
        x = terms.heads[:, part.layer, part.head].double()
        x = x - x.mean(0)
        assert score == pytest.approx(float((x @ basis).square().sum() / x.square().sum()), rel=1e-4)
    assert found.n_images == COUNT
    two = heads_for(terms, "paint", values[:2], model=model, templates=prompts)
    along = F.normalize(texts[1] - texts[0], dim=0)
    x = terms.heads[:, two.parts[0].layer, two.parts[0].head].double()
    share = ((x - x.mean(0)) @ along).square().sum() / (x - x.mean(0)).square().sum()
    assert float(two.score[0]) == pytest.approx(float(share), rel=1e-4)
    # It does not depend on how long the terms are; of terms that never vary it is zero.
    coords = terms.coords.clone()
    coords[:, 1] *= 1e-3
    coords[:, 0] = 1
    scaled = heads_for(terms.edit(coords=coords), "paint", values, model=model, templates=prompts)
    for part, score in zip(found.parts, found.score.tolist(), strict=True):
        again = float(scaled.score[scaled.parts.index(part)])
        assert again == pytest.approx(score if part.layer else 0, rel=1e-3)
    spans = textspans(model, heads[1:3], images=terms, n_texts=6)
    named = heads_for(terms, "colour", model=model, spans=spans, components=heads[1:3])
    assert named.named is not None
    at = [str(part) for part in named.parts].index("heads[1, 4]")  # colour's own head speaks of colours
    assert float(named.named[at]) > 0.5 and at == 0
    colours, shares = set(PROPERTIES["colour"]), []
    for part in named.parts:
        (span,) = (span for span in spans.spans if span.part == part)
        gains = span.variance_explained.diff(prepend=torch.zeros(1, dtype=torch.float64)).clamp_min(0)
        says = torch.tensor([bool(colours & set(text.split())) for text in span.texts])
        shares.append(gains[says].sum() / gains.sum())
    torch.testing.assert_close(named.named, torch.stack(shares))
    frame = named.to_frame()
    assert list(frame.columns) == ["part", "kind", "layer", "head", "score", "named"]
    assert named.top(4).to_frame().equals(frame.head(4))


def test_tables_and_figures_show_what_was_found(model: HookedCLIP, terms: Decomposition, batch: Any) -> None:
    names = [f"drawing {i}" for i in range(COUNT)]
    found = nearest(terms, heads[1, 4], [3, 9], k=4, pixels=batch.images, names=names)
    frame = found.to_frame()
    assert list(frame["name"][:4]) == [names[i] for i in found.indices[0].tolist()]
    assert list(frame["rank"]) == [1, 2, 3, 4] * 2 and found.queries == ("drawing 3", "drawing 9")
    plot: Any = found.figure()
    assert len(plot.data) == 2 * 5
    shown = [note.text for note in plot.layout.annotations]
    assert f"{float(found.similarity[0, 0]):.2f} {names[int(found.indices[0, 0])]}" in shown
    assert found.pictures is not None and found.query_pictures is not None
    expected = (255 * batch.images[int(found.indices[1, 2])]).round().byte().permute(1, 2, 0)
    assert torch.equal(found.pictures[1, 2], expected)
    for edge in (0.0, 1.0):  # both belong to pixels
        flat = nearest(terms, heads[1, 4], 3, k=2, pixels=torch.full_like(batch.images, edge))
        assert flat.pictures is not None and (flat.pictures == int(255 * edge)).all()
    by_text: Any = nearest(terms, heads[1, 4], "a red object", model=model, k=4, pixels=batch.images).figure()
    assert len(by_text.data) == 4
    scored = replace(by_colour := heads_for(terms, "colour", model=model), score=by_colour.score - 0.1)
    of_colour: Any = scored.figure()
    assert of_colour.layout.title.text == "colour" and of_colour.layout.coloraxis.cmin == 0
    assert of_colour.layout.coloraxis.colorbar.title.text == "share of variance along the texts"
    grid: Any = of_colour.data[0]
    assert tuple(grid.z.shape) == (6, 8) and scored.score.min() < 0
    for part, score in zip(scored.parts, scored.score.tolist(), strict=True):
        assert float(grid.z[part.layer, part.head]) == pytest.approx(
            max(score, 0)
        )  # worse than chance is none
    assert "Neighbours(2 queries by heads[1, 4]: 4 of 160 images)" in repr(found)


@pytest.mark.usefixtures("ours_alone")
def test_mistakes_are_told(model: HookedCLIP, terms: Decomposition, batch: Any) -> None:
    other = load_bundled("shapes-badnet").decompose(model.normalize(batch.images[:2]), normalize=True)
    mistakes: list[tuple[Any, Any, dict[str, Any], str]] = [
        (heads[1], 3, {}, "one component, such as"),
        *(
            (heads[1, 4], 3, {"k": k}, f"whole number of images, at least 1; received {k!r}")
            for k in (0, 1.5, "3", True)
        ),
        (heads[1, 4], "a star", {}, "model=model"),
        (heads[1, 4], [], {}, "at least one query"),
        (heads[1, 4], 3, {"names": ["a"]}, "a name for each of 160 images; received 1"),
        (heads[1, 4], 3, {"names": []}, "a name for each of 160 images; received 0"),
        (heads[1, 4], 3, {"pixels": batch.images[:3]}, "pixels of 160 images; received 3"),
        *(
            (heads[1, 4], 3, {"pixels": odd}, r"in \[0, 1\]")
            for odd in (
                model.normalize(batch.images),
                batch.images - 0.01,
                1.01 * batch.images.clamp_min(1),
                batch.images[:, 0],
            )
        ),
        (heads[1, 4], other, {}, "model"),
        (heads[1, 4], terms[:2], {"query_pixels": batch.images[:3]}, "query_pixels of 2 queries; received 3"),
    ]
    for part, query, options, words in mistakes:
        with pytest.raises(ValueError, match=words):
            nearest(terms, part, query, **options)
    for query in (3.5, None, [1, 2.0], {"a": 1}):
        with pytest.raises(
            TypeError, match="images by number, a decomposition, a text or a direction; received"
        ):
            nearest(terms, heads[1, 4], cast(Any, query))
    with pytest.raises(TypeError, match="expected a decomposition, .* received a HookedCLIP"):
        nearest(cast(Any, model), heads[1, 4], 3)
    for image in (COUNT, [3, -COUNT - 1]):
        with pytest.raises(IndexError, match=r"images in 0\.\.159"):
            nearest(terms, heads[1, 4], image)
    for number, end in ((6, "'5';"), (7, "'5' and 1 more;")):
        for which in (9, "9"):
            with pytest.raises(LookupError, match=rf"a text of {number}: '0', '1', '2', '3', '4', {end}"):
                place_of(which, tuple(map(str, range(number))), "text")
    with pytest.raises(IndexError, match="head 8"):
        nearest(terms, heads[1, 8], 3)
    with pytest.raises(ValueError, match="pass pixels="):
        nearest(terms, part_at(1, 4), 3).figure()
    wrong: list[tuple[str, Any, dict[str, Any], str]] = [
        ("mood", None, {"model": model}, "known by themselves are shape, colour"),
        ("colour", None, {}, "labels= or model=model"),
        ("colour", ["red"], {"model": model}, "at least two values"),
        ("colour", "red", {"model": model}, "at least two values"),
        ("colour", ["red", "blue"], {"labels": batch.attributes.colour}, "received both, labels and values"),
        (
            "colour",
            None,
            {"labels": batch.attributes.colour, "model": model},
            "labels and model; leave one out",
        ),
        ("colour", None, {"labels": batch.attributes.colour, "templates": ["{}"]}, "labels and templates"),
        ("colour", None, {"model": model, "seed": 1}, "expected no seed without labels"),
        ("colour", None, {"labels": batch.attributes.colour[:4]}, "one value of 'colour'"),
    ]
    for name, values, options, words in wrong:
        with pytest.raises(ValueError, match=words):
            heads_for(terms, name, values, **options)
    with (
        pytest.warns(UserWarning, match="unknown to this model's vocabulary"),
        pytest.raises(ValueError, match="the text tower tells apart; received 'wug', 'dax'"),
    ):
        heads_for(terms, "kind", ["wug", "dax"], model=model)
    spans = textspans(model, heads[1], images=terms, n_texts=2)
    with pytest.raises(
        KeyError, match=r"received heads\[0, 0\] and .*, which were not; run textspans on them"
    ):
        heads_for(terms, "colour", model=model, spans=spans)
    backdoored = load_bundled("shapes-badnet")
    theirs = backdoored.decompose(model.normalize(batch.images[:40]), normalize=True)
    spans = textspans(backdoored, heads[1], images=theirs, n_texts=2)
    with pytest.raises(
        ValueError, match="descriptions of the model that was decomposed; .* of other weights"
    ):
        heads_for(terms, "colour", model=model, spans=spans, components=heads[1])
