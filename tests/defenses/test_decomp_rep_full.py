"""Decomp-Rep and Decomp-Det beyond the core: fills, MLPs, excess, streams, files, composition (docs/method.md, section 2, 3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.defenses.decomp import DecompDet, DecompRep
from decompclip.defenses.selector import Selector
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.transplant import decomp_reverse
from decompclip.tower.vit import HookedViT


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(tower: HookedViT) -> tuple[Decomposition, Decomposition]:
    """Clean and suspect terms of unit features."""
    clean, suspect = (decompose(tower, x, normalize=True) for x in (drawn(40, 1), 1.5 * drawn(12, 2) + 0.7))
    return clean, suspect


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_batches_fit_as_one(pair, similarity) -> None:
    clean, suspect = pair
    options = {"similarity": similarity, "threshold": "quantile", "quantile": 0.2}
    whole = Selector(**options).fit(clean, deviations=True)
    batches = Selector(**options).fit((clean[i : i + 15] for i in range(0, 40, 15)), deviations=True)
    assert whole.deviations_ is not None and batches.deviations_ is not None
    torch.testing.assert_close(batches.prototypes_, whole.prototypes_)
    torch.testing.assert_close(batches.thresholds_, whole.thresholds_)
    torch.testing.assert_close(batches.deviations_, whole.deviations_)
    assert torch.equal(batches.flags(suspect), whole.flags(suspect))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_heads_of_the_last_layers(pair, last: int) -> None:
    clean, suspect = pair
    flags = DecompRep(components=heads[-last:], epsilon=1e9).fit(clean).flags(suspect)
    assert flags[:, 3 - last :].all() and not flags[:, : 3 - last].any()


def test_the_last_mlps_of_every_image_are_means(pair) -> None:
    clean, suspect = pair
    repair = DecompRep(components=None, mlps=2).fit(clean)
    expected = MeanAblate(mlps[-2:], Moments.of(clean))(suspect)
    torch.testing.assert_close(repair(suspect).mlps, expected.mlps)
    torch.testing.assert_close(repair(suspect).features, expected.features)
    assert not repair.flags(suspect).any()


def test_the_paper_s_hint(ours_alone: None) -> None:
    told = DecompRep.paper(trigger="global")
    assert (told.mlps, told.selector.components) == (5, None)
    assert DecompRep.paper(trigger="local").mlps == 0
    with pytest.raises(ValueError, match=r"a trigger of \('local', 'global'\); received 'patch'"):
        DecompRep.paper(trigger="patch")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["unit", "matched"])
def test_noise_fills_flagged_heads_alone(pair, scale) -> None:
    clean, suspect = pair
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


def test_excess_is_counted_in_clean_deviations(pair) -> None:
    clean, suspect = pair
    detector = DecompDet(score="excess", threshold="quantile", quantile=0.2).fit(clean)
    selector = detector.selector_
    prototypes = clean.heads[:, -1].mean(0)
    before, after = ((d.heads[:, -1] * prototypes).sum(-1) for d in (clean, suspect))
    below = before.quantile(0.2, dim=0, interpolation="lower") - after
    expected = (below / before.std(0, correction=0)).clamp_min(0).sum(1)
    torch.testing.assert_close(detector.score(suspect), expected, rtol=1e-3, atol=1e-4)
    assert expected.any()
    assert not selector.excess(suspect)[:, :-1].any()
    assert repr(DecompDet(score="excess")) == "DecompDet(score='excess')"
    assert repr(DecompDet(score="excess", zeta=2)) == "DecompDet(score='excess', zeta=2)"


def test_composed_and_restricted(pair) -> None:
    clean, suspect = pair
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


def test_the_causal_repair_writes_mlps_too(tower: HookedViT) -> None:
    images = 1.5 * drawn(6, 2) + 0.7
    moments = Moments.fit(tower, [drawn(40, 1)], normalize=True)
    repair = DecompRep(components=None, mlps=1).fit(moments)
    with tower.hooks(fwd_hooks=repair.fwd_hooks(tower)):
        causal = tower(images)
    direct = MeanAblate(mlps[-1], moments)
    with tower.hooks(fwd_hooks=direct.fwd_hooks(tower)):
        torch.testing.assert_close(causal, tower(images))
    assert not torch.allclose(causal, tower(images))


@pytest.mark.parametrize("components", [heads[-2:], None])
def test_saved_and_loaded(tower: HookedViT, pair, components, tmp_path: Path) -> None:
    clean, suspect = pair
    repair = DecompRep(
        similarity="cosine", threshold="quantile", quantile=0.3, components=components, mlps=1
    ).fit(clean)
    loaded = DecompRep.load(repair.save(tmp_path / "new" / "repair.safetensors"), tower)
    assert torch.equal(loaded.flags(suspect), repair.flags(suspect))
    torch.testing.assert_close(loaded(suspect).features, repair(suspect).features, rtol=0, atol=0)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["repair.safetensors"]


@pytest.mark.parametrize("score", ["count", "excess"])
def test_a_saved_detector_scores_as_before(tower: HookedViT, pair, score, tmp_path: Path) -> None:
    clean, suspect = pair
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


def test_decomp_reverse_takes_the_fitted_repair(pair) -> None:
    clean, triggered = pair
    repair = DecompRep(epsilon=0.02).fit(clean)
    flags = repair.flags(triggered)
    reversed_ = decomp_reverse(triggered, repair)(clean[:12])
    expected = torch.where(flags[..., None], triggered.coords, clean.coords[:12])
    assert flags.any() and torch.equal(reversed_.coords, expected)


def test_errors_say_what_to_do(
    ours_alone: None, tower: HookedViT, make_tower: Callable[..., HookedViT], pair, tmp_path: Path
) -> None:
    clean, _ = pair
    few = r"at least 20 clean images for a quantile of 0\.05.*received 19; fit on more"
    with pytest.raises(ValueError, match=few):
        DecompDet(threshold="quantile").fit(clean[:19])
    DecompDet(threshold="quantile").fit(clean[:20])
    with pytest.raises(ValueError, match="expected decompositions of clean images; received none"):
        DecompDet().fit([])
    with pytest.raises(ValueError, match=r"expected a score of .*; received 'sum'"):
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
