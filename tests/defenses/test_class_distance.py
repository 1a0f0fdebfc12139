"""The distance of a point to its class: what it is, and what shrinkage makes of it."""

from __future__ import annotations

import pytest
import torch
from sklearn.covariance import empirical_covariance, oas

from decompclip.defenses.distances import ClassDistance, ClassSums, oas_shrinkage, whitener


def points(n: int, dim: int, components: int = 1, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(components, dim, dim, generator=g, dtype=torch.float64)
    return torch.einsum(
        "ncd,cde->nce", torch.randn(n, components, dim, generator=g, dtype=torch.float64), mixing
    )


@pytest.mark.parametrize(("n", "dim"), [(12, 8), (50, 8), (5, 20)])
def test_the_shrinkage_is_scikit_learn_s(n: int, dim: int) -> None:
    x = points(n, dim)[:, 0]
    covariance = torch.from_numpy(empirical_covariance(x.numpy()))
    shrunk, expected = oas(x.numpy())
    assert oas_shrinkage(covariance[None], n).item() == pytest.approx(expected, rel=1e-9)
    white = whitener(covariance[None], n)[0]
    assert torch.allclose(white @ white, torch.linalg.inv(torch.from_numpy(shrunk)), rtol=1e-6)


def test_a_nearly_round_covariance_is_made_round_and_no_more() -> None:
    nearly = torch.diag(torch.tensor([1.0, 1.01]).double())
    for size in (1e-3, 1.0, 1e3):
        assert oas_shrinkage(size * nearly[None], 3).item() == 1
        long = torch.diag(torch.tensor([1.0, 9.0]).double())
        spread, scale = 82 / 4, 5.0
        expected = (spread + scale**2) / (101 * (spread - scale**2 / 2))
        assert oas_shrinkage(size * long[None], 100).item() == pytest.approx(expected)


def test_each_component_is_whitened_in_its_own_units() -> None:
    covariances = torch.eye(3).double() * torch.tensor([1.0, 1e-12, 1e12]).double()[:, None, None]
    found = whitener(covariances, 50) * torch.tensor([1.0, 1e-6, 1e6]).double()[:, None, None]
    torch.testing.assert_close(found, torch.eye(3).double().expand(3, 3, 3))


def test_it_is_mahalanobis_to_the_class_s_mean() -> None:
    x, classes = points(400, 5), torch.arange(400) % 4
    x[:, 0] += classes[:, None].double() * 3
    fitted = ClassDistance.fit(x, classes, 4, pseudo_count=0.0)
    means = torch.stack([x[classes == k, 0].mean(0) for k in range(4)])
    assert torch.allclose(fitted.means[:, 0], means)
    rest = x[:, 0] - means[classes]
    shrunk, _ = oas(rest.numpy(), assume_centered=True)
    slow = [(r @ torch.linalg.inv(torch.from_numpy(shrunk)) @ r / 5).item() for r in rest]
    assert torch.allclose(fitted(x, classes)[:, 0], torch.tensor(slow, dtype=torch.float64), rtol=1e-6)


def test_components_do_not_touch_each_other() -> None:
    x, classes = points(60, 4, components=3), torch.arange(60) % 2
    together = ClassDistance.fit(x, classes, 2)(x, classes)
    for c in range(3):
        alone = ClassDistance.fit(x[:, c : c + 1], classes, 2)(x[:, c : c + 1], classes)
        assert torch.allclose(together[:, c], alone[:, 0])


def test_it_does_not_matter_in_what_coordinates_points_are_given() -> None:
    """As long as nothing is shrunk away: many points, no pseudo-counts."""
    x, classes = points(20_000, 3), torch.zeros(20_000, dtype=torch.long)
    map_ = torch.tensor([[2.0, 0.3, 0.0], [0.0, 0.5, 0.1], [0.2, 0.0, 1.0]], dtype=torch.float64)
    one, other = (ClassDistance.fit(p, classes, 1)(p, classes) for p in (x, x @ map_))
    assert torch.allclose(one, other, rtol=0.02)


def test_a_class_of_few_points_stays_close_to_the_common_mean() -> None:
    x = torch.zeros(101, 1, 2, dtype=torch.float64)
    x[:100, 0] = points(100, 2)[:, 0]
    x[100] = 50.0
    classes = torch.tensor([0] * 100 + [1])
    fitted = ClassDistance.fit(x, classes, 3, pseudo_count=5.0)
    common = x[:, 0].mean(0)
    assert torch.allclose(fitted.means[1, 0], common + (x[100, 0] - common) / 6)
    assert torch.allclose(fitted.means[2, 0], common)  # a class that was never seen


def test_directions_without_spread_do_no_harm() -> None:
    x = points(50, 3)
    x[..., 2] = 0
    classes = torch.zeros(50, dtype=torch.long)
    assert ClassDistance.fit(x, classes, 1)(x, classes).isfinite().all()
    assert whitener(torch.zeros(1, 3, 3, dtype=torch.float64), 10).abs().max() == 0


def test_one_point_has_no_spread() -> None:
    with pytest.raises(ValueError, match=r"at least 2 points; received 1; fit on more"):
        ClassDistance.fit(torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.long), 1)
    two = ClassDistance.fit(torch.eye(2)[:, None], torch.zeros(2, dtype=torch.long), 1)
    assert two.means.tolist() == [[[0.5, 0.5]]] and two.whitener.isfinite().all()


def test_sums_less_a_fold_s_are_those_of_the_others() -> None:
    """Held to the points themselves: means of classes drawn to the common one, and the spread about them."""
    x, classes = points(90, 6, components=2) + 100, torch.arange(90) ** 2 % 7
    x += classes[:, None, None].double()
    out, n_classes = torch.arange(90) % 5 == 1, 9
    whole = ClassSums.of(x, classes, n_classes)
    found = (whole - ClassSums.of(x[out], classes[out], n_classes, origin=whole.origin)).distance(2.0)
    kept, own = x[~out], classes[~out]
    common = kept.mean(0)
    means = torch.stack(
        [common + (kept[own == k] - common).sum(0) / ((own == k).sum() + 2) for k in range(n_classes)]
    )
    rest = kept - means[own]
    spread = torch.einsum("ncd,nce->cde", rest, rest) / len(rest)
    assert torch.allclose(found.means, means, rtol=1e-12)
    assert torch.allclose(found.whitener, whitener(spread, len(rest)), rtol=1e-8)


def test_sums_of_parts_are_those_of_all() -> None:
    x, classes = points(90, 6, components=2) + 100, torch.arange(90) ** 2 % 7
    whole = ClassSums.of(x, classes, 7)
    first, *others = (
        ClassSums.of(x[i : i + 40], classes[i : i + 40], 7, origin=whole.origin) for i in range(0, 90, 40)
    )
    for part in others:
        first += part
    for name, expected in vars(whole).items():
        assert torch.allclose(getattr(first, name), expected, rtol=1e-10, atol=1e-9), name


def test_sums_of_mapped_points() -> None:
    x, classes = points(40, 5), torch.arange(40) % 3
    map_ = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    shift = torch.arange(4.0).double()
    mapped = ClassSums.of(x, classes, 3).mapped(map_, shift).distance()
    plain = ClassDistance.fit(x @ map_ + shift, classes, 3)
    assert torch.allclose(mapped.means, plain.means) and torch.allclose(mapped.whitener, plain.whitener)
