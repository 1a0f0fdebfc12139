"""MMD of components: blocks against plain sums over pairs, p-values, streams."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import embed, everything, heads, mlps, neurons
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.mmd import MMD, head_mmd, labellings, layer_mmd, median_distance, statistics
from decompclip.operators.parts import Points
from decompclip.tower.vit import HookedViT

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-9}


def draw(seed: int, n: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def a(tower: HookedViT) -> Decomposition:
    return decompose(tower, draw(1, 9))


@pytest.fixture(scope="module")
def b(tower: HookedViT) -> Decomposition:
    return decompose(tower, 0.5 + 1.5 * draw(2, 9))


def reference(x: Tensor, y: Tensor, kernel: str, *, paired: bool = False) -> float:
    """Plain sums over pairs of terms, as the definitions have them."""
    pooled = torch.cat([x, y]).double().numpy()
    distances = np.array([[np.linalg.norm(u - v) for v in pooled] for u in pooled])
    n, pairs = len(x), sorted(distances[np.tril_indices(len(pooled), -1)])
    sigma = (
        10.0 if kernel == "paper" else pairs[(len(pairs) - 1) // 2]
    )  # torch's median: the lower one of two
    K = np.exp(-(distances**2) / (2 * sigma**2))
    xx, yy, xy = K[:n, :n], K[n:, n:], K[:n, n:]
    if kernel == "paper":
        return 1000 * float(xx.mean() + yy.mean() - 2 * xy.mean())

    def off_diagonal(k: np.ndarray) -> float:
        return float(np.mean([k[i, j] for i in range(len(k)) for j in range(len(k)) if i != j]))

    return off_diagonal(xx) + off_diagonal(yy) - 2 * (off_diagonal(xy) if paired else float(xy.mean()))


@pytest.mark.parametrize("kernel", ["unbiased", "paper"])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_blocks_give_the_sums_over_pairs(
    a: Decomposition, b: Decomposition, kernel: Any, paired: bool, block: int
) -> None:
    b = b if paired else b[:2]
    found = head_mmd(a, b, kernel=kernel, paired=paired, block=block, permutations=0, components=everything)
    assert len(found) == 3 * 4 + 3 + 1
    for layer in range(3):
        for head in range(4):
            expected = reference(a.heads[:, layer, head], b.heads[:, layer, head], kernel, paired=paired)
            assert found[f"heads[{layer}, {head}]"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert float(found.heads[layer, head]) == found[f"heads[{layer}, {head}]"]
        expected = reference(a.mlps[:, layer], b.mlps[:, layer], kernel, paired=paired)
        assert float(found.mlps[layer]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["embed"] == pytest.approx(
        reference(a.embed, b.embed, kernel, paired=paired), rel=1e-4, abs=1e-6
    )


def test_layers_take_their_heads_together(a: Decomposition, b: Decomposition) -> None:
    found = layer_mmd(a, b, permutations=0)
    assert [str(part) for part in found.parts] == [
        f"{kind}[{i}]" for kind in ("heads", "mlps") for i in range(3)
    ]
    for layer in range(3):
        expected = reference(a.heads[:, layer].sum(1), b.heads[:, layer].sum(1), "unbiased")
        assert found[f"heads[{layer}]"] == pytest.approx(expected, rel=1e-4)
        expected = reference(a.mlps[:, layer], b.mlps[:, layer], "unbiased")
        assert found[f"mlps[{layer}]"] == pytest.approx(expected, rel=1e-4)


def test_points_keep_the_distances_of_terms(a: Decomposition) -> None:
    points = Points.of(a, heads)
    for index, part in enumerate(points.parts):
        assert part.layer is not None and part.head is not None
        terms = a.heads[:, part.layer, part.head]
        assert points[index].shape == (9, 8)  # d_head numbers, not d_embed
        torch.testing.assert_close(torch.cdist(points[index], points[index]), torch.cdist(terms, terms))


def test_the_paper_s_kernel_is_ten_times_the_squared_distance_of_means(
    a: Decomposition, b: Decomposition
) -> None:
    small = [d.edit(coords=d.coords / 1e4, mlps=d.mlps / 1e4) for d in (a, b)]
    found = head_mmd(*small, kernel="paper", permutations=19)
    terms = torch.cat([d.heads.double() for d in small])
    first = labellings(9, 9, 19, False, torch.Generator().manual_seed(0)).T.double()
    gaps = torch.einsum("pi,ilhd->plhd", first / 9 - (1 - first) / 9, terms).square().sum(-1)
    torch.testing.assert_close(found.heads, 10 * gaps[0], rtol=1e-3, atol=0)
    assert set(found.bandwidths.tolist()) == {10.0}
    assert found.p_values is not None  # of numbers however small
    p = replace(found, values=found.p_values).heads
    torch.testing.assert_close(p, (gaps >= gaps[0] * (1 - 1e-6)).double().mean(0))


def test_what_all_images_share_costs_no_digits(a: Decomposition, b: Decomposition) -> None:
    """Whole numbers stay exact in fp32 however far they are moved."""
    near = [d.edit(mlps=(8 * d.mlps).round()) for d in (a, b)]
    values = [
        head_mmd(*(d.edit(mlps=d.mlps + shift) for d in near), components=mlps, permutations=0).values
        for shift in (0, 2**20)
    ]
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-12)


def test_the_bandwidth_is_the_median_distance_of_some_images(
    a: Decomposition, b: Decomposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decompclip.operators.mmd.MEDIAN_OF", 5)
    found = [head_mmd(a, b, permutations=0, seed=seed).bandwidths for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    few = torch.tensor([[0.0], [0.0], [0.0], [0.6]])  # half of the distances are zero: their mean
    assert [median_distance(x) for x in (few, 0 * few)] == [pytest.approx(0.3), 1]


@pytest.mark.parametrize("paired", [False, True])
def test_p_values_count_relabellings(a: Decomposition, b: Decomposition, paired: bool) -> None:
    found = head_mmd(a, b, paired=paired, permutations=19, components=heads[1, 2], seed=3)
    labels = labellings(9, 9, 19, paired, torch.Generator().manual_seed(3))
    pooled = torch.cat([a.heads[:, 1, 2], b.heads[:, 1, 2]])
    assert torch.equal(labels[:, 0], torch.arange(18) < 9)
    assert (labels.sum(0) == 9).all()
    values = []
    for column in labels.T:
        if paired:  # as in the labelling, the first of each pair is the one labelled true
            swapped = column[:9]
            assert torch.equal(swapped, ~column[9:])
            x = torch.where(swapped[:, None], pooled[:9], pooled[9:])
            y = torch.where(swapped[:, None], pooled[9:], pooled[:9])
        else:
            x, y = pooled[column], pooled[~column]
        values.append(reference(x, y, "unbiased", paired=paired))
    expected = np.mean([value >= values[0] - 1e-9 for value in values])
    assert found.p_values is not None
    assert float(found.p_values) == pytest.approx(expected)
    assert 0 < expected < 1


def test_adjusted_p_values_are_benjamini_and_hochberg_s(a: Decomposition, b: Decomposition) -> None:
    found = head_mmd(a, b, permutations=99)
    assert found.p_values is not None and found.adjusted is not None
    p = found.p_values.tolist()
    k = len(p)
    for i, value in enumerate(p):
        larger = [q for q in p if q >= value]
        expected = min(1.0, *(q * k / sum(other <= q for other in p) for q in larger))
        assert float(found.adjusted[i]) == pytest.approx(expected)


def test_only_the_part_that_moved_is_significant(a: Decomposition, tower: HookedViT) -> None:
    noise = torch.Generator().manual_seed(4)
    many = decompose(tower, draw(5, 40))
    coords = many.coords + 0.01 * torch.randn(many.coords.shape, generator=noise)
    coords[:, 2, 1] += 4
    found = head_mmd(many, many.edit(coords=coords), components=heads, paired=True, permutations=499)
    assert [str(part) for part in found.significant()] == ["heads[2, 1]"]
    assert found.adjusted is not None
    assert float(found.adjusted[found.parts.index(heads[2, 1])]) == pytest.approx(12 / 500)
    assert head_mmd(a, a, permutations=20).significant(0.9) == ()


@pytest.fixture(scope="module")
def wide(make_tower: Any) -> Decomposition:
    """As many parts as ViT-B: 12 layers of 12 heads, and their MLPs."""
    tower = make_tower(n_layers=12, d_model=48, n_heads=12, d_head=4, d_mlp=16)
    d = decompose(tower, draw(7, 12))
    noise = torch.randn(d.coords.shape, generator=torch.Generator().manual_seed(1))
    return d.edit(coords=d.coords + 0.01 * d.coords.std() * noise)


def test_one_infected_head_of_144_is_told_by_default(wide: Decomposition) -> None:
    coords = wide.coords.clone()
    coords[:, 7, 3] += 50 * coords.std()
    infected = wide.edit(coords=coords)
    found = head_mmd(wide, infected)
    assert len(found) == 156 and found.permutations == 3120
    assert found.least_adjusted == pytest.approx(156 / 3121) and found.least_adjusted <= 0.05
    assert [str(part) for part in found.significant()] == ["heads[7, 3]"]
    assert found.adjusted is not None
    assert float(found.adjusted.min()) == pytest.approx(found.least_adjusted)
    few = head_mmd(wide, infected, permutations=999)
    assert few.significant() == () and "alone at least 0.156)" in repr(few)
    assert few.to_frame()["p"].min() == pytest.approx(1e-3)


def test_the_default_is_999_for_few_parts(a: Decomposition, b: Decomposition) -> None:
    found = head_mmd(a, b, components=heads)
    assert found.permutations == 999 and found.least_adjusted == pytest.approx(12 / 1000)
    assert np.isnan(head_mmd(a, b, permutations=0).least_adjusted)
    assert head_mmd(a, b, permutations=1).least_adjusted == 1


def test_only_small_p_values_take_more_relabellings(a: Decomposition, b: Decomposition) -> None:
    """The others' count the first 999: the p-values of both kinds are those of all labellings so far."""
    mixed = b.edit(coords=torch.cat([b.coords[:, :1], a.coords[:, 1:]], dim=1))
    found = head_mmd(a, mixed, components=heads, permutations=2500, seed=2)
    labels = labellings(9, 9, 2500, False, torch.Generator().manual_seed(2))
    assert found.p_values is not None
    counts = set()
    for part, p, sigma in zip(found.parts, found.p_values.tolist(), found.bandwidths.tolist(), strict=True):
        points = torch.cat([x.heads[:, part.layer, part.head] for x in (a, mixed)]).double()
        values, size = statistics(points - points.mean(0), labels, sigma, 9, True, False, 8)
        assert float(size) == pytest.approx(
            float(1 - torch.cdist(points, points).square().div(-2 * sigma**2).exp().mean())
        )
        large = values >= values[0] - 1e-9
        count = 2501 if int(large[:1000].sum()) <= 100 else 1000
        counts.add(count)
        assert p == pytest.approx(float(large[:count].double().mean()), abs=2e-3)
    assert counts == {1000, 2501}


