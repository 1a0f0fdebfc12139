"""Activation, path and attribution patching, against plain references."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import heads, mlps
from decompclip.models.bundled import load_bundled
from decompclip.operators.effects import path_patching
from decompclip.operators.patching import POINTS, Patching, activation_patching, attribution_patching
from decompclip.tower.vit import HookedViT

SITES: Any = tuple(POINTS)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def source() -> Tensor:
    return torch.randn(5, 3, 24, 16, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def direction() -> Tensor:
    return torch.randn(20, generator=torch.Generator().manual_seed(3))


def score(features: Tensor, direction: Tensor) -> Tensor:
    return F.normalize(features, dim=-1) @ direction


@torch.no_grad()
def plain(tower: HookedViT, base: Tensor, name: str, value: Tensor, direction: Tensor) -> float:
    """One patch, of a whole activation."""
    with tower.hooks(fwd_hooks=[(name, lambda x, hook: value)]):
        patched = tower(base)
    return float((score(patched, direction) - score(tower(base), direction)).mean())


def test_each_effect_is_that_of_one_patch(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    result = activation_patching(tower, images, source, direction)
    tokens = activation_patching(tower, images, source, direction, sites=("mlp_out", "z"), by_token=True)
    _, ours = tower.run_with_cache(images)
    _, theirs = tower.run_with_cache(source)
    for site, point in POINTS.items():
        for layer in range(3):
            name = f"blocks.{layer}.{point}"
            if site != "z":
                expected = plain(tower, images, name, theirs[name], direction)
                assert float(result.effects[site][layer]) == pytest.approx(expected, abs=1e-6)
                continue
            mixed = ours[name].clone()
            mixed[:, :, 1] = theirs[name][:, :, 1]
            expected = plain(tower, images, name, mixed, direction)
            assert float(result.effects["z"][layer, 1]) == pytest.approx(expected, abs=1e-6)
            mixed = ours[name].clone()
            mixed[:, 4, 1] = theirs[name][:, 4, 1]
            expected = plain(tower, images, name, mixed, direction)
            assert float(tokens.effects["z"][layer, 1, 4]) == pytest.approx(expected, abs=1e-6)
    name = "blocks.1.hook_mlp_out"
    mixed = ours[name].clone()
    mixed[:, 3] = theirs[name][:, 3]
    assert float(tokens.effects["mlp_out"][1, 3]) == pytest.approx(
        plain(tower, images, name, mixed, direction), abs=1e-6
    )
    unread, read = tokens.effects["mlp_out"][2, 1:], tokens.effects["mlp_out"][2, 0]
    assert float(unread.abs().max()) < 1e-6 < abs(float(read))


def test_the_whole_stream_carries_the_whole_gap(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    there = activation_patching(
        tower, images, source, direction, sites=("resid_pre", "resid_mid", "resid_post")
    )
    back = activation_patching(tower, source, images, direction, sites=("resid_pre",))
    for effects in there.effects.values():
        torch.testing.assert_close(effects, torch.full((3,), there.gap), **CLOSE)
    assert back.gap == pytest.approx(-there.gap)
    torch.testing.assert_close(there.shares("resid_mid"), torch.ones(3), **CLOSE)
    assert torch.tensor([*there.correlation(there).values()]).isnan().all()
    none = activation_patching(tower, images, images, direction)
    assert all(float(effects.abs().max()) < 1e-6 for effects in none.effects.values())


def test_effects_that_differ_by_rounding_alone_correlate_with_nothing() -> None:
    noise = 1e-7 * torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat, other, varied = (
        Patching({"mlp_out": x}, torch.ones(2), torch.ones(2), False, "exact")
        for x in (1e3 * (1 + noise[0]), 5 + noise[1], torch.arange(3.0).double())
    )
    for one, two in ((flat, other), (flat, varied), (varied, flat)):
        assert np.isnan(one.correlation(two)["mlp_out"])
    assert varied.correlation(varied)["mlp_out"] == pytest.approx(1)


def test_what_is_cut_off_from_the_score_has_no_effect(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    with tower.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x.detach())]):
        found = attribution_patching(tower, images, source, direction, sites=("mlp_out",)).effects["mlp_out"]
    assert found[0] == 0 and bool((found[1:] != 0).all())


def test_attribution_is_exact_where_all_behind_it_is_linear(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    """Behind the last MLP stands a LayerNorm alone; at a frozen scale, and a linear score, nothing bends."""
    scales: list[Tensor] = []
    with tower.hooks(fwd_hooks=[("ln_final.hook_scale", lambda s, hook: scales.append(s.clone()))]):
        tower(images)
    with tower.hooks(fwd_hooks=[("ln_final.hook_scale", lambda s, hook: scales[0].detach())]):
        pair = [
            patch(
                tower,
                images,
                source,
                lambda features: features @ direction,
                sites=("mlp_out",),
                by_token=True,
            )
            for patch in (activation_patching, attribution_patching)
        ]
    torch.testing.assert_close(pair[0].effects["mlp_out"][-1], pair[1].effects["mlp_out"][-1], **CLOSE)


@pytest.mark.parametrize("by_token", [False, True])
def test_attribution_approaches_the_exact_effects_of_small_changes(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor, by_token: bool
) -> None:
    near = images + 1e-2 * (source - images)
    sites: Any = ("attn_out", "mlp_out", "z")
    exact = activation_patching(tower, images, near, direction, sites=sites, by_token=by_token)
    estimate = attribution_patching(tower, images, near, direction, sites=sites, by_token=by_token)
    found = exact.correlation(estimate)
    assert list(found) == list(sites) and min(found.values()) > 0.99
    for site in sites:
        assert exact.effects[site].shape == estimate.effects[site].shape
        scale = float(exact.effects[site].abs().max())
        torch.testing.assert_close(exact.effects[site], estimate.effects[site], rtol=0, atol=0.1 * scale)
    assert (exact.method, estimate.method) == ("exact", "attribution")
    far = activation_patching(tower, images, source, direction, sites=sites, by_token=by_token)
    rough = attribution_patching(tower, images, source, direction, sites=sites, by_token=by_token)
    correlations = far.correlation(rough)
    assert list(correlations) == list(sites)
    # Of unrelated images: no longer exact, and still no noise.
    assert 0.4 < min(correlations.values()) < 0.99
    for site in sites:
        whole = torch.stack([far.effects[site].flatten(), rough.effects[site].flatten()])
        assert correlations[site] == pytest.approx(float(np.corrcoef(whole.numpy())[0, 1]), abs=1e-4)


@pytest.mark.parametrize("by_token", [False, True])
def test_an_estimate_can_be_checked_at_a_few_places(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor, by_token: bool
) -> None:
    sites: Any = ("mlp_out", "z")
    exact = activation_patching(tower, images, source, direction, sites=sites, by_token=by_token)
    options: Any = {"sites": sites, "by_token": by_token}
    result = attribution_patching(tower, images, source, direction, **options, check=6)
    plainly = attribution_patching(tower, images, source, direction, **options)
    assert len({(site, place) for site, place, _ in result.checks}) == 6
    pairs = []
    for site, place, effect in result.checks:
        assert effect == pytest.approx(float(exact.effects[site][place]), abs=1e-6)
        pairs.append((float(plainly.effects[site][place]), effect))
    sizes = [abs(estimate) for estimate, _ in pairs]
    every = torch.cat([effect.flatten().abs() for effect in result.effects.values()])
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (float(every.max()), float(every.min()))
    assert result.agreement == pytest.approx(float(np.corrcoef(np.array(pairs).T)[0, 1]), abs=1e-4)
    assert f"attribution, correlation {result.agreement:.2f} with 6 exact runs: mlp_out" in repr(result)
    frame = result.to_frame()
    assert sorted(frame["exact"].dropna()) == sorted(effect for _, _, effect in result.checks)
    assert "exact" not in plainly.to_frame() and plainly.agreement != plainly.agreement
    many = attribution_patching(tower, images, source, direction, sites=("mlp_out",), check=99)
    assert len(many.checks) == 3
    for check in (-1, 1, 2):
        with pytest.raises(
            ValueError, match=f"a check of at least 3 places, or of 0 for none; received {check}; two places"
        ):
            attribution_patching(tower, images, source, direction, check=check)


def test_a_path_is_what_the_receiver_alone_hears(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    """By hand: the last MLP reads a stream that differs by the sender's write, and only its own write changes."""
    result = path_patching(tower, images, source, direction, heads[0, 2])
    _, ours = tower.run_with_cache(images)
    _, theirs = tower.run_with_cache(source)
    block: Any = tower.blocks[0]
    told = ((theirs["z", 0] - ours["z", 0])[:, :, 2] @ block.attn.W_O[2]) * block.ls1
    for layer in range(3):
        receiver: Any = tower.blocks[layer]
        answer = receiver.mlp(receiver.ln2(ours["resid_mid", layer] + told)) * receiver.ls2
        expected = plain(tower, images, f"blocks.{layer}.hook_mlp_out", answer, direction)
        assert float(result.mlps[layer]) == pytest.approx(expected, abs=1e-6)
        if layer:
            captured: list[Tensor] = []
            with tower.hooks(
                fwd_hooks=[(f"blocks.{layer}.attn.hook_z", lambda z, hook, c=captured: c.append(z.clone()))]
            ):
                receiver.attn(receiver.ln1(ours["resid_pre", layer] + told))
            mixed = ours["z", layer].clone()
            mixed[:, :, 3] = captured[0][:, :, 3]
            expected = plain(tower, images, f"blocks.{layer}.attn.hook_z", mixed, direction)
            assert float(result.heads[layer, 3]) == pytest.approx(expected, abs=1e-6)
    assert result.heads[0].isnan().all() and not result.heads[1:].isnan().any()


