"""TEXTSPAN: the picks of the published algorithm, from moments."""

from __future__ import annotations

import copy
import os
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

import decompclip
from decompclip.data.shapes import Shapes, ShapesSource
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import embed, everything, heads, mlps, neurons, pool
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.models.clip import HookedCLIP
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.inputs import (
    SEED,
    TextFeatures,
    default_images,
    encode_texts,
    general_texts,
    image_batches,
    load_texts,
    shapes_texts,
)
from decompclip.operators.parts import parts_of
from decompclip.operators.roles import role_change
from decompclip.operators.textspan import (
    Frame,
    TermMoments,
    _chunks,
    fit_textspans,
    frame,
    pick,
    textspan,
    textspans,
)
from decompclip.operators.textspan_result import TextSpan, TextSpans
from decompclip.tower.vit import HookedViT

WORLD = Shapes(700, seed=31)


# The published algorithm, image by image


def plain(
    terms: Tensor, texts: Tensor, n_texts: int, rank: int, *, centred: bool = False, tie: float = 1e-9
) -> tuple[list[int], list[float], Tensor]:
    """Picks, cumulative share of the variance, and the reconstruction, from the matrix of terms itself.

    Gandelsman et al.'s `replace_with_iterative_removal`, in the dtype of `terms`; `tie=0` is their plain argmax.
    """
    mean = terms.mean(0)
    right = torch.linalg.svd(terms - mean if centred else terms, full_matrices=False)[2][:rank]
    texts = texts.to(terms) @ right.T @ right
    data, total = terms - mean, (terms - mean).square().sum()
    rebuilt, picks, explained = mean.expand_as(terms).clone(), [], []
    for _ in range(n_texts):
        variance = (data @ texts.T).var(0)
        best = int((variance >= variance.max() * (1 - tie)).int().argmax()) if tie else int(variance.argmax())
        direction = texts[best] / texts[best].norm()
        along = (data @ direction)[:, None] * direction
        rebuilt, data = rebuilt + along, data - along
        texts = texts - (texts @ direction)[:, None] * direction
        picks.append(best)
        explained.append(float(1 - data.square().sum() / total))
    return picks, explained, rebuilt