@pytest.mark.parametrize("field", ["coords", "mlps", "embed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_terms_that_are_not_finite_are_refused(
    a: Decomposition, b: Decomposition, field: str, value: float
) -> None:
    spoilt = getattr(a, field).clone()
    spoilt[4].flatten()[0] = value
    bad = a.edit(**{field: spoilt})
    words = (
        r"finite terms; received nan or inf in those of 1 images, first of image {}; leave these images out"
    )
    with pytest.raises(ValueError, match=words.format(4)):
        head_mmd(a, bad)
    with pytest.raises(ValueError, match=words.format(13)):
        layer_mmd(iter([a, bad]), b)
    with pytest.raises(ValueError, match=words.format(4)):
        Moments.of(bad)
    with pytest.raises(ValueError, match="finite terms"):
        Moments.of(a).merge(Moments.of(bad))


def test_the_same_images_twice_are_no_further_apart_than_chance(a: Decomposition) -> None:
    found = head_mmd(a, a, kernel="paper", permutations=20)
    torch.testing.assert_close(found.values, torch.zeros(15).double(), atol=1e-9, rtol=0)
    assert found.p_values is not None and (found.p_values == 1).all()


@pytest.mark.parametrize("kernel", ["unbiased", "paper"])
@pytest.mark.parametrize("paired", [True, False])
def test_identical_sets_have_a_p_value_of_one(a: Decomposition, kernel: Any, paired: bool) -> None:
    """Every relabelling of pairs that are one image gives the same value, but for its rounding."""
    test = partial(head_mmd, a, a, kernel=kernel, paired=paired, permutations=99)
    for found in (test(), test(components=heads[0] | mlps)):
        assert found.p_values is not None and found.adjusted is not None
        assert found.p_values.min() > 0.9 if not paired else found.p_values.min() == 1
        assert not found.significant(0.5)


def test_terms_that_never_vary_are_not_apart(a: Decomposition) -> None:
    still = a.edit(coords=torch.ones_like(a.coords))
    found = head_mmd(still, still[:5], components=heads, permutations=20)
    assert not found.values.any() and (found.bandwidths == 1).all()
    assert found.p_values is not None and (found.p_values == 1).all()


def test_the_estimate_is_unbiased_and_the_test_keeps_its_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    values, rejected = [], 0
    for seed in range(1000):
        points = torch.randn(24, 3, generator=generator, dtype=torch.float64)
        labels = labellings(12, 12, 39, False, torch.Generator().manual_seed(seed))
        found, _ = statistics(points, labels, 1.5, 12, True, False, 8)
        values.append(float(found[0]))
        rejected += bool((found >= found[0]).double().mean() <= 0.05)
    assert abs(np.mean(values)) < 3 * np.std(values) / 1000**0.5
    assert 30 <= rejected <= 70  # of 1,000 at 5 %: three deviations


def test_streams_and_the_order_of_images_change_nothing(a: Decomposition, b: Decomposition) -> None:
    whole = head_mmd(a, b, permutations=9, paired=True)
    stream = head_mmd((a[i : i + 4] for i in (0, 4, 8)), [b[:1], b[1:]], permutations=9, paired=True)
    torch.testing.assert_close(stream.values, whole.values, **CLOSE)
    assert stream.p_values is not None and whole.p_values is not None
    assert torch.equal(stream.p_values, whole.p_values)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        head_mmd(a[order], b, permutations=0).values, head_mmd(a, b, permutations=0).values
    )
    torch.testing.assert_close(head_mmd(b, a, permutations=0).values, head_mmd(a, b, permutations=0).values)
    again = head_mmd(a, b, permutations=9, paired=True)
    assert torch.equal(again.values, whole.values)


