"""Decomp-Rep and Decomp-Det: selection by likeness to a clean prototype (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.defenses.decomp import DecompDet, DecompRep
from decompclip.defenses.selector import Selector
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


def test_thresholds_at_the_ends(pair) -> None:
    clean, suspect = pair
    none = DecompDet(epsilon=-1e9).fit(clean)
    every = DecompDet(epsilon=1e9, components=heads[-2:], zeta=7).fit(clean)
    assert none.score(suspect).tolist() == [0] * 12
    assert every.score(suspect).tolist() == [8] * 12
    assert every.predict(suspect).all()
    assert not DecompDet(epsilon=1e9, zeta=4).fit(clean).predict(suspect).any()


def test_moments_serve_as_well_as_the_terms(pair) -> None:
    clean, suspect = pair
    of_terms, of_moments = (DecompRep(epsilon=0.02).fit(x) for x in (clean, Moments.of(clean)))
    torch.testing.assert_close(of_terms(suspect).features, of_moments(suspect).features)


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
    with pytest.raises(ValueError, match="expected a similarity of .*; received 'l2'"):
        Selector(similarity="l2").fit(clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a threshold of .*; received 'mean'"):
        Selector(threshold="mean").fit(clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected a quantile in 0\.\.1; received 5"):
        Selector(quantile=5).fit(clean)
    with pytest.raises(ValueError, match=r"expected a fill of .*; received 'mean'"):
        DecompRep(fill="mean").fit(clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected heads to judge; received mlps\[0\]"):
        DecompDet(components=mlps[0]).fit(clean)
    with pytest.raises(ValueError, match="whose similarities a quantile is taken of; received their moments"):
        DecompDet(threshold="quantile").fit(Moments.of(clean))
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
