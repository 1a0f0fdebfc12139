"""Sweeps and greedy sets, against one ablation after another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, embed, heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators import sweeps as sweeps_module
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.sweep_results import SHARES
from decompclip.operators.sweeps import Shared, ablation_sweep, most_damaging, predictions
from decompclip.tower.vit import HookedViT


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def classifier() -> Tensor:
    return noise(6, 20)


@pytest.fixture(scope="module")
def moments(tower: HookedViT) -> Moments:
    return Moments.fit(tower, drawn(16, 5).split(6))


@pytest.fixture(scope="module")
def d(tower: HookedViT, images: Tensor) -> Decomposition:
    return decompose(tower, images)


@pytest.fixture(scope="module")
def many(tower: HookedViT) -> Decomposition:
    return decompose(tower, drawn(40, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_prediction(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0, 2, 2, 1], [3, 0, 3, 3]], dtype=dtype)
    assert predictions(logits).tolist() == [1, 0]


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_sweeps_equal_one_ablation_after_another(d: Decomposition, moments: Moments, fill: str) -> None:
    classifier = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))
    found = ablation_sweep(d, moments if fill == "mean" else None, classifier)
    assert len(found.sweeps) == 6
    for (kind, scheme), result in found.sweeps.items():
        assert len(result) == 3
        for layer in range(3):
            parts = result.components(layer)
            edit = MeanAblate(parts, moments) if fill == "mean" else ZeroAblate(parts)
            expected = (edit(d).features @ classifier.T).argmax(1)
            assert torch.equal(result[layer], expected), (kind, scheme, layer)
        single = ablation_sweep(
            d, moments if fill == "mean" else None, classifier, kinds=(kind,), schemes=(scheme,)
        )
        assert list(single.sweeps) == [(kind, scheme)]
        assert torch.equal(single[kind, scheme].predictions, result.predictions)
        assert f"{fill}-ablation of {kind}, {scheme}: 3 settings, 5 images" in repr(result)


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_the_entry_counts_as_the_first_mlp_where_asked_for(
    many: Decomposition, moments: Moments, classifier: Tensor, fill: str
) -> None:
    """As in the published code: one setting more, each against its own ablation; heads stay what they are."""
    d = many.edit(
        embed=many.embed + noise(40, 20, seed=8)
    )  # a class token's own term is the same in every image
    means = moments if fill == "mean" else None
    found = ablation_sweep(d, means, classifier, entry=True)
    plain = ablation_sweep(d, means, classifier)
    wanted: dict[str, list[Components]] = {
        "forward": [embed, *(embed | mlps[: i + 1] for i in range(3))],
        "backward": [embed | mlps, mlps, mlps[1:], mlps[2:]],
        "separate": [embed, mlps[0], mlps[1], mlps[2]],
    }
    for scheme, settings in wanted.items():
        sweep = found["mlps", scheme]  # pyright: ignore[reportArgumentType]
        assert len(sweep) == len(settings) == 4
        for step, parts in enumerate(settings):
            edit = MeanAblate(parts, moments) if fill == "mean" else ZeroAblate(parts)
            assert torch.equal(sweep[step], (edit(d).features @ classifier.T).argmax(1)), (scheme, step)
            named = sweep.components(step).resolve(3, 4, pool=False)
            expected = parts.resolve(3, 4, pool=False)
            assert named.embed == expected.embed and torch.equal(named.mlps, expected.mlps)
        assert torch.equal(found["heads", scheme].predictions, plain["heads", scheme].predictions)  # pyright: ignore[reportArgumentType]


def test_a_sweep_names_its_settings(d: Decomposition, moments: Moments) -> None:
    classifier = torch.randn(6, 20, generator=torch.Generator().manual_seed(4))
    table = ablation_sweep(d, moments, classifier, kinds=("mlps",))
    forward, backward = table["mlps", "forward"], table["mlps", "backward"]
    assert [repr(forward.components(i)) for i in range(3)] == ["mlps[:1]", "mlps[:2]", "mlps[:3]"]
    assert repr(backward.components(1)) == "mlps[1:]"
    assert repr(forward) == "Sweep(mean-ablation of mlps, forward: 3 settings, 5 images)"


@pytest.mark.parametrize("classes", [6, 3000])
@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_heads_alone_and_many_classes(
    tower: HookedViT, images: Tensor, convention: Any, classes: int
) -> None:
    """With many classes terms are formed first; either way to the logits is exact."""
    d = decompose(tower, images, convention=convention, normalize=True)
    moments = Moments.fit(tower, [drawn(16, 5)], convention=convention, normalize=True)
    classifier = noise(classes, 20)
    table = ablation_sweep(d, moments, classifier, each_head=True)
    assert torch.equal(table.before, (d.features @ classifier.T).argmax(1))
    assert table.each_head is not None
    for layer in range(3):
        for head in range(4):
            expected = (MeanAblate(heads[layer, head], moments)(d).features @ classifier.T).argmax(1)
            assert torch.equal(table.each_head[layer, head], expected)
        expected = (MeanAblate(heads[layer:], moments)(d).features @ classifier.T).argmax(1)
        assert torch.equal(table["heads", "backward"][layer], expected)


def test_the_way_to_the_logits_is_the_cheaper_one(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    """4 heads of 8 coordinates a layer: in one step 32 products a class, else 32 * 16 and 16 a class; of equals the one step."""
    d = decompose(make_tower(d_embed=16), images)
    assert Shared.of(d, None, noise(32, 16)).to_class is not None
    assert Shared.of(d, None, noise(33, 16)).to_class is None


def test_moments_may_be_on_another_device(d: Decomposition, moments: Moments, classifier: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that need not be there
        shared = Shared.of(d.to("cuda"), moments, classifier)
    for fill in (shared.heads, shared.mlps, shared.embed):
        assert fill is not None and fill.device.type == "cuda"


def test_batches_and_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, many: Decomposition, moments: Moments, classifier: Tensor
) -> None:
    whole = ablation_sweep(many, moments, classifier, each_head=True)
    monkeypatch.setattr(sweeps_module, "CHUNK", 7 * len(classifier))
    batches = (many[start : start + 16] for start in range(0, 40, 16))
    parts = ablation_sweep(batches, moments, classifier, each_head=True)
    assert torch.equal(whole.before, parts.before) and len(parts) == 40
    for key, result in whole.sweeps.items():
        assert torch.equal(result.predictions, parts[key].predictions)
    assert whole.each_head is not None and parts.each_head is not None
    assert torch.equal(whole.each_head.predictions, parts.each_head.predictions)


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize("mean", [True, False])
def test_batches_of_different_models_or_forms_are_not_joined(
    make_tower: Callable[..., HookedViT],
    tower: HookedViT,
    images: Tensor,
    d: Decomposition,
    moments: Moments,
    classifier: Tensor,
    mean: bool,
) -> None:
    answers = torch.zeros(10, dtype=torch.long)
    fill = moments if mean else None
    others = {
        "other weights": decompose(make_tower(seed=3, layer_scale=True), images),
        "received convention='paper'": decompose(tower, images, convention="paper"),
        "received normalize=True": decompose(tower, images, normalize=True),
        "and TermMaps.centred: 2 layers": decompose(make_tower(n_layers=2), images),
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            ablation_sweep([d, other], fill, classifier)
        with pytest.raises(ValueError, match=words):
            most_damaging([d, other], fill, classifier, answers, size=1)
    # Stored batches bring equal maps of their own.
    again = replace(d, maps=replace(d.maps))
    joined = ablation_sweep([d, again], fill, classifier)
    assert torch.equal(joined.before[:5], joined.before[5:])


def test_images_are_decomposed_in_the_moments_form(tower: HookedViT, classifier: Tensor) -> None:
    moments = Moments.fit(tower, [drawn(16, 5)], convention="paper", normalize=True)
    d = decompose(tower, drawn(9, 2), convention="paper", normalize=True)
    streamed = ablation_sweep(drawn(9, 2).split(4), moments, classifier, model=tower)
    expected = ablation_sweep(d, moments, classifier)
    assert torch.equal(streamed["mlps", "forward"].predictions, expected["mlps", "forward"].predictions)


def test_towers_pooled_by_attention(
    make_tower: Callable[..., HookedViT], images: Tensor, classifier: Tensor
) -> None:
    """There coordinates are the terms themselves, and the pool's MLP is a term that no sweep ablates."""
    tower = make_tower(pool="attention", pool_heads=4, pool_mlp=24, n_prefix=0)
    d = decompose(tower, images)
    assert d.maps.direct and d.pool.shape[1] == 1
    table = ablation_sweep(d, None, classifier, each_head=True)
    assert torch.equal(table.before, (d.features @ classifier.T).argmax(1))
    assert table.each_head is not None
    for key, result in table.sweeps.items():
        for layer in range(3):
            expected = (ZeroAblate(result.components(layer))(d).features @ classifier.T).argmax(1)
            assert torch.equal(result[layer], expected), key
            expected = (ZeroAblate(heads[layer, 1])(d).features @ classifier.T).argmax(1)
            assert torch.equal(table.each_head[layer, 1], expected)