def same(span: TextSpan, terms: Tensor, texts: Tensor, **options: Any) -> None:
    picks, explained, rebuilt = plain(terms, texts, len(span), span.rank, **options)
    assert list(span.indices) == picks
    torch.testing.assert_close(
        span.variance_explained, torch.tensor(explained, dtype=torch.float64), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(
        span.reconstruct(terms), rebuilt, rtol=1e-5, atol=1e-6 * float(terms.abs().max())
    )


def unit(n: int, width: int, seed: int = 3) -> Tensor:
    """Directions with a common part, as text features have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return F.normalize(common + torch.randn(n, width, generator=generator), dim=1)


def pool_of(n: int, width: int, seed: int = 3) -> TextFeatures:
    return TextFeatures(tuple(f"text {i}" for i in range(n)), unit(n, width, seed))


def shown(plot: Any) -> tuple[Any, Any]:
    """The one trace of a figure, and its layout."""
    (trace,) = plot.data
    return trace, plot.layout


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return torch.randn(60, 3, 24, 16, generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module", params=["centred", "paper"])
def d(request: pytest.FixtureRequest, tower: HookedViT, photos: Tensor) -> Decomposition:
    return decompose(tower, photos, convention=request.param)


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return decompclip.load("shapes")


@pytest.fixture(scope="module")
def drawn(model: HookedCLIP) -> Decomposition:
    with torch.no_grad():
        return model.decompose(model.normalize(WORLD.draw(range(len(WORLD))).images))


@pytest.fixture(scope="module")
def described(model: HookedCLIP) -> TextFeatures:
    return encode_texts(model)


@pytest.fixture(scope="module")
def spans(drawn: Decomposition, described: TextFeatures) -> TextSpans:
    return fit_textspans(Moments.of(drawn), described)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", ["auto", 3])
def test_picks_are_those_of_the_plain_algorithm(d: Decomposition, rank: Any, centred: bool) -> None:
    texts = pool_of(150, d.d_embed)
    found = fit_textspans(Moments.of(d), texts, everything, n_texts=6, rank=rank, centred=centred)
    assert len(found) == 3 * 4 + 3 + 1
    exact = d.to(torch.float64)
    terms = [*exact.heads.flatten(1, 2).unbind(1), *exact.mlps.unbind(1), exact.embed]
    for span, x in zip(found, terms, strict=True):
        same(span, x, texts.features, centred=centred)


def test_picks_on_the_bundled_model_are_those_of_the_plain_algorithm(
    drawn: Decomposition, described: TextFeatures, spans: TextSpans
) -> None:
    exact = drawn.to(torch.float64)
    for span in spans[heads[[0, 4, 5]] | mlps[[0, 5]]]:
        layer, head = span.part.layer, span.part.head
        terms = exact.mlps[:, layer] if head is None else exact.heads[:, layer, head]
        same(span, terms, described.features)


def test_picks_are_those_of_the_published_code_in_its_own_precision(
    drawn: Decomposition, described: TextFeatures, spans: TextSpans
) -> None:
    """Its fp32 argmax, with no rule for ties; the first picks, before what is left of the variance is rounding."""
    for span in spans[heads[-2:]]:
        terms = drawn.heads[:, span.part.layer, span.part.head]
        assert list(span.indices[:8]) == plain(terms, described.features, 8, span.rank, tie=0)[0], span


def test_paper_settings_are_rank_80(make_tower: Any, photos: Tensor) -> None:
    tower = make_tower(d_embed=100, d_model=128, d_head=32, d_mlp=128)
    with torch.no_grad():
        d = decompose(tower, torch.cat([photos, photos.flip(-1)]))
    texts, moments = pool_of(120, 100), Moments.of(d)
    paper = fit_textspans(moments, texts, heads[-1, 0] | mlps[-1], n_texts=8, rank="paper")
    # A head's terms have d_head degrees of freedom: a rank of 80 is cut to them.
    assert [span.rank for span in paper] == [32, 80]
    same(paper.spans[1], d.mlps[:, -1].double(), texts.features)
    least = fit_textspans(moments, texts, mlps[-1], n_texts=1, rank=1).spans[0]
    assert least.rank == 1 and len(least.indices) == 1
    auto = fit_textspans(moments, texts, mlps[-1], n_texts=8).spans[0]
    assert auto.rank == 100
    assert auto.indices != paper.spans[1].indices


@given(seed=st.integers(0, 10**6), width=st.integers(2, 9), coords=st.integers(1, 9), n=st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_any_terms(seed: int, width: int, coords: int, n: int) -> None:
    """Of any rank: more coordinates than dimensions, fewer images than either."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, coords, generator=generator, dtype=torch.float64)
    maps = torch.randn(coords, width, generator=generator, dtype=torch.float64)
    texts, terms = unit(25, width, seed).double(), z @ maps
    spread = z - z.mean(0)
    space = frame(
        TermMoments(z.mean(0)[None], (spread.T @ spread / n)[None], maps[None]), limit=None, centred=False
    )
    rank = min(n, coords, width)
    assert int(space.rank) == rank
    varied = min(rank, n - 1)
    found = pick(space, texts, varied)
    picks, explained, _ = plain(terms, texts, varied, rank)
    assert found.texts[0].tolist() == picks
    torch.testing.assert_close(
        found.explained[0], torch.tensor(explained, dtype=torch.float64), atol=1e-9, rtol=0
    )


# Identities and invariances


def test_equal_texts_go_by_their_place(
    drawn: Decomposition, described: TextFeatures, spans: TextSpans
) -> None:
    twice = TextFeatures(
        (*described.texts, *described.texts[::-1]),
        torch.cat([described.features, described.features.flip(0)]),
    )
    again = fit_textspans(Moments.of(drawn), twice, heads[-1])
    assert [span.indices for span in again] == [span.indices for span in spans[heads[-1]]]


def test_another_order_of_the_texts_gives_the_same_texts(
    drawn: Decomposition, described: TextFeatures, spans: TextSpans
) -> None:
    order = torch.randperm(len(described), generator=torch.Generator().manual_seed(0))
    shuffled = TextFeatures(tuple(described.texts[i] for i in order), described.features[order])
    again = fit_textspans(Moments.of(drawn), shuffled, heads[-1] | mlps[-1])
    assert [s.texts for s in again] == [s.texts for s in spans[heads[-1] | mlps[-1]]]


def test_another_order_and_other_batches_of_the_images_give_the_same_texts(
    drawn: Decomposition, described: TextFeatures, spans: TextSpans
) -> None:
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(1))
    parts = [Moments.of(drawn[rows]) for rows in order.split(150)]
    moments = parts[0]
    for part in parts[1:]:
        moments = moments.merge(part)
    again = fit_textspans(moments, described)
    assert [s.texts for s in again] == [s.texts for s in spans]


def test_coordinates_that_are_the_terms_themselves(d: Decomposition) -> None:
    """As in towers that are pooled by attention: the same terms, so the same texts and reconstructions."""
    identity = torch.eye(d.d_embed).expand(3, 4, -1, -1)
    wide = replace(d, coords=d.heads, maps=replace(d.maps, heads=identity))
    texts = pool_of(90, d.d_embed)
    a, b = (fit_textspans(Moments.of(x), texts, heads, n_texts=4) for x in (d, wide))
    assert [span.indices for span in a] == [span.indices for span in b]
    assert [span.rank for span in a] == [span.rank for span in b]
    torch.testing.assert_close(a.reconstruct(d).heads, b.reconstruct(wide).heads, rtol=1e-3, atol=1e-4)