def test_paths_of_a_head_that_says_nothing_new_have_no_effect(
    tower: HookedViT, images: Tensor, direction: Tensor
) -> None:
    result = path_patching(tower, images, images, direction, heads[1, 0], receivers=heads[2, :2] | mlps)
    assert result.mlps[0].isnan() and result.heads[2, 2:].isnan().all()
    known = torch.cat([result.mlps[1:], result.heads[2, :2]])
    assert float(known.abs().max()) < 1e-6


def test_results_are_tables_and_maps(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    for by_token in (False, True):
        result = attribution_patching(tower, images, source, direction, by_token=by_token)
        frame = result.to_frame()
        n = 7 if by_token else 1
        assert len(frame) == 5 * 3 * n + 3 * 4 * n
        row = frame[(frame.site == "z") & (frame.layer == 2) & (frame["head"] == 1)].iloc[0]
        place = (2, 1, 0) if by_token else (2, 1)
        assert row.effect == float(result.effects["z"][place])
        assert row.share == pytest.approx(row.effect / result.gap)
        plot = result.figure()
        assert isinstance(plot, go.Figure)
        maps: list[Any] = list(plot.data)
        assert len(maps) == len(SITES)
        assert maps[-1].z[2][1 if not by_token else 7] == pytest.approx(row.share, rel=1e-4)
        tokens = [str(token) for token in range(7)] if by_token else [""]
        units = [f"{head}.{token}" if by_token else str(head) for head in range(4) for token in tokens]
        assert [list(grid.x) for grid in maps] == [*([tokens] * 5), units]
        xaxes: list[Any] = [*plot.select_xaxes()]
        axes = [axis.title.text or "" for axis in xaxes]
        assert axes == ["token" * by_token] * 5 + ["head.token" if by_token else "head"]
        assert "attribution" in repr(result) and "resid_pre" in result._repr_html_()
    path = path_patching(tower, images, source, direction, heads[1, 0])
    frame = path.to_frame()
    assert list(zip(frame["layer"], frame["head"].fillna(-1), strict=True)) == [
        *((2, head) for head in range(4)), (1, -1), (2, -1)
    ]  # fmt: skip
    effects = [*path.heads[2].tolist(), *path.mlps[1:].tolist()]
    assert frame["effect"].tolist() == effects
    assert frame["share"].tolist() == pytest.approx([effect / path.gap for effect in effects])
    plot = path.figure()
    assert isinstance(plot, go.Figure) and "heads[1, 0]" in str(plot.layout.title.text)  # pyright: ignore
    words = "change of the score"
    assert plot.layout.coloraxis.colorbar.title.text == words  # pyright: ignore
    for shares, unit, scale in ((True, "share of the gap", 1 / result.gap), (False, words, 1.0)):
        drawn: Any = result.figure(shares=shares)
        assert drawn.layout.coloraxis.colorbar.title.text == unit
        grids = [torch.tensor(grid.z).flatten() for grid in drawn.data]
        for grid, effect in zip(grids, result.effects.values(), strict=True):
            torch.testing.assert_close(grid, scale * effect.flatten(), **CLOSE)
        assert drawn.layout.coloraxis.cmax == pytest.approx(float(torch.cat(grids).abs().max()))
    assert plot.layout.coloraxis.cmin == -plot.layout.coloraxis.cmax  # pyright: ignore
    assert repr(path) == "PathPatching(heads[1, 0] to 6 receivers, 5 images)"


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor) -> None:
    for patch in (activation_patching, attribution_patching):
        with pytest.raises(ValueError, match=r"sites of \('resid_pre', .*\); received 'q'"):
            patch(tower, images, source, direction, sites=("q",))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="received 5 base and 4 source images; pair them first"):
            patch(tower, images, source[:4], direction)
        with pytest.raises(
            ValueError, match=r"a direction \[20\], as wide as the joint space; received \[19\]"
        ):
            patch(tower, images, source, direction[:19])
        single: Any = [images[0]]
        with pytest.raises(ValueError, match=r"expected base as batches of images .* received \[3, 24, 16\]"):
            patch(tower, single, single, direction)
        with pytest.raises(ValueError, match="both as one batch or both as batches"):
            patch(tower, [images], source, direction)
        with pytest.raises(ValueError, match="at least one batch"):
            patch(tower, [], [], direction)
        with pytest.raises(ValueError, match=r"expected source as batches .* received \[3, 24, 16\]"):
            patch(tower, images, source[0], direction)
    with pytest.raises(ValueError, match=r"a direction \[20\], as wide as the joint space; received \[19\]"):
        path_patching(tower, images, source, direction[:19], heads[0, 1])
    for sender in (heads[0], mlps[0], heads[0, 1] | mlps[0]):
        with pytest.raises(ValueError, match=r"one head as the sender, such as heads\[3, 1\]; received"):
            path_patching(tower, images, source, direction, sender)  # pyright: ignore[reportArgumentType]
    one = Patching({"z": torch.ones(3, 4)}, torch.ones(2), torch.ones(2), False, "exact")
    two = Patching({"z": torch.ones(3, 4, 7)}, torch.ones(2), torch.ones(2), True, "exact")
    with pytest.raises(ValueError, match=r"effects \[3, 4\] of z, .* received \[3, 4, 7\]; patch both"):
        one.correlation(two)