def test_a_table_counts_and_draws(d: Decomposition, moments: Moments, classifier: Tensor) -> None:
    table = ablation_sweep(d, moments, classifier, each_head=True)
    labels = table.before.clone()
    labels[0] = (labels[0] + 1) % 6
    frame = table.to_frame(labels, target=int(labels[1]))
    assert len(frame) == 1 + 6 * 3 + 12
    first = frame.iloc[0]
    assert (first.changed, first.accuracy) == (0, 0.8)
    row = frame[(frame.kind == "mlps") & (frame.scheme == "backward") & (frame.layer == 1)].iloc[0]
    assert row.components == "mlps[1:]"
    assert row.accuracy == float((table["mlps", "backward"][1] == labels).double().mean())
    assert row.target == float((table["mlps", "backward"][1] == labels[1]).double().mean())
    assert repr(table) == "SweepTable(mean-ablation: 18 settings and 12 heads alone, 5 images)"
    assert "mlps[1:]" in table._repr_html_()
    choices: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["changed"]),
        ({"labels": labels}, ["accuracy"]),
        ({"labels": labels, "target": 2}, ["accuracy", "target"]),
    ]
    for options, columns in choices:
        frame = 100 * table.to_frame(**options)[columns]
        for shown, sweeps in ((table, 6), (table["heads", "forward"], 1)):
            plot: Any = shown.figure(**options)
            lines = [trace for trace in plot.data if trace.mode == "lines+markers"]
            levels = [
                trace for trace in plot.data if trace.line.dash == "longdash" and trace.y[0] is not None
            ]
            assert isinstance(plot, go.Figure) and len(lines) == sweeps * len(columns)
            for column, line, level in zip(columns, lines, levels, strict=False):
                assert line.name == SHARES[column] and list(line.y) == pytest.approx(
                    frame[column][1:4].tolist()
                )
                assert list(level.y) == pytest.approx([frame[column][0]] * 2)