def test_a_tower_pooled_by_attention(make_tower: Any, photos: Tensor) -> None:
    """Its pool's MLP is a component as any other."""
    siglip = make_tower(
        pool="attention", pool_heads=2, pool_mlp=40, projection=False, d_embed=32, n_prefix=0, ln_pre=False
    )
    with torch.no_grad():
        d = decompose(siglip, photos)
    texts = pool_of(90, 32)
    found = fit_textspans(Moments.of(d), texts, heads[-1] | pool, n_texts=5)
    exact = d.to(torch.float64)
    terms = [*exact.heads[:, -1].unbind(1), exact.pool[:, 0]]
    assert [str(span.part) for span in found] == [*(f"heads[2, {h}]" for h in range(4)), "pool"]
    for span, x in zip(found, terms, strict=True):
        same(span, x, texts.features)
    edited = found.reconstruct(d)
    torch.testing.assert_close(edited.pool[:, 0], found.spans[-1].reconstruct(d.pool[:, 0]))
    torch.testing.assert_close(
        edited.heads[:, 2, 1], found[2, 1].reconstruct(d.heads[:, 2, 1]), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(edited.mlps, d.mlps)


def test_spans_of_two_models_can_be_held_against_each_other(
    spans: TextSpans, described: TextFeatures
) -> None:
    first, second = spans.spans[0], spans.spans[1]
    assert torch.equal(first.features, described.features[list(first.indices)])
    same, other = (role_change(first, span, seed=0) for span in (first, second))
    assert same.similarity.value == pytest.approx(1, abs=1e-5)
    assert other.similarity.value < same.similarity.value


def test_work_in_chunks_is_the_same(
    monkeypatch: pytest.MonkeyPatch, drawn: Decomposition, described: TextFeatures, spans: TextSpans
) -> None:
    monkeypatch.setattr("decompclip.operators.textspan.CHUNK", 3 * 16 * len(described))
    again = fit_textspans(Moments.of(drawn), described)
    assert [s.indices for s in again] == [s.indices for s in spans]


def test_chunks_are_of_one_kind_and_of_what_may_be_at_work(
    monkeypatch: pytest.MonkeyPatch, d: Decomposition
) -> None:
    moments = Moments.of(d)
    parts, width = parts_of(everything, moments), d.coords.shape[-1]
    monkeypatch.setattr("decompclip.operators.textspan.CHUNK", 5 * width * 40)
    found = list(_chunks(parts, moments, 40))
    assert [part for chunk in found for part in chunk] == list(parts)
    assert [len(chunk) for chunk in found] == [
        4,
        4,
        4,
        1,
        2,
        1,
    ]  # heads; MLPs, which are wider; the embedding
    monkeypatch.setattr("decompclip.operators.textspan.CHUNK", 1)
    assert [len(chunk) for chunk in _chunks(parts, moments, 40)] == [1] * 16


def test_a_text_that_says_nothing_is_no_direction() -> None:
    """Not even where what is left is as small as rounding, and all texts count as equal."""
    left = 1e-13 * (1 + 5e-10)
    covariance = torch.tensor([[[1.0, 0.0], [0.0, left]]]).double()
    space = Frame(torch.eye(2)[None].double(), covariance, torch.tensor([2]), torch.tensor([1.0]).double())
    picks = pick(space, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2)
    assert picks.directions.isfinite().all() and picks.explained.isfinite().all()
    assert picks.texts[0, 0] == 1


def test_scores_that_rounding_of_the_first_tells_apart_are_equal() -> None:
    """The first of them is picked, the number of the largest alone would be the third."""
    near = torch.tensor([[1.0, 0.0], [0.0, 1e-5 - 5e-12], [0.0, 1e-5]]).double().sqrt()
    spread = torch.diag(torch.tensor([100.0, 1.0])).double()[None]
    space = Frame(torch.eye(2)[None].double(), spread, torch.tensor([2]), torch.tensor([101.0]).double())
    assert pick(space, near, 2).texts.tolist() == [[0, 1]]


def test_what_is_past_the_rank_or_as_small_as_rounding_is_not_picked() -> None:
    """Side by side: of rank 1; a second direction of rounding; nothing that varies; two that do."""
    spread = torch.tensor([[1.0, 0.5], [100.0, 1e-12], [0.0, 0.0], [1.0, 0.5]]).double()
    space = Frame(
        torch.eye(2).double().expand(4, 2, 2),
        torch.diag_embed(spread),
        torch.tensor([1, 2, 2, 2]),
        spread.sum(1),
    )
    picks = pick(space, torch.eye(2), 3)
    assert picks.texts.tolist() == [[0, -1, -1], [0, -1, -1], [-1, -1, -1], [0, 1, -1]]
    first, second, none = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
    assert picks.directions.tolist() == [[first, none, none]] * 2 + [[none] * 3, [first, second, none]]
    shares = torch.tensor([[2 / 3] * 3, [1.0] * 3, [0.0] * 3, [2 / 3, 1, 1]]).double()
    torch.testing.assert_close(picks.explained, shares)


def test_of_the_moments_means_alone_are_kept(tower: HookedViT, photos: Tensor) -> None:
    means = fit_textspans(Moments.fit(tower, [photos]), pool_of(9, 20), heads[0, 0], n_texts=2).means
    assert means.scatter is None and means.streams is None


def test_as_many_texts_as_the_rank_explain_everything(spans: TextSpans, drawn: Decomposition) -> None:
    span = spans[-1, 2]
    assert len(span) == span.rank == 16  # of 20 asked for
    assert span.explained == pytest.approx(1)
    torch.testing.assert_close(
        span.reconstruct(drawn.heads[:, -1, 2]), drawn.heads[:, -1, 2], rtol=0, atol=1e-5
    )


def test_each_text_adds_and_directions_are_orthonormal(spans: TextSpans) -> None:
    for span in spans:
        assert (span.variance_explained.diff(prepend=torch.zeros(1)) > 0).all()
        assert span.explained <= 1 + 1e-9
        torch.testing.assert_close(
            span.directions @ span.directions.T, torch.eye(len(span), dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_a_component_that_never_changes_has_no_texts(d: Decomposition) -> None:
    still = d.edit(mlps=d.mlps[:1].expand_as(d.mlps))
    span = fit_textspans(Moments.of(still), pool_of(9, d.d_embed), mlps[0]).spans[0]
    assert (len(span), span.explained, span.texts) == (0, 0.0, ())
    torch.testing.assert_close(span.reconstruct(still.mlps[:, 0]), still.mlps[:, 0])
    bars, layout = shown(span.figure())
    assert len(bars.x) == 0 and layout.xaxis.range == (0, 1.15)
    silent = d.edit(mlps=torch.zeros_like(d.mlps))
    assert [span.rank for span in fit_textspans(Moments.of(silent), pool_of(9, d.d_embed), mlps)] == [0] * 3


# Reconstruction


def test_no_texts_is_mean_ablation(drawn: Decomposition, spans: TextSpans) -> None:
    ablated = MeanAblate(heads | mlps, Moments.of(drawn))(drawn)
    torch.testing.assert_close(spans.reconstruct(drawn, 0).features, ablated.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [heads[-1], heads[:, 1] | mlps[0], embed])
def test_reconstruction_edits_these_components_alone(d: Decomposition, which: Any) -> None:
    found = fit_textspans(Moments.of(d), pool_of(80, d.d_embed), which, n_texts=3)
    edited = found.reconstruct(d)
    mask = which.resolve(3, 4)
    for layer in range(3):
        for head in range(4):
            expected = d.heads[:, layer, head]
            if mask.heads[layer, head]:
                expected = found[layer, head].reconstruct(expected)
            torch.testing.assert_close(edited.heads[:, layer, head], expected, rtol=1e-3, atol=1e-4)
    for layer in range(3):
        expected = d.mlps[:, layer]
        torch.testing.assert_close(
            edited.mlps[:, layer], found[0, "mlp"].reconstruct(expected) if mask.mlps[layer] else expected
        )
    assert torch.equal(edited.embed, d.embed) != mask.embed


def test_terms_are_read_once_for_all_components(d: Decomposition) -> None:
    """Those of a store lie on the disk."""
    reads: list[str] = []

    class Counted(Decomposition):
        def __getattribute__(self, name: str) -> Any:
            reads.append(name)
            return super().__getattribute__(name)

    counted, counts = Counted(**{field.name: getattr(d, field.name) for field in fields(d)}), []
    for which in (heads[-1, 0], heads[-1]):
        found = fit_textspans(Moments.of(d), pool_of(80, d.d_embed), which, n_texts=3)
        reads.clear()
        found.reconstruct(counted)
        counts.append(reads.count("coords"))
    assert counts[0] == counts[1]


def test_accuracy_between_means_and_all_there_is(model: HookedCLIP, spans: TextSpans) -> None:
    fresh = Shapes(300, seed=77).draw(range(300))
    with torch.no_grad():
        d = model.decompose(model.normalize(fresh.images))
    classifier = model.zero_shot_classifier()
    full = spans[heads].accuracy(d, classifier, fresh.labels)
    # A head has 16 dimensions, and gets as many texts: nothing is lost.
    assert full.reconstructed == full.plain > 0.95
    few = [spans.accuracy(d, classifier, fresh.labels, n).reconstructed for n in (0, 2, 20)]
    assert few[0] == spans.accuracy(d, classifier, fresh.labels).mean_ablated < few[1] < few[2] <= full.plain
    assert list(full.to_frame().columns) == ["components", "accuracy"]


# What goes in


def test_three_arguments_are_enough(model: HookedCLIP) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the bundled model's own images and words: nothing to warn of
        span = textspan(model, -1, 4, n_texts=5)
    assert set(span.texts) <= set(shapes_texts())
    assert str(span.part) == "heads[5, 4]"
    assert span.n_images >= 1000


def test_spans_are_fitted_as_asked(model: HookedCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the three functions is asked; moments of the stream, which nothing reads, are not made."""
    fitted, fit = [], Moments.fit
    monkeypatch.setattr(Moments, "fit", lambda *args, **own: fitted.append(fit(*args, **own)) or fitted[-1])
    images, texts = model.normalize(WORLD.draw(range(60)).images), encode_texts(model, shapes_texts()[:40])
    options: dict[str, Any] = {"n_texts": 3, "rank": 5, "centred": True}
    one = textspan(model, -1, 4, images=images, texts=texts, convention="paper", **options)
    several = textspans(model, heads[-1], images=images, texts=texts, convention="paper", **options)
    with torch.no_grad():
        moments = Moments.of(model.decompose(images, convention="paper"))
    expected = fit_textspans(moments, texts, heads[-1, 4], **options)
    assert one.indices == several[-1, 4].indices == expected.spans[0].indices and len(one) <= 3
    assert one.rank == several[-1, 4].rank == expected.spans[0].rank
    torch.testing.assert_close(
        one.variance_explained, expected.spans[0].variance_explained, rtol=1e-5, atol=1e-7
    )
    assert [one.streams for one in fitted] == [None, None]
    assert several.settings == {"rank": 5, "centred": True, "convention": "paper", "images": 60, "pool": 40}
    others: list[dict[str, Any]] = [{"rank": "auto"}, {"centred": False}, {"n_texts": 2}]
    for other in others:
        found = fit_textspans(moments, texts, heads[-1, 4], **(options | other)).spans[0]
        assert (found.rank, found.explained) != (one.rank, one.explained), other
    coarse = textspan(model, -1, 4, images=images, texts=texts, tolerance=0.2)
    assert (
        coarse.rank == textspans(model, heads[-1], images=images, texts=texts, tolerance=0.2)[-1, 4].rank < 5
    )


def test_all_sources_of_images_agree(model: HookedCLIP, described: TextFeatures) -> None:
    world = Shapes(140, seed=5)
    images = model.normalize(world.draw(range(140)).images)
    with torch.no_grad():
        d = model.decompose(images)
    source = ShapesSource(world, model.normalize)
    found = [
        textspan(model, 5, "mlp", images=x, texts=described, n_texts=4).texts
        for x in (images, images.split(50), (batch for batch in images.split(9)), source, d, Moments.of(d))
    ]
    assert len(set(found)) == 1


def test_texts_from_a_list_and_from_a_file(model: HookedCLIP, drawn: Decomposition, tmp_path: Path) -> None:
    texts = ["a red circle", "a blue star", "a small heart"]
    (tmp_path / "own.txt").write_text("\n".join(texts), encoding="utf-8")
    a = textspan(model, -1, 0, images=drawn, texts=texts, n_texts=3)
    b = textspan(model, -1, 0, images=drawn, texts=tmp_path / "own.txt", n_texts=3)
    assert a.indices == b.indices
    assert set(a.texts) == set(texts)


def other_tokenizer(model: HookedCLIP) -> HookedCLIP:
    """The model as it were of the wide world: one whose tokenizer is not made of its own words."""
    copied = copy.copy(model)
    copied.tokenizer = lambda texts: model.tokenizer(texts)  # type: ignore[assignment]
    return copied


@pytest.mark.parametrize("size", [(32, 56), (40, 40)])
def test_drawings_take_the_shape_of_the_tower_s_images(
    model: HookedCLIP, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """At least so many, and twice as many as a term has coordinates; drawn at the longer side."""
    monkeypatch.setattr("decompclip.operators.inputs.N_IMAGES", 5)
    stand_in: Any = SimpleNamespace(
        image_size=size, tokenizer=model.tokenizer, name="t", normalize=model.normalize, cfg=None
    )
    for width, count in ((1, 5), (4, 8)):
        stand_in.cfg = SimpleNamespace(d_embed=width)
        found = torch.cat(list(default_images(stand_in, batch_size=3)))
        pixels = Shapes(count, seed=SEED, resolution=max(size)).draw(range(count)).images
        if size[0] != size[1]:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        assert torch.equal(found, model.normalize(pixels)) and found.shape == (count, 3, *size)


def test_a_model_of_photographs_is_warned_about_drawings(model: HookedCLIP) -> None:
    with pytest.warns(UserWarning, match=r"1024 drawings of the Shapes world.*pass images=FolderSource"):
        textspan(other_tokenizer(model), 0, 0, texts=["a red circle", "a blue star"], n_texts=1)


def test_a_model_of_photographs_has_the_general_pool(model: HookedCLIP) -> None:
    with pytest.warns(UserWarning, match="words unknown"):
        assert encode_texts(other_tokenizer(model)).texts == general_texts()


@pytest.mark.data
@pytest.mark.skipif("DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of texts")
def test_the_published_pool(drawn: Decomposition) -> None:
    texts = load_texts(Path(os.environ["DECOMPCLIP_DATA"], "texts", "image_descriptions_general.txt"))
    assert len(texts) > 3000
    features = TextFeatures(texts, unit(len(texts), drawn.d_embed))
    for span in fit_textspans(Moments.of(drawn), features, heads[-1, :2], n_texts=10):
        same(span, drawn.to(torch.float64).heads[:, -1, span.part.head], features.features)


# What comes out


def test_what_a_user_sees(spans: TextSpans, drawn: Decomposition) -> None:
    span = spans[5, 3]
    table = span.to_frame()
    assert list(table.columns) == ["component", "pick", "text", "index", "variance_explained"]
    assert list(table["text"]) == list(span.texts) == list(span)
    assert repr(span).startswith(f"TextSpan(heads[5, 3]: {span.texts[0]!r}, ")
    assert span.texts[0] in span._repr_html_()
    assert spans.to_frame().index.tolist() == list(range(sum(map(len, spans))))
    assert repr(spans) == (
        f"TextSpans(54 components; rank: auto, centred: False, convention: centred, images: {len(drawn)}, pool: 580)"
    )
    assert TextSpans(spans.spans, spans.means).settings == {}
    assert "20 of 54 rows, the largest variance_explained first" in spans._repr_html_()
    assert f"<td>{'; '.join(span.texts[:5])}</td>" in spans[heads[5]]._repr_html_()
    assert [span.share(n) for n in (-1, 0, 1, 2)] == [0, 0, *span.variance_explained[:2].tolist()]
    assert spans[0, 0] is spans.spans[0]
    assert [str(s.part) for s in spans[mlps[:2] | heads[1, 3]]] == ["heads[1, 3]", "mlps[0]", "mlps[1]"]
    torch.testing.assert_close(spans.explained[0], spans.spans[0].variance_explained[-1])


def test_html_in_texts_is_only_text(d: Decomposition) -> None:
    texts = TextFeatures(("<script>alert(1)</script>", "b"), unit(2, d.d_embed))
    found = fit_textspans(Moments.of(d), texts, heads[0, 0], n_texts=2)
    for page in (found._repr_html_(), found.spans[0]._repr_html_()):
        assert "<script>" not in page
    assert "<script>" not in str(found.spans[0].figure().to_json())


def test_figures_show_the_numbers(spans: TextSpans) -> None:
    span = spans[5, 3]
    bars, layout = shown(span.figure())
    assert list(layout.yaxis.ticktext) == list(span.texts)
    so_far = span.variance_explained.tolist()
    assert list(bars.text) == [f"{share:.0%}" for share in so_far]  # behind the bars: cumulative
    assert [note.split()[-1] for _, note in bars.customdata] == [f"{share:.1%}" for share in so_far]
    assert layout.xaxis.range[0] == 0 and max(bars.x) < layout.xaxis.range[1] < 1.3 * max(bars.x)
    assert layout.xaxis.tickformat == ".0%" and layout.title.text == "heads[5, 3]"
    assert layout.xaxis.title.text == "share of the variance added (beside the bars: cumulative)"
    torch.testing.assert_close(
        torch.tensor(bars.x, dtype=span.variance_explained.dtype).cumsum(0), span.variance_explained
    )
    cells, layout = shown(spans.figure())
    assert layout.yaxis.autorange is True  # the first layer at the bottom
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("head", "layer")
    assert layout.coloraxis.colorbar.tickformat == ".0%"
    assert layout.coloraxis.colorbar.title.text == "variance in 3 texts"
    assert (cells.z.shape, list(cells.x)) == ((6, 9), [*map(str, range(8)), "MLP"])
    assert cells.z[5, 3] == span.share(3) == span.variance_explained[2]
    assert cells.customdata[5, 3] == "<br>".join(span.texts[:3])
    few, _ = shown(spans[heads[2, [0, 5]]].figure())
    assert (few.z.shape, list(few.x), list(few.y)) == ((1, 2), ["0", "5"], ["2"])


# What cannot be


def test_too_few_images(model: HookedCLIP, drawn: Decomposition, described: TextFeatures) -> None:
    expected = (
        r"expected at least 128 images for mlps\[0\] at rank='auto' \(its terms have 128 coordinates\); received 20; "
        "pass more images or a smaller rank"
    )
    few = Moments.of(drawn[:20])
    with pytest.raises(ValueError, match=expected):
        fit_textspans(few, described)
    with pytest.raises(ValueError, match="at least 80 images .* rank='paper'"):
        fit_textspans(few, described, mlps[0], rank="paper")
    assert len(fit_textspans(few, described, mlps[0] | heads[0], rank=10)) == 9
    with pytest.raises(ValueError, match="received none; check the image source"):
        textspan(model, 0, 0, images=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_texts": 0}, "n_texts to be a whole number of texts, at least 1; received 0"),
        ({"n_texts": 2.5}, "at least 1; received 2.5"),
        ({"texts": ["a star", " "]}, "texts that say something; received an empty one among 2"),
        ({"rank": "full"}, "rank of 'auto', 'paper' or a number of at least 1; received 'full'"),
        ({"rank": 0}, "received 0"),
        ({"texts": []}, "expected at least one text; received none; leave texts out for the default pool"),
        ({"texts": "a star"}, "expected a list of texts; received the single string 'a star'"),
        ({"images": torch.zeros(0, 3, 48, 48)}, "batches of images; received none; check the image source"),
        (
            {"images": torch.zeros(4, 3, 48, 48), "batch_size": 0},
            "batch_size to be .* at least 1; received 0",
        ),
        ({"tolerance": 1.0}, r"a tolerance in \[0, 1\), a share of the largest singular value; received 1.0"),
        ({"images": torch.zeros(3, 48, 48)}, r"received \[3, 48, 48\]; preprocess pictures"),
        ({"images": WORLD}, "received tuple; preprocess pictures with model.preprocess"),
    ],
)
@pytest.mark.usefixtures("ours_alone")
def test_bad_input(model: HookedCLIP, drawn: Decomposition, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        textspan(model, -1, 0, **{"images": drawn, "texts": ["a star", "a ring"], **options})


def test_components_that_are_not_there(model: HookedCLIP, spans: TextSpans) -> None:
    with pytest.raises(IndexError, match=r"expected a layer in 0\.\.5"):
        textspan(model, 6, 0)
    with pytest.raises(IndexError, match=r"expected a head in 0\.\.7"):
        textspan(model, 5, 8)
    with pytest.raises(IndexError, match="expected a layer"):
        spans[heads[9]]
    with pytest.raises(
        KeyError, match=r"components that were described \(54 are\); received embed, which were not"
    ):
        spans[embed]
    with pytest.raises(ValueError, match="names none"):
        textspans(model, heads - heads)
    with pytest.raises(ValueError, match="neurons"):
        textspans(model, neurons[0, :3] | heads[0])


@pytest.mark.usefixtures("ours_alone")
def test_things_of_another_model(
    model: HookedCLIP, tower: HookedViT, photos: Tensor, drawn: Decomposition, spans: TextSpans
) -> None:
    small = decompose(tower, photos)
    with pytest.raises(ValueError, match="fit the moments on the model they are used with"):
        textspan(model, 0, 0, images=Moments.of(small), texts=["a star"])
    with pytest.raises(ValueError, match="other weights"):
        textspan(decompclip.load("shapes-badnet"), 0, 0, images=drawn, texts=["a star"])
    with pytest.raises(ValueError, match="fit the moments on the model"):
        spans.reconstruct(small)
    with pytest.raises(ValueError, match=r"text features \[text, 128\].*received \[9, 20\]"):
        fit_textspans(Moments.of(drawn), pool_of(9, 20))
    with pytest.raises(ValueError, match="fit them with second=True"):
        fit_textspans(Moments.of(drawn, second=False), pool_of(9, 128))
    with pytest.raises(ValueError, match=r"one label each .* received 700 images, labels \[3\]"):
        spans.accuracy(drawn, torch.zeros(2, 128), torch.zeros(3, dtype=torch.long))


@pytest.mark.usefixtures("ours_alone")
def test_text_features_fit_their_texts() -> None:
    for texts, shape in ((("a",), [2, 4]), (("a", "b"), [2]), ((), [0, 4])):
        with pytest.raises(ValueError, match=re.escape(f"received {len(texts)} texts, features {shape}")):
            TextFeatures(texts, torch.zeros(shape))
    with pytest.raises(ValueError, match="finite text features; received nan or inf, first for 'b'"):
        TextFeatures(("a", "b"), torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(
        ValueError, match=r"of length 1, or the longest would be picked; received one of length 0\.5 for 'b'"
    ):
        TextFeatures(("a", "b", "c"), torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 1.4]]))
    half = TextFeatures(
        tuple(map(str, range(50))), unit(50, 512).half()
    )  # rounding of half precision is no error
    assert len(half) == 50


@pytest.mark.usefixtures("ours_alone")
def test_texts_of_another_model(model: HookedCLIP, drawn: Decomposition) -> None:
    """Same width, other weights: shape alone would not tell."""
    theirs = encode_texts(decompclip.load("shapes-badnet"), ["a star", "a ring"])
    words = (
        "texts by the model that reads the images; received TextFeatures.*, of other weights; encode_texts"
    )
    for call in (
        lambda: textspan(model, 0, 0, images=drawn, texts=theirs),
        lambda: fit_textspans(Moments.of(drawn), theirs, heads[0, 0]),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert (
        len(fit_textspans(Moments.of(drawn), replace(theirs, model=None), heads[0, 0])) == 1
    )  # of origin unknown
    assert len(textspan(model, 0, 0, images=drawn, texts=encode_texts(model, ["a star"]))) == 1


def test_the_rank_is_judged_in_the_precision_of_the_terms(make_tower: Any, photos: Tensor) -> None:
    """A direction of size 2e-6 beside one of size 1 is rounding in fp32, and a fact in fp64."""
    ranks = []
    for dtype in (torch.float32, torch.float64):
        d = decompose(make_tower(dtype=dtype), photos.to(dtype))
        directions = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()).Q
        inside = torch.linalg.pinv(
            d.maps.heads[1, 2].double()
        )  # coordinates of directions of the joint space
        axes = torch.linalg.qr(d.maps.heads[1, 2].double().mT).Q.mT
        noise = torch.randn(len(d), 8, generator=torch.Generator().manual_seed(1)).double()
        terms = noise * torch.tensor([1.0, 0.5, 2e-6, 0, 0, 0, 0, 0]).double() @ directions @ axes
        coords = d.coords.clone()
        coords[:, 1, 2] = (terms @ inside).to(coords)
        texts = pool_of(30, d.d_embed)
        moments = Moments.of(d.edit(coords=coords))
        ranks.append(fit_textspans(moments, texts, heads[1, 2]).spans[0].rank)
        sizes = torch.linalg.svdvals(terms)
        for times, rank in ((0.99, 2), (1.01, 1)):  # by the user's word
            tolerance = times * float(sizes[1] / sizes[0])
            assert fit_textspans(moments, texts, heads[1, 2], tolerance=tolerance).spans[0].rank == rank
    assert ranks == [2, 3]


def test_about_the_mean_one_image_more_is_needed(d: Decomposition) -> None:
    """n terms span n - 1 dimensions about their mean."""
    width, texts = d.coords.shape[-1], pool_of(30, d.d_embed)
    just = Moments.of(d[:width])
    assert fit_textspans(just, texts, heads[1, 2]).spans[0].rank >= 8
    words = rf"at least {width + 1} images for heads\[1, 2\] at rank='auto', centred .*received {width};"
    with pytest.raises(ValueError, match=words):
        fit_textspans(just, texts, heads[1, 2], centred=True)
    assert fit_textspans(Moments.of(d[: width + 1]), texts, heads[1, 2], centred=True).spans[0].rank >= 8


def test_accuracies_speak(model: HookedCLIP, spans: TextSpans, drawn: Decomposition) -> None:
    labels = WORLD.draw(range(len(drawn))).labels
    found = spans[heads[-1]].accuracy(drawn, model.zero_shot_classifier(WORLD.class_names), labels, 2)
    bars, layout = shown(found.figure())
    assert list(bars.text) == [f"{share:.1%}" for share in bars.x]
    assert layout.xaxis.range[0] == 0 and 1 < layout.xaxis.range[1] < 1.5
    assert (layout.xaxis.title.text, layout.xaxis.tickformat) == ("zero-shot accuracy", ".0%")
    assert list(bars.x) == [found.plain, found.reconstructed, found.mean_ablated]
    assert f"{found.reconstructed:.1%} from 2 texts" in repr(found) and "700 images" in repr(found)
    assert "from texts" in found._repr_html_()


def test_batches_of_any_kind(photos: Tensor) -> None:
    whole = list(image_batches(photos, batch_size=7))
    assert {len(batch) for batch in whole[:-1]} == {7}
    torch.testing.assert_close(torch.cat(whole), photos)
    pieces = list(image_batches([photos[:9], photos[:0], photos[9:]], batch_size=7))
    assert all(0 < len(batch) <= 7 for batch in pieces)
    torch.testing.assert_close(torch.cat(pieces), photos)
