"""Decomp-Rep and Decomp-Det: selection, fills, MLPs, files, composition, controls (docs/method.md, sections 2 and 3)."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.defenses.decomp import DecompDet, DecompRep, fixed_heads, late_mlps, random_heads
from decompclip.defenses.selector import Selector
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.noise import RandomAblate
from decompclip.operators.transplant import decomp_reverse
from decompclip.tower.vit import HookedViT

rules = pytest.mark.parametrize(
    ("similarity", "threshold"), list(product(["dot", "cosine"], ["epsilon", "quantile"]))
)
conventions = pytest.mark.parametrize("convention", ["centred", "paper"])


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["centred", "paper"])
def pair(request: pytest.FixtureRequest, tower: HookedViT) -> tuple[Decomposition, Decomposition]:
    """Clean and suspect terms of unit features."""
    clean, suspect = (
        decompose(tower, x, convention=request.param, normalize=True)
        for x in (drawn(40, 1), 1.5 * drawn(12, 2) + 0.7)
    )
    return clean, suspect


def plain_similarity(d: Decomposition, clean: Decomposition, similarity: str) -> Tensor:
    prototypes = clean.heads[:, -1].mean(0)
    terms = d.heads[:, -1]
    if similarity == "cosine":
        return F.cosine_similarity(terms, prototypes[None], dim=-1)
    return (terms * prototypes).sum(-1)


@rules
def test_flags_equal_the_plain_reference(pair, similarity, threshold) -> None:
    clean, suspect = pair
    epsilon, quantile = (0.02 if similarity == "dot" else 0.5), 0.2
    limits = torch.full((4,), epsilon)
    if threshold == "quantile":
        limits = plain_similarity(clean, clean, similarity).quantile(quantile, dim=0, interpolation="lower")
    expected = plain_similarity(suspect, clean, similarity) <= limits + 1e-7
    detector = DecompDet(similarity=similarity, threshold=threshold, epsilon=epsilon, quantile=quantile).fit(
        clean
    )
    flags = detector.selector_.flags(suspect)
    assert torch.equal(flags[:, -1], expected)
    assert not flags[:, :-1].any()
    assert torch.equal(detector.score(suspect), expected.sum(1))
    assert 0 < int(expected.sum()) < expected.numel()


@rules
def test_flagged_heads_become_their_prototypes(pair, similarity, threshold) -> None:
    clean, suspect = pair
    repair = DecompRep(similarity=similarity, threshold=threshold, epsilon=0.02, quantile=0.2).fit(clean)
    repaired, flags = repair(suspect), repair.flags(suspect)
    prototypes = clean.heads.mean(0)
    expected = torch.where(flags[..., None], prototypes, suspect.heads)
    torch.testing.assert_close(repaired.heads, expected, rtol=1e-4, atol=1e-5)
    zero = DecompRep(similarity=similarity, threshold=threshold, epsilon=0.02, quantile=0.2, fill="zero").fit(
        clean
    )
    torch.testing.assert_close(zero(suspect).heads, suspect.heads * ~flags[..., None], rtol=1e-4, atol=1e-5)


def test_an_image_is_judged_alone(pair) -> None:
    clean, suspect = pair
    repair = DecompRep(similarity="cosine", epsilon=0.1).fit(clean)
    order = torch.randperm(len(suspect), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(repair(suspect[order]).features, repair(suspect).features[order])
    torch.testing.assert_close(repair(suspect[3:4]).features, repair(suspect).features[3:4])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_clean_quantile_flags_its_share(pair, similarity) -> None:
    clean, _ = pair
    detector = DecompDet(similarity=similarity, threshold="quantile", quantile=0.25).fit(clean)
    share = detector.selector_.flags(clean)[:, -1].double().mean(0)
    assert ((share - 0.25).abs() <= 1 / len(clean) + 1e-9).all(), share


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_head_at_its_threshold_is_flagged(pair, similarity) -> None:
    """ "At or below": the clean image that sets a quantile counts, and so does one that sits on epsilon."""
    clean, suspect = pair
    selector = Selector(similarity=similarity, threshold="quantile", quantile=0.25).fit(clean)
    assert (
        selector.flags(clean)[:, -1].sum(0).tolist() == [10] * 4
    )  # 9.75 steps from the least: the tenth of 40
    at = selector.similarities(suspect)[:, -1]
    on = Selector(similarity=similarity, epsilon=float(at[3, 2])).fit(clean)
    assert torch.equal(on.flags(suspect)[:, -1], at <= at[3, 2])
    assert on.flags(suspect)[3, -1, 2]
    least = Selector(similarity=similarity, threshold="quantile", quantile=0.0).fit(clean)
    assert least.flags(clean)[:, -1].sum(0).tolist() == [1] * 4


def test_a_head_that_writes_nothing_or_never_varies(pair) -> None:
    """It resembles nothing; and its deviation is the rounding of its similarity, not less."""
    clean, suspect = pair
    coords = suspect.coords.clone()
    coords[:, -1, 2] = 0
    found = Selector(similarity="cosine").fit(clean).similarities(suspect.edit(coords=coords))
    assert found[:, -1, 2].tolist() == [0] * 12
    coords = clean.coords.clone()
    coords[:, -1, 2] = coords[0, -1, 2]
    still = clean.edit(coords=coords)
    fitted = Selector().fit(still, deviations=True)
    assert fitted.deviations_ is not None
    expected = torch.finfo(torch.float32).eps * still.heads[0, -1, 2].square().sum()
    torch.testing.assert_close(fitted.deviations_[-1, 2], expected, rtol=1e-3, atol=0)


def test_thresholds_at_the_ends(pair) -> None:
    clean, suspect = pair
    none = DecompDet(epsilon=-1e9).fit(clean)
    every = DecompDet(epsilon=1e9, components=heads[-2:], zeta=7).fit(clean)
    assert none.score(suspect).tolist() == [0] * 12
    assert every.score(suspect).tolist() == [8] * 12
    assert every.predict(suspect).all()
    assert not DecompDet(epsilon=1e9, zeta=4).fit(clean).predict(suspect).any()  # four, and not above four


def test_moments_serve_as_well_as_the_terms(pair) -> None:
    clean, suspect = pair
    of_terms, of_moments = (DecompRep(epsilon=0.02).fit(x) for x in (clean, Moments.of(clean)))
    torch.testing.assert_close(of_terms(suspect).features, of_moments(suspect).features)
    assert of_terms.selector_.moments_.scatter is None  # means are all that a repair holds


def test_the_causal_repair_edits_the_flagged_heads(tower: HookedViT) -> None:
    images = 1.5 * drawn(12, 2) + 0.7
    moments = Moments.fit(tower, [drawn(40, 1)], normalize=True)
    repair = DecompRep(epsilon=0.02).fit(moments)
    flags = repair.flags(decompose(tower, images, normalize=True))
    assert flags.any() and moments.streams is not None
    with tower.hooks(fwd_hooks=repair.fwd_hooks(tower, where=flags)):
        _, cache = tower.run_with_cache(images)
    _, before = tower.run_with_cache(images)
    mean = moments.streams.z[-1, 0].float()
    expected = torch.where(flags[:, -1, :, None], mean, before["z", -1][:, 0])
    torch.testing.assert_close(cache["z", -1][:, 0], expected, rtol=1e-4, atol=1e-5)


def test_the_paper_s_preset(tower: HookedViT, pair) -> None:
    assert DecompRep.paper().selector.epsilon == 0.002
    assert DecompDet.paper().zeta == 5
    for preset in (DecompRep.paper, DecompDet.paper):
        assert (preset(epsilon=0.01).selector.epsilon, preset().selector.convention) == (0.01, "paper")
    d = decompose(tower, drawn(4, 1), normalize=True)
    with pytest.raises(ValueError, match=r"in the 'paper' convention.*received convention='centred'"):
        DecompRep.paper().fit(d)
    DecompDet.paper().fit(decompose(tower, drawn(4, 1), convention="paper", normalize=True))


def test_errors_say_what_to_do(
    ours_alone: None, tower: HookedViT, make_tower: Callable[..., HookedViT], pair
) -> None:
    clean, suspect = pair
    with pytest.raises(NotFittedError, match=r"a fitted DecompRep.*call DecompRep\.fit\(clean\) first"):
        DecompRep()(suspect)
    with pytest.raises(NotFittedError, match="a fitted DecompDet"):
        DecompDet().score(suspect)
    raw = decompose(tower, drawn(4, 1))
    with pytest.raises(ValueError, match=r"terms of unit features.*normalize=True.*similarity=\"cosine\""):
        DecompRep().fit(raw)
    DecompRep(similarity="cosine").fit(raw)
    with pytest.raises(ValueError, match="expected similarity of .*; received 'l2'"):
        Selector(similarity="l2").fit(clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected threshold of .*; received 'mean'"):
        Selector(threshold="mean").fit(clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected a quantile in 0\.\.1; received 1\.01"):
        Selector(quantile=1.01).fit(clean)
    with pytest.raises(ValueError, match=r"expected fill of .*; received 'mean'"):
        DecompRep(fill="mean").fit(clean)  # type: ignore[arg-type]
    for wrong in (mlps[0], heads[-1] | mlps[0], heads[-1] - heads[-1]):
        with pytest.raises(ValueError, match=re.escape(f"expected heads to judge; received {wrong!r}; for ")):
            DecompDet(components=wrong).fit(clean)
    with pytest.raises(ValueError, match="whose similarities a quantile is taken of; received their moments"):
        DecompDet(threshold="quantile").fit(Moments.of(clean))
    with pytest.raises(TypeError, match="expected a decomposition, .* received a Moments"):
        DecompDet(threshold="quantile").fit([clean, Moments.of(clean)])  # pyright: ignore[reportArgumentType]
    other = decompose(
        make_tower(seed=8, layer_scale=True), drawn(4, 1), convention=clean.convention, normalize=True
    )
    with pytest.raises(ValueError, match="same shape with other weights"):
        DecompDet().fit(clean).score(other)
    with pytest.raises(ValueError, match="expected where, the heads to replace"):
        DecompRep().fit(clean).fwd_hooks(tower)


def test_they_read_well(pair) -> None:
    assert repr(DecompRep()) == "DecompRep()"
    assert repr(DecompDet(similarity="cosine", zeta=2)) == "DecompDet(similarity='cosine', zeta=2)"


@pytest.fixture
def centred(tower: HookedViT) -> tuple[Decomposition, Decomposition]:
    """Clean and suspect terms of unit features."""
    clean, suspect = (decompose(tower, x, normalize=True) for x in (drawn(40, 1), 1.5 * drawn(12, 2) + 0.7))
    return clean, suspect


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_batches_fit_as_one(centred, similarity) -> None:
    clean, suspect = centred
    options = {"similarity": similarity, "threshold": "quantile", "quantile": 0.2}
    whole = Selector(**options).fit(clean, deviations=True)
    batches = Selector(**options).fit((clean[i : i + 15] for i in range(0, 40, 15)), deviations=True)
    assert whole.deviations_ is not None and batches.deviations_ is not None
    torch.testing.assert_close(batches.prototypes_, whole.prototypes_)
    torch.testing.assert_close(batches.thresholds_, whole.thresholds_)
    torch.testing.assert_close(batches.deviations_, whole.deviations_)
    assert torch.equal(batches.flags(suspect), whole.flags(suspect))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_heads_of_the_last_layers(centred, last: int) -> None:
    clean, suspect = centred
    flags = DecompRep(components=heads[-last:], epsilon=1e9).fit(clean).flags(suspect)
    assert flags[:, 3 - last :].all() and not flags[:, : 3 - last].any()


def test_the_last_mlps_of_every_image_are_means(centred) -> None:
    clean, suspect = centred
    repair = DecompRep(components=None, mlps=2).fit(clean)
    expected = MeanAblate(mlps[-2:], Moments.of(clean))(suspect)
    torch.testing.assert_close(repair(suspect).mlps, expected.mlps)
    torch.testing.assert_close(repair(suspect).features, expected.features)
    assert not repair.flags(suspect).any()


def test_the_last_mlps_are_the_papers_share_of_the_towers_own() -> None:
    assert [late_mlps(n) for n in (12, 24, 6, 1)] == [5, 10, 2, 1]


def test_the_paper_s_hint(ours_alone: None) -> None:
    told = DecompRep.paper(trigger="global")
    assert (told.mlps, told.selector.components, told.selector.convention) == (5, None, "paper")
    assert DecompRep.paper(epsilon=0.01, trigger="global").selector.epsilon == 0.01
    assert DecompRep.paper(trigger="local").mlps == 0
    with pytest.raises(ValueError, match=r"expected trigger of \('local', 'global'\); received 'patch'"):
        DecompRep.paper(trigger="patch")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["unit", "matched"])
def test_noise_fills_flagged_heads_alone(centred, scale) -> None:
    clean, suspect = centred
    one, same, other = (
        DecompRep(epsilon=0.02, fill="random", scale=scale, seed=seed).fit(clean) for seed in (3, 3, 4)
    )
    flags, before = one.flags(suspect), suspect.heads
    assert flags.any() and not flags.all()
    after = one(suspect).heads
    torch.testing.assert_close(after[~flags], before[~flags], rtol=1e-4, atol=1e-5)
    assert ((after - before)[flags].norm(dim=-1) > 1e-4).all()
    assert torch.equal(same(suspect).heads, after)
    assert not torch.allclose(other(suspect).heads, after)
    noise = RandomAblate(heads, one.selector_.moments_, scale=scale, seed=3)(suspect).heads
    torch.testing.assert_close(after[flags], noise[flags], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", ["epsilon", "quantile"])
def test_excess_is_counted_in_clean_deviations(centred, threshold) -> None:
    clean, suspect = centred
    detector = DecompDet(score="excess", threshold=threshold, epsilon=0.02, quantile=0.2).fit(clean)
    selector = detector.selector_
    prototypes = clean.heads[:, -1].mean(0)
    before, after = ((d.heads[:, -1] * prototypes).sum(-1) for d in (clean, suspect))
    limits = before.quantile(0.2, dim=0, interpolation="lower") if threshold == "quantile" else 0.02
    below = limits - after
    expected = (below / before.std(0, correction=0)).clamp_min(0).sum(1)
    torch.testing.assert_close(detector.score(suspect), expected, rtol=1e-3, atol=1e-4)
    assert expected.any()
    assert not selector.excess(suspect)[:, :-1].any()
    assert repr(DecompDet(score="excess")) == "DecompDet(score='excess')"
    assert repr(DecompDet(score="excess", zeta=2)) == "DecompDet(score='excess', zeta=2)"


def test_composed_and_restricted(centred) -> None:
    clean, suspect = centred
    repair, moments = DecompRep(epsilon=0.02, mlps=1).fit(clean), Moments.of(clean)
    first = MeanAblate(heads[0], moments)
    torch.testing.assert_close((first | repair)(suspect).features, repair(first(suspect)).features)
    torch.testing.assert_close((repair | first)(suspect).features, first(repair(suspect)).features)
    whole = torch.zeros(12, 3 * 4 + 3 + 1, dtype=torch.bool)
    whole[:6] = True
    half = repair.on(whole)(suspect)
    torch.testing.assert_close(half.features[:6], repair(suspect).features[:6])
    torch.testing.assert_close(half.features[6:], suspect.features[6:])
    by_head = repair.on(whole[:, :12].view(12, 3, 4))(suspect)
    torch.testing.assert_close(by_head.mlps, repair(suspect).mlps)
    torch.testing.assert_close(by_head.coords, half.coords)


def test_a_choice_of_every_component_counts_the_pool(make_tower: Callable[..., HookedViT]) -> None:
    siglip = make_tower(pool="attention", pool_heads=4, pool_mlp=40, n_prefix=0, projection=False, d_embed=32)
    clean, suspect = (decompose(siglip, drawn(n, n), normalize=True) for n in (40, 12))
    repair, n_layers, n_heads = DecompRep(epsilon=0.02, mlps=1).fit(clean), clean.n_layers, clean.n_heads
    every = torch.ones(12, n_layers * (n_heads + 1) + 2, dtype=torch.bool)
    torch.testing.assert_close(repair(suspect, where=every).features, repair(suspect).features)
    with pytest.raises(ValueError, match="where"):
        repair(suspect, where=every[:, :-2])


def test_the_causal_repair_writes_mlps_too(tower: HookedViT) -> None:
    images = 1.5 * drawn(6, 2) + 0.7
    moments = Moments.fit(tower, [drawn(40, 1)], normalize=True)
    repair = DecompRep(components=None, mlps=1).fit(moments)
    with tower.hooks(fwd_hooks=repair.fwd_hooks(tower)):
        causal = tower(images)
    direct = MeanAblate(mlps[-1], moments)
    with tower.hooks(fwd_hooks=direct.fwd_hooks(tower)):
        torch.testing.assert_close(causal, tower(images))
    plain = tower(images)
    assert not torch.allclose(causal, plain)
    some = torch.zeros(6, 3 * 4 + 3 + 1, dtype=torch.bool)
    some[:2] = True
    with tower.hooks(fwd_hooks=repair.fwd_hooks(tower, where=some)):
        torch.testing.assert_close(tower(images), torch.where(some[:, :1], causal, plain))


@pytest.mark.parametrize("components", [heads[-2:], None])
def test_saved_and_loaded(tower: HookedViT, centred, components, tmp_path: Path) -> None:
    clean, suspect = centred
    repair = DecompRep(
        similarity="cosine", threshold="quantile", quantile=0.3, components=components, mlps=1
    ).fit(clean)
    loaded = DecompRep.load(repair.save(tmp_path / "new" / "repair.safetensors"), tower)
    assert torch.equal(loaded.flags(suspect), repair.flags(suspect))
    torch.testing.assert_close(loaded(suspect).features, repair(suspect).features, rtol=0, atol=0)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["repair.safetensors"]


@pytest.mark.parametrize("score", ["count", "excess"])
def test_a_saved_detector_scores_as_before(tower: HookedViT, centred, score, tmp_path: Path) -> None:
    clean, suspect = centred
    detector = DecompDet(score=score, zeta=2, similarity="cosine", threshold="quantile").fit(clean)
    loaded = DecompDet.load(detector.save(tmp_path / "d.safetensors"), tower)
    assert torch.equal(loaded.score(suspect), detector.score(suspect))
    assert torch.equal(loaded.predict(suspect), detector.predict(suspect))
    assert (loaded.kind, loaded.zeta) == (score, 2)
    content = bytearray((tmp_path / "d.safetensors").read_bytes())
    content[-4] ^= 1
    (tmp_path / "d.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="received other numbers than its digest is of"):
        DecompDet.load(tmp_path / "d.safetensors", tower)


def test_stream_means_are_saved(tower: HookedViT, tmp_path: Path) -> None:
    repair = DecompRep(epsilon=0.02).fit(Moments.fit(tower, [drawn(20, 1)], normalize=True))
    images = drawn(4, 5)
    flags = repair.flags(decompose(tower, images, normalize=True))
    features = []
    for one in (repair, DecompRep.load(repair.save(tmp_path / "r"), tower)):
        with tower.hooks(fwd_hooks=one.fwd_hooks(tower, where=flags)):
            features.append(tower(images))
    torch.testing.assert_close(features[0], features[1])


def test_decomp_reverse_takes_the_fitted_repair(centred) -> None:
    clean, triggered = centred
    repair = DecompRep(epsilon=0.02).fit(clean)
    flags = repair.flags(triggered)
    reversed_ = decomp_reverse(triggered, repair)(clean[:12])
    expected = torch.where(flags[..., None], triggered.coords, clean.coords[:12])
    assert flags.any() and torch.equal(reversed_.coords, expected)


def test_files_and_few_images_say_what_to_do(
    ours_alone: None, tower: HookedViT, make_tower: Callable[..., HookedViT], centred, tmp_path: Path
) -> None:
    clean, _ = centred
    few = r"at least 20 clean images for a quantile of 0\.05.*received 19; fit on more"
    with pytest.raises(ValueError, match=few):
        DecompDet(threshold="quantile").fit(clean[:19])
    DecompDet(threshold="quantile").fit(clean[:20])
    with pytest.raises(ValueError, match="expected decompositions of clean images; received none"):
        DecompDet().fit([])
    with pytest.raises(ValueError, match=r"expected score of .*; received 'sum'"):
        DecompDet(score="sum").fit(clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected to replace 0\.\.3 MLPs.*received 4"):
        DecompRep(mlps=4).fit(clean)
    with pytest.raises(ValueError, match="fitted without; fit"):
        Selector().fit(clean).excess(clean)
    with pytest.raises(NotFittedError, match="a fitted DecompRep"):
        DecompRep().save(tmp_path / "r")
    path = DecompRep().fit(clean).save(tmp_path / "r")
    with pytest.raises(
        ValueError, match="the model that the DecompRep in .* was fitted on; received another"
    ):
        DecompRep.load(path, make_tower(seed=8, layer_scale=True))
    with pytest.raises(FileNotFoundError, match="expected a saved DecompRep; received"):
        DecompRep.load(tmp_path / "none", tower)
    with pytest.raises(
        ValueError, match=r"of format decompclip\.selector/2; received .* decompclip\.decomposition"
    ):
        DecompRep.load(clean.save(tmp_path / "d"), tower)
    with pytest.raises(ValueError, match=r"expected a saved DecompDet; received .*r, a saved DecompRep"):
        DecompDet.load(path, tower)
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(ValueError, match="which cannot be read"):
        DecompRep.load(tmp_path / "broken", tower)


def test_fixed_heads_are_those_flagged_most_often() -> None:
    flags = torch.zeros(5, 2, 3, dtype=torch.bool)
    flags[:4, 1, 2] = flags[:3, 0, 1] = flags[:1, 1, 0] = True
    assert fixed_heads(flags, 2).tolist() == [[False, True, False], [False, False, True]]
    assert fixed_heads(flags, 1).nonzero().tolist() == [[1, 2]]
    assert torch.equal(fixed_heads(flags, 3), flags.any(0))
    for count in (0, 4):
        with pytest.raises(
            ValueError, match=rf"a count in 1\.\.3, of heads that are ever flagged; received {count}"
        ):
            fixed_heads(flags, count)


def test_random_heads_are_as_many_and_judged() -> None:
    judged = torch.zeros(2, 8, dtype=torch.bool)
    judged[1] = True
    flags = judged & (torch.rand(50, 2, 8, generator=torch.Generator().manual_seed(0)) < 0.5)
    random = random_heads(flags, judged, seed=1)
    assert torch.equal(random.sum((1, 2)), flags.sum((1, 2)))
    assert not random[:, 0].any() and random.any(0)[1].all()
    assert torch.equal(random, random_heads(flags, judged, seed=1))
    assert not torch.equal(random, random_heads(flags, judged, seed=2))
    assert not torch.equal(random, flags)
    every = judged.expand(3, -1, -1)
    assert torch.equal(random_heads(every, judged, seed=1), every)
    assert random_heads(every[:0], judged, seed=1).shape == (0, 2, 8)
    with pytest.raises(ValueError, match="at most 8 flags an image.*received 9"):
        random_heads(torch.ones(1, 3, 3, dtype=torch.bool), torch.arange(9).view(3, 3) < 8, seed=0)