def test_single_sweeps_count_and_draw_as_their_table(
    d: Decomposition, moments: Moments, classifier: Tensor
) -> None:
    table = ablation_sweep(d, moments, classifier, each_head=True)
    labels = table.before.clone()
    labels[0] = (labels[0] + 1) % 6
    whole = table.to_frame(labels, target=2)
    one, alone = table["mlps", "backward"], table.each_head
    assert alone is not None
    expected = whole[(whole.kind == "mlps") & (whole.scheme == "backward")]
    frame = one.to_frame(labels, target=2)
    for column in ("layer", "components", "changed", "accuracy", "target"):
        assert frame[column].tolist() == expected[column].tolist()
    frame, expected = alone.to_frame(labels, target=2), whole[whole.scheme == "alone"]
    for column in ("layer", "head", "changed", "accuracy", "target"):
        assert frame[column].tolist() == expected[column].tolist()
    assert "mlps[1:]" in one._repr_html_() and "<td>2</td>" in alone._repr_html_()
    lines: list[Any] = [t for t in list(one.figure(labels).data) if t.mode == "lines+markers"]  # pyright: ignore
    assert list(lines[0].y) == pytest.approx((100 * one.to_frame(labels)["accuracy"]).tolist())
    plot: Any = alone.figure()
    assert plot.layout.yaxis.autorange is True and plot.layout.coloraxis.cmin == 0
    assert (plot.layout.xaxis.title.text, plot.layout.yaxis.title.text) == ("head", "layer")
    of_accuracy: Any = alone.figure(labels)
    falls = of_accuracy.layout.coloraxis
    assert falls.cmin == -falls.cmax and falls.colorbar.title.text.startswith("fall of: ")
    assert not plot.layout.coloraxis.colorbar.title.text.startswith("fall of: ")
    assert "layer %{y}, head %{x}" in plot.data[0].hovertemplate
    drawn_map: Any = next(iter(plot.data))
    assert drawn_map.z.shape == (3, 4)
    assert drawn_map.z.ravel().tolist() == pytest.approx((100 * frame["changed"]).tolist())
    drawn_map = next(iter(alone.figure(labels).data))
    assert drawn_map.z.ravel().tolist() == pytest.approx((80 - 100 * frame["accuracy"]).tolist())
    before = 100 * float((table.before == 2).double().mean())
    drawn_map = next(iter(alone.figure(target=2).data))
    assert drawn_map.z.ravel().tolist() == pytest.approx((before - 100 * frame["target"]).tolist())


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_greedy_equals_trying_every_component_at_every_step(
    many: Decomposition, moments: Moments, classifier: Tensor, fill: str
) -> None:
    answers = (many.features @ classifier.T).argmax(1)
    candidates = heads[1:] | mlps
    names: list[Components] = [*(heads[i, j] for i in (1, 2) for j in range(4)), *(mlps[i] for i in range(3))]

    def hits(chosen: Components) -> int:
        edit = MeanAblate(chosen, moments) if fill == "mean" else ZeroAblate(chosen)
        return int(((edit(many).features @ classifier.T).argmax(1) == answers).sum())

    chosen: Components = heads[[]]
    counts, steps = [40], []
    for _ in range(4):
        best = min((c for c in names if c not in steps), key=lambda c: hits(chosen | c))
        chosen = chosen | best
        steps.append(best)
        counts.append(hits(chosen))
    batches = [many[:25], many[25:]]
    found = most_damaging(
        batches, moments if fill == "mean" else None, classifier, answers, candidates=candidates, size=4
    )
    assert list(found.steps) == steps
    assert list(found.hits) == counts
    assert found.rates[0] == 1 and counts[-1] < counts[0]
    assert hits(found.components) == counts[-1]
    assert found.to_frame().component.tolist() == ["", *map(repr, steps)]
    traces: list[Any] = list(found.figure().data)
    (line,) = [trace for trace in traces if trace.mode == "lines+markers"]
    assert list(line.y) == pytest.approx([100 * count / 40 for count in counts])
    assert line.name == "Taken for their answer"  # which need not be the right one
    (level,) = [trace for trace in traces if trace.line.dash == "longdash" and trace.y[0] is not None]
    assert list(level.y) == [100, 100]
    axis = found.figure().layout.xaxis  # pyright: ignore[reportAttributeAccessIssue]
    assert list(axis.ticktext) == ["none", *(f"+ {step!r}" for step in steps)] and axis.title.text == ""
    ends = f"{fill}-ablated: 1.000 to {counts[-1] / 40:.3f} of 40 images"
    assert repr(found) == f"GreedySet({found.components!r}, {ends})"