@pytest.mark.parametrize("by_token", [False, True])
def test_a_stream_of_batches_is_one_batch(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor, by_token: bool
) -> None:
    ours, theirs = images.split([2, 3]), source.split([2, 3])
    for patch in (activation_patching, attribution_patching):
        whole = patch(tower, images, source, direction, sites=("mlp_out", "z"), by_token=by_token)
        parts = patch(tower, ours, iter(theirs), direction, sites=("mlp_out", "z"), by_token=by_token)
        for site, effects in whole.effects.items():
            torch.testing.assert_close(parts.effects[site], effects, **CLOSE)
        torch.testing.assert_close(parts.base, whole.base)
        assert parts.gap == pytest.approx(whole.gap, abs=1e-6)
    whole = path_patching(tower, images, source, direction, heads[0, 1])
    parts = path_patching(tower, ours, theirs, direction, heads[0, 1])
    torch.testing.assert_close(parts.heads, whole.heads, equal_nan=True, **CLOSE)
    torch.testing.assert_close(parts.mlps, whole.mlps, equal_nan=True, **CLOSE)


def test_results_of_different_places_do_not_merge(
    tower: HookedViT, images: Tensor, source: Tensor, direction: Tensor
) -> None:
    z, mlp = (
        activation_patching(tower, images, source, direction, sites=(site,)) for site in ("z", "mlp_out")
    )
    with pytest.raises(ValueError, match="the same places in the same way"):
        z.merge(mlp)
    a, b = (path_patching(tower, images, source, direction, heads[0, i], receivers=mlps) for i in (0, 1))
    with pytest.raises(ValueError, match="paths of one sender"):
        a.merge(b)
    with pytest.raises(ValueError, match="one batch to check places in"):
        attribution_patching(tower, [images], [source], direction, check=3)


def test_a_score_is_a_text_a_direction_or_a_function() -> None:
    """Of a text and another: as of the difference of their unit features."""
    model = load_bundled("shapes")
    world = model.normalize(Shapes(4, seed=5).draw(range(4)).images)
    with torch.no_grad():
        star, ring = F.normalize(model.encode_text(["a star", "a ring"]), dim=-1)
    ours, theirs = world[:2], world[2:4]
    found = activation_patching(model, ours, theirs, "a star", against="a ring", sites=("mlp_out",))
    for toward in (star - ring, lambda x: F.normalize(x, dim=-1) @ (star - ring)):
        same = activation_patching(model, ours, theirs, toward, sites=("mlp_out",))
        torch.testing.assert_close(found.effects["mlp_out"], same.effects["mlp_out"], atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="with a function; leave it out"):
        activation_patching(model, ours, theirs, lambda x: x[:, 0], against="a ring")