def test_the_result_speaks(a: Decomposition, b: Decomposition) -> None:
    found = head_mmd(a, b, permutations=19, components=heads[-1] | mlps[0] | embed)
    assert repr(found) == (
        "MMD(6 parts, unbiased kernel, 9 and 9 images, 19 permutations, adjusted p of a part alone at least 0.3)"
    )
    frame = found.to_frame()
    assert list(frame.columns) == ["part", "kind", "layer", "head", "mmd", "bandwidth", "p", "p_adjusted"]
    assert frame["mmd"].tolist() == found.values.tolist()
    assert frame["part"].tolist() == [*(f"heads[2, {h}]" for h in range(4)), "mlps[0]", "embed"]
    assert "heads[2, 0]" in found._repr_html_()
    assert found.heads[:2].isnan().all() and not found.heads[2].isnan().any()
    assert [repr(part) for part in found.parts] == frame["part"].tolist()
    for part, missing in ((mlps, "head"), (embed, "layer")):  # numbers that there are none of stay numbers
        bare = head_mmd(a, b, components=part, permutations=0).to_frame()[missing]
        assert str(bare.dtype) == "Int64" and bare.isna().all()
    plain = head_mmd(a, b, permutations=0)
    assert "p" not in plain.to_frame() and "no p-values" in repr(plain)