def test_an_image_without_numbers_is_named(
    d: Decomposition, classifier: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its place in all the data, whatever the batches and the chunks."""
    embed_ = d.embed.clone()
    embed_[4] = torch.nan
    broken = d.edit(embed=embed_)
    for size in (2, 5):
        monkeypatch.setattr(sweeps_module, "CHUNK", size * len(classifier))
        for data in ([broken], [broken[:3], broken[3:]]):
            with pytest.raises(ValueError, match="those of 1 images, first of image 4"):
                ablation_sweep(data, None, classifier)


def test_greedy_ends_with_its_candidates(d: Decomposition, classifier: Tensor) -> None:
    answers = torch.zeros(5, dtype=torch.long)
    found = most_damaging(d, None, classifier, answers, candidates=mlps[:2], size=9)
    assert {*found.steps} == {mlps[0], mlps[1]} and len(found.hits) == 3
    assert repr(found).startswith("GreedySet(mlps[")
    none = most_damaging(d, None, classifier, answers, size=0)
    assert none.steps == () and none.hits == found.hits[:1]


@pytest.mark.usefixtures("ours_alone")
def test_sweep_errors_say_what_to_do(
    tower: HookedViT, images: Tensor, d: Decomposition, moments: Moments, classifier: Tensor
) -> None:
    with pytest.raises(ValueError, match="normalize=False, as those before; received normalize=True"):
        ablation_sweep(decompose(tower, images, normalize=True), moments, classifier)
    with pytest.raises(ValueError, match=r"expected kind of \('heads', 'mlps'\); received 'neurons'"):
        ablation_sweep(d, moments, classifier, kinds=("neurons",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"expected scheme of \('forward', 'backward', 'separate'\); received 'up'"
    ):
        ablation_sweep(d, moments, classifier, schemes=("up",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"a classifier \[class, 20\] of .*; received \[6, 21\]; build it with"
    ):
        ablation_sweep(d, moments, torch.zeros(6, 21))
    with pytest.raises(ValueError, match=r"of at least one class; received \[0, 20\]"):
        ablation_sweep(d, moments, classifier[:0])
    for options in ({"kinds": "heads"}, {"schemes": "forward"}, {"kinds": ()}, {"schemes": ()}):
        (name, given), bad = next(iter(options.items())), dict[str, Any](options)
        with pytest.raises(
            ValueError, match=rf"{name} as a tuple of some of \('.*'\); received {re.escape(repr(given))}"
        ):
            ablation_sweep(d, moments, classifier, **bad)
    with pytest.raises(ValueError, match=r"one tensor \[5, 3, 24, 16\]; a single batch is \[images\]"):
        ablation_sweep(images, moments, classifier, model=tower)
    bad = d.edit(mlps=d.mlps.clone())
    bad.mlps[3, 1, 2] = torch.inf
    none = torch.zeros(10, dtype=torch.long)
    for go_over in (
        lambda x: ablation_sweep(x, None, classifier),
        lambda x: most_damaging(x, None, classifier, none),
    ):
        with pytest.raises(ValueError, match="nan or inf in those of 1 images, first of image 8; leave"):
            go_over([d, bad])
    with pytest.raises(ValueError, match="nan or inf of finite terms; check the classifier"):
        ablation_sweep(d, moments, classifier * torch.nan)
    nothing: Any = None
    with pytest.raises(TypeError, match="batches of them; received NoneType"):
        ablation_sweep(nothing, moments, classifier)
    for empty in ([], d[:0]):
        with pytest.raises(ValueError, match="expected decompositions; received none"):
            ablation_sweep(empty, moments, classifier)
    with pytest.raises(TypeError, match=r"received images alone; pass model=, or decompose them"):
        ablation_sweep([images], moments, classifier)
    nonsense: Any = ["a"]
    with pytest.raises(TypeError, match="batches of them; received str"):
        ablation_sweep(nonsense, moments, classifier)

    def once() -> Iterator[Decomposition]:
        yield d

    answers = torch.zeros(5, dtype=torch.long)
    with pytest.raises(
        TypeError, match="data to go through 5 times; received a generator, which ends after once"
    ):
        most_damaging(once(), moments, classifier, answers)
    for wrong in (answers[:4], torch.zeros(6, dtype=torch.long)):
        with pytest.raises(ValueError, match=rf"received {len(wrong)} answers and 5"):
            most_damaging(d, moments, classifier, wrong)
    with pytest.raises(ValueError, match=r"heads and MLPs to choose from; received heads \| embed"):
        most_damaging(d, moments, classifier, answers, candidates=heads | embed)
    table = ablation_sweep(d, moments, classifier)
    for result in (table, table["heads", "forward"]):
        with pytest.raises(ValueError, match="a label for each of 5 images; received"):
            result.to_frame(answers[:2])
        for wrong in (answers[:2], answers[:1]):  # one label would go for all
            with pytest.raises(ValueError, match="a label for each of 5 images; received"):
                result.figure(wrong)
    with pytest.raises(ValueError, match="a size of 0 or more components; received -1"):
        most_damaging(d, moments, classifier, answers, size=-1)
    for wrong in (answers + 99, answers - 1):
        with pytest.raises(
            IndexError, match=rf"answers as classes in 0\.\.5, .* received {int(wrong[0])}\.\."
        ):
            most_damaging(d, moments, classifier, wrong)
    measured: Any = d
    with pytest.raises(TypeError, match="Moments of clean images; received Decomposition; fit them"):
        ablation_sweep(d, measured, classifier)
