"""Moments: the streamed ones are those of all images at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.decomposition import batches
from decompclip.decomposition.moments import Moments, check_finite, double
from decompclip.tower.vit import HookedViT


def many(n: int = 24) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(2))


def assert_same(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    for name in ("coords", "mlps", "embed", "bias_coords"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-7)
    for name in ("coords", "mlps", "embed"):
        torch.testing.assert_close(a.covariance(name), b.covariance(name), rtol=1e-4, atol=1e-7)
    assert (a.streams is None) == (b.streams is None)
    if a.streams is not None and b.streams is not None:
        for name in ("z", "mlp_out", "embed"):
            torch.testing.assert_close(
                getattr(a.streams, name), getattr(b.streams, name), rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_moments_are_means_and_covariances(tower: HookedViT, convention) -> None:
    d = decompose(tower, many(), convention=convention, normalize=True)
    moments = Moments.of(d)
    torch.testing.assert_close(moments.coords, d.coords.double().mean(0))
    torch.testing.assert_close(moments.heads, d.heads.double().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.features, d.features.double().mean(0), rtol=1e-4, atol=1e-6)
    assert moments.scatter is not None and set(moments.scatter) == {"coords", "mlps", "embed", "pool"}
    x = d.mlps[:, 1].double()
    torch.testing.assert_close(moments.covariance("mlps")[1], torch.cov(x.T, correction=0))
    assert_same(
        Moments.fit(tower, many().split(9), convention=convention, normalize=True, stream=False), moments
    )


@given(cuts=st.lists(st.integers(1, 23), max_size=4, unique=True))
@settings(deadline=None, max_examples=15)
def test_any_batches_give_the_same(cuts: list[int], tower: HookedViT) -> None:
    images = many()
    edges = [0, *sorted(cuts), len(images)]
    parts = [images[a:b] for a, b in itertools.pairwise(edges)]
    assert_same(Moments.fit(tower, parts), Moments.fit(tower, [images]))


def test_merging_is_the_union_in_any_order(tower: HookedViT) -> None:
    a, b, c = (Moments.fit(tower, [part]) for part in many().split([3, 14, 7]))
    assert_same(a.merge(b).merge(c), c.merge(a.merge(b)))
    assert_same(a.merge(b).merge(c), Moments.fit(tower, [many()]))
    d = decompose(tower, many()[3:17])
    assert_same(
        Moments.of(decompose(tower, many()[:3])).merge(Moments.of(d)),
        Moments.of(decompose(tower, many()[:17])),
    )


def test_what_one_side_lacks_the_union_lacks(tower: HookedViT) -> None:
    images = many()
    whole = Moments.fit(tower, [images[:9]])
    plain = Moments.fit(tower, [images[9:]], second=False, stream=False)
    for union in (whole.merge(plain), plain.merge(whole)):
        assert union.count == 24 and union.scatter is None and union.streams is None
        torch.testing.assert_close(union.features, Moments.fit(tower, [images]).features)


def test_maps_of_unknown_origin_are_known_by_their_numbers(tower: HookedViT) -> None:
    maps = Moments.fit(tower, [many()]).maps
    unknown = replace(maps, fingerprint=None)
    assert maps.matches(unknown) and unknown.matches(maps) and unknown.matches(replace(unknown))
    assert maps.matches(replace(unknown, heads=1.0009 * maps.heads))  # a thousandth may be rounding
    assert not maps.matches(replace(unknown, heads=1.0011 * maps.heads))
    silent = replace(unknown, heads=0 * maps.heads)
    assert silent.matches(replace(silent))


def test_stream_means_are_the_hooks_means(tower: HookedViT) -> None:
    images = many()
    streams = Moments.fit(tower, images.split(5)).streams
    _, cache = tower.run_with_cache(images)
    assert streams is not None
    for layer in range(3):
        z, mlp = (cache[name, layer].double().mean(0) for name in ("z", "mlp_out"))
        torch.testing.assert_close(streams.z[layer], z, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(streams.mlp_out[layer], mlp, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(streams.embed, cache["hook_ln_pre"].double().mean(0), rtol=1e-4, atol=1e-6)


def test_a_common_offset_does_not_cancel(tower: HookedViT) -> None:
    """E[x^2] - E[x]^2 in fp32 would lose everything here."""
    d = decompose(tower, many())
    far = d.edit(mlps=d.mlps.double().add(1e7).to(d.mlps.dtype))
    expected = torch.cov(far.mlps[:, 0].double().T, correction=0)
    torch.testing.assert_close(Moments.of(far).covariance("mlps")[0], expected, rtol=1e-9, atol=1e-9)


def test_errors_say_what_to_do(make_tower: Callable[..., HookedViT], tower: HookedViT) -> None:
    moments = Moments.fit(tower, [many()], second=False, stream=False)
    with pytest.raises(ValueError, match="moments with second moments.*second=True"):
        moments.covariance("mlps")
    with pytest.raises(ValueError, match="expected batches of images; received none"):
        Moments.fit(tower, [])
    with pytest.raises(TypeError, match="expected a decomposition, as .* received a Tensor"):
        Moments.of(iter([many()]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least one image; received an empty one"):
        Moments.of(decompose(tower, many())[:0])
    with pytest.raises(ValueError, match=r"convention='centred'.*received convention='paper'"):
        moments.check(decompose(tower, many(), convention="paper"))
    with pytest.raises(ValueError, match=r"normalize=False.*received normalize=True"):
        moments.check(decompose(tower, many(), normalize=True))
    with pytest.raises(
        ValueError, match=r"maps \[layer, head, coord, d_embed\] = \[3, 4, 8, 20\].*\[2, 4, 8, 20\]"
    ):
        moments.check(decompose(make_tower(n_layers=2), many()))
    with pytest.raises(ValueError, match="same shape with other weights"):
        moments.check(decompose(make_tower(seed=9, layer_scale=True), many()))


@pytest.mark.usefixtures("ours_alone")
def test_terms_are_taken_one_by_one_of_one_or_several(tower: HookedViT) -> None:
    d = decompose(tower, many())
    assert [*batches(d)] == [d] and [*batches([d, d])] == [d, d]
    for wrong, kind in ((many(), "Tensor"), (tower, "HookedViT")):
        with pytest.raises(TypeError, match=rf"as model.decompose\(images\) gives; received a {kind}"):
            next(batches(wrong))  # pyright: ignore[reportArgumentType]


def test_numbers_in_full_stay_on_their_device() -> None:
    found = double(torch.ones(2, device="meta"))
    assert (found.device.type, found.dtype) == ("meta", torch.float64)


def test_an_image_without_numbers_is_named(tower: HookedViT) -> None:
    d = decompose(tower, many())
    mlps = d.mlps.clone()
    mlps[[7, 9], 1] = torch.inf
    with pytest.raises(ValueError, match="those of 2 images, first of image 7; leave"):
        check_finite(d.edit(mlps=mlps))
    check_finite(d)


def test_its_shape_is_the_towers(tower: HookedViT) -> None:
    moments = Moments.fit(tower, [many()])
    assert (moments.n_layers, moments.n_heads, moments.has_pool) == (3, 4, False)
    assert moments.heads.shape == (3, 4, 20)


def test_it_reads_well(tower: HookedViT) -> None:
    assert "24 images, 3 x 4 heads, centred; means and second and streams" in repr(
        Moments.fit(tower, [many()])
    )


def test_one_tensor_is_no_batches(ours_alone: None, tower: HookedViT) -> None:
    with pytest.raises(
        ValueError, match=r"received one tensor \[24, 3, 24, 16\]; a single batch is \[images\]"
    ):
        Moments.fit(tower, many())