def test_small_p_values_alone_are_told_by_all_permutations(
    a: Decomposition, b: Decomposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, all_ = (head_mmd(a, b, permutations=n).p_values for n in (19, 99))
    assert few is not None and all_ is not None
    counts = (20 * few).round()
    enough = counts.median()
    assert (few != all_)[counts == enough].any()  # as many are few enough
    monkeypatch.setattr("decompclip.operators.mmd.FIRST", 19)
    monkeypatch.setattr("decompclip.operators.mmd.ENOUGH", int(enough))
    staged = head_mmd(a, b, permutations=99).p_values
    assert staged is not None
    torch.testing.assert_close(staged, torch.where(counts <= enough, all_, few))
    assert (staged != all_).any() and (staged != few).any()


def test_layers_are_measured_as_asked(a: Decomposition, b: Decomposition) -> None:
    found = layer_mmd(a, b, kernel="paper", permutations=19, paired=True, seed=3)
    assert (found.kernel, found.permutations, found.paired, found.seed) == ("paper", 19, True, 3)
    assert layer_mmd(a, b[:4], permutations=0).counts == (9, 4)
    with pytest.raises(ValueError, match="received permutations=0, block=0"):
        layer_mmd(a, b, permutations=0, block=0)


def test_figures_show_the_values(a: Decomposition, b: Decomposition) -> None:
    found = head_mmd(a, b, permutations=39)
    plot: Any = found.figure()
    traces = plot.data
    assert plot.layout.coloraxis.cmin == 0 and found.bandwidths.dtype == torch.float64
    assert plot.layout.coloraxis.cmax == pytest.approx(float(found.values.abs().max()))
    np.testing.assert_array_equal(traces[0].customdata, replace(found, values=found.adjusted).heads.numpy())
    assert "adjusted p" in traces[0].hovertemplate
    assert plot.layout.coloraxis.colorbar.title.text == "MMD² (unbiased)"
    grids = [trace.z for trace in traces if trace.type == "heatmap"]
    np.testing.assert_array_equal(grids[0], found.heads.numpy())
    np.testing.assert_array_equal(grids[1][:, 0], found.mlps.numpy())
    marked = [trace for trace in traces if trace.type == "scatter"]
    assert sum(len(trace.x) for trace in marked) == len(found.significant())
    ends = replace(found, adjusted=torch.where(torch.arange(len(found)) % 2 > 0, 0.05, 0.051))
    drawn: Any = ends.figure()
    ringed = [trace for trace in drawn.data if trace.type == "scatter"]
    assert sum(len(trace.x) for trace in ringed) == len(ends.significant()) == len(found) // 2
    values = [found[part] for part in ends.significant()]
    assert values == sorted(values, reverse=True)
    layers = layer_mmd(a, b, permutations=39)
    assert layers.heads.isnan().all() and torch.equal(layers.mlps, layers.values[3:])
    plot = layers.figure()
    curves = plot.data
    assert (plot.layout.xaxis.title.text, plot.layout.yaxis.title.text) == ("layer", "MMD² (unbiased)")
    assert plot.layout.xaxis.dtick == 1 and list(plot.layout.xaxis.domain) == [0, 1]
    for least, low in ((-0.2, -0.22), (0.1, 0)):  # zero is shown, and a little more than the values
        spread = torch.linspace(least, 0.5, 6, dtype=torch.float64)
        edge: Any = replace(layers, values=spread, adjusted=0.05 + 0 * spread).figure()
        assert edge.layout.yaxis.range == pytest.approx((low, 0.54))
        assert not any(str(symbol).endswith("-open") for curve in edge.data for symbol in curve.marker.symbol)
    assert [list(curve.y) for curve in curves] == [layers.values[:3].tolist(), layers.values[3:].tolist()]
    assert [list(curve.x) for curve in curves] == [[0, 1, 2]] * 2
    open_ = sum(str(symbol).endswith("-open") for curve in curves for symbol in curve.marker.symbol)
    assert open_ == 6 - len(layers.significant())
    some: Any = head_mmd(a, b, components=heads[0], permutations=0).figure().data
    assert len(some) == 2  # no marks without p-values


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(a: Decomposition, b: Decomposition, tower: HookedViT, make_tower: Any) -> None:
    def fails(kind: type[Exception], words: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            head_mmd(*args, **options)

    fails(ValueError, r"expected kernel of \('unbiased', 'paper'\); received 'rbf'", a, b, kernel="rbf")
    fails(ValueError, "received permutations=-1, block=1024", a, b, permutations=-1)
    fails(ValueError, "two images a side; received 1 and 9; add images", a[:1], b)
    fails(
        ValueError,
        "paired images, as many on either side; received 8 and 9; leave out",
        a[:8],
        b,
        paired=True,
    )
    fails(ValueError, "at least one image; received none; check the image source", [], b)
    fails(TypeError, r"as model\.decompose\(images\) gives; received a Tensor", [a.coords], b)
    fails(TypeError, r"components such as heads\[-1\] \| mlps; received 'heads'", a, b, components="heads")
    fails(IndexError, "received layer 3", a, b, components=heads[3])
    fails(ValueError, "which names none", a, b, components=heads - heads)
    fails(ValueError, "names neurons; edit those with AblateNeurons", a, b, components=neurons[0])
    other = decompose(make_tower(seed=8, layer_scale=True), draw(1, 4))
    fails(ValueError, "terms of one model; received those of another", a, other)
    fails(ValueError, "decompose all images with the same model", [a, other], b)
    paper = decompose(tower, draw(1, 4), convention="paper")
    fails(ValueError, "convention='centred', as those before; received convention='paper'", a, paper)
    unit = decompose(tower, draw(1, 4), normalize=True)
    fails(ValueError, "normalize=False, as those before; received normalize=True", a, unit)
    found: MMD = head_mmd(a, b, components=mlps, permutations=0)
    with pytest.raises(
        KeyError, match=r"the 3 parts measured, mlps\[0\] .. mlps\[2\]; received heads\[0, 0\]"
    ):
        found["heads[0, 0]"]
    with pytest.raises(ValueError, match="p-values to choose by; received a result without"):
        found.significant()


def test_towers_with_an_attention_pool(make_tower: Any) -> None:
    """There coordinates are the terms, and the pool's MLP is a part of its own."""
    tower = make_tower(pool="attention", pool_heads=2, pool_mlp=24, n_prefix=0, projection=False, d_embed=32)
    a, b = (decompose(tower, x) for x in (draw(1, 6), 2 * draw(2, 6)))
    found = head_mmd(a, b, components=everything, permutations=0)
    assert [str(part) for part in found.parts[-2:]] == ["embed", "pool"]
    for name, x, y in (
        ("pool", a.pool[:, 0], b.pool[:, 0]),
        ("heads[1, 2]", a.heads[:, 1, 2], b.heads[:, 1, 2]),
    ):
        assert found[name] == pytest.approx(reference(x, y, "unbiased"), rel=1e-4)
    together = reference(a.heads[:, 1].sum(1), b.heads[:, 1].sum(1), "unbiased")
    assert layer_mmd(a, b, permutations=0)["heads[1]"] == pytest.approx(together, rel=1e-4)
