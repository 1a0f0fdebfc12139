"""Detection and repair without a hint: calibrated on clean images, exact where they must be."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.exceptions import NotFittedError

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import everything, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.defenses.agnostic import DISTANCES, VIEWS, AgnosticDet, AgnosticRep, lengths
from decompclip.defenses.distances import (
    ClassDistance,
    ComponentDistances,
    Extrapolation,
    class_directions,
    layer_terms,
    ridge,
)
from decompclip.defenses.fitted import Calibrated
from decompclip.tower.vit import HookedViT

N = 240


@pytest.fixture(scope="module")
def clean(tower: HookedViT) -> Decomposition:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(4, 3, 24, 16, generator=g)[torch.arange(N) % 4]
    return decompose(tower, base + 0.5 * torch.randn(N, 3, 24, 16, generator=g), normalize=True)


@pytest.fixture(scope="module")
def fresh(tower: HookedViT) -> Decomposition:
    g = torch.Generator().manual_seed(4)
    base = torch.randn(4, 3, 24, 16, generator=torch.Generator().manual_seed(3))[torch.arange(N) % 4]
    return decompose(tower, base + 0.5 * torch.randn(N, 3, 24, 16, generator=g), normalize=True)


@pytest.fixture(scope="module")
def many(tower: HookedViT) -> Decomposition:
    """Twenty times as many of the same kind."""
    g = torch.Generator().manual_seed(5)
    base = torch.randn(4, 3, 24, 16, generator=torch.Generator().manual_seed(3))[torch.arange(20 * N) % 4]
    return decompose(tower, base + 0.5 * torch.randn(20 * N, 3, 24, 16, generator=g), normalize=True)


@pytest.fixture(scope="module")
def classifier(clean: Decomposition) -> torch.Tensor:
    means = torch.stack([clean.features[k::4].mean(0) for k in range(4)])
    return torch.nn.functional.normalize(means - means.mean(0), dim=1)


def hijacked(d: Decomposition, toward: torch.Tensor) -> Decomposition:
    """The last MLP says something else, louder than all the rest."""
    mlps = d.mlps.clone()
    mlps[:, -1] += 3 * toward
    return d.edit(mlps=mlps)


# What is looked at


def test_what_two_thirds_of_the_layers_found_and_the_rest_sum_to_the_feature(
    clean: Decomposition, classifier: torch.Tensor
) -> None:
    terms = layer_terms(clean)
    assert torch.allclose(terms[:, :, 0], clean.heads.sum(2), atol=1e-6)
    before = AgnosticDet(classifier).fit(clean).look(clean).before
    rest = terms[:, 2:].sum((1, 2)) + clean.bias + clean.pool.sum(1)
    assert clean.n_layers == 3
    assert torch.allclose(before + rest, clean.features, atol=1e-5)


@pytest.mark.parametrize(("n_layers", "first"), [(1, 1), (2, 1), (4, 2), (6, 4)])
def test_two_thirds_of_the_layers_are_one_at_least(
    make_tower, images: torch.Tensor, n_layers: int, first: int
) -> None:
    d = decompose(make_tower(n_layers=n_layers), images, normalize=True)
    detector = AgnosticDet(torch.eye(4, d.d_embed))
    detector.terms_ = d
    terms = layer_terms(d)[:, :first].sum((1, 2))
    assert torch.allclose(detector.look(d).before, d.embed + terms, atol=1e-6)


@pytest.mark.parametrize("convention", ["centred", "paper"])
@pytest.mark.parametrize("pool", [False, True])
def test_lengths_are_those_of_the_features_before_they_were_divided(
    make_tower, images: torch.Tensor, pool: bool, convention: Convention
) -> None:
    tower = make_tower(pool="attention", pool_heads=4, pool_mlp=24, n_prefix=0) if pool else make_tower()
    raw, unit = (
        decompose(tower, images, normalize=normalize, convention=convention) for normalize in (False, True)
    )
    if pool and convention == "paper":  # shares of constants are in the heads' terms
        assert lengths(unit).eq(1).all()
    else:
        assert torch.allclose(lengths(unit), raw.features.norm(dim=1), rtol=1e-4)


def test_class_directions_span_the_differences_of_classes(classifier: torch.Tensor) -> None:
    basis = class_directions(classifier)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-5)
    assert len(basis) == len(classifier) - 1
    many = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    assert len(class_directions(many)) == 32  # the leading ones of 39
    for size in (1e-6, 1e6):
        few = size * torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
        assert len(class_directions(few)) == 3
    differences = classifier - classifier[:1]
    assert torch.allclose(differences @ basis.T @ basis, differences, atol=1e-5)


def test_an_extrapolation_is_a_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=g).double(), torch.randn(50, 6, generator=g).double()
    found = follow(x, y)(x)
    own = x - x.mean(0)
    slow = Ridge(alpha=3e-3 * own.square().sum(0).mean().item()).fit(x.numpy(), y.numpy()).predict(x.numpy())
    assert torch.allclose(found, torch.from_numpy(slow), atol=1e-8)
    still = torch.zeros(2, 6, 6).double()  # of layers that never vary
    assert torch.equal(ridge(still, still), still)
    gram = own.T @ own
    grams = torch.stack([gram, 1e-9 * gram, still[0]])  # each at its own size
    weights = ridge(grams, grams)
    assert torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[0], torch.eye(6).double())


def follow(before: torch.Tensor, features: torch.Tensor) -> Extrapolation:
    x, y = before.double(), features.double()
    own = x - x.mean(0)
    return Extrapolation(x.mean(0), y.mean(0), ridge((own.T @ own)[None], (own.T @ (y - y.mean(0)))[None])[0])


# Detection


def test_batches_teach_what_all_images_teach(clean: Decomposition, classifier: torch.Tensor) -> None:
    whole = AgnosticDet(classifier).fit(clean)
    parts = AgnosticDet(classifier).fit(clean[i : i + 50] for i in range(0, N, 50))
    assert torch.allclose(whole.scores_, parts.scores_, atol=1e-4)
    assert (
        isinstance(whole.terms_, Decomposition) and len(whole.terms_) == 0
    )  # no image is kept, only the form
    assert torch.allclose(
        whole.score(clean[:7]), torch.cat([whole.score(clean[i]) for i in range(7)]), atol=1e-4
    )


def test_cross_fitting_by_sums_is_fitting_on_the_other_folds(
    clean: Decomposition, classifier: torch.Tensor
) -> None:
    """The plain way: of every fold, all that is expected is learnt anew from the images of the others."""
    detector = AgnosticDet(classifier, folds=4, seed=3).fit(clean)
    seen = detector.look(clean)
    fold = torch.randperm(N, generator=torch.Generator().manual_seed(3)) % 4
    raw = torch.zeros(N, len(VIEWS)).double()
    for held in range(4):
        rest, own = seen[fold != held], seen[fold == held]
        expected = follow(rest.before, rest.features)

        def points(x, expected=expected):
            return x.features, x.layers, x.features - expected(x.before)

        for place, (learnt, held_out) in enumerate(zip(points(rest), points(own), strict=True)):
            distance = ClassDistance.fit(learnt[:, None], rest.classes, len(classifier))
            raw[fold == held, place] = distance(held_out[:, None], own.classes)[:, 0].log()
        for place, loud in ((3, 0), (5, 1)):
            overall = rest.loud[:, loud].mean()
            typical = [
                overall
                + (rest.loud[rest.classes == k, loud] - overall).sum() / ((rest.classes == k).sum() + 5)
                for k in range(len(classifier))
            ]
            raw[fold == held, place] = own.loud[:, loud] - torch.stack(typical)[own.classes]
        for row, future, kind in zip(
            (fold == held).nonzero()[:, 0], expected(own.before), own.classes, strict=True
        ):
            direction = (classifier[kind] - classifier.mean(0)).double()
            raw[row, 4] = future @ direction / direction.norm() * lengths(clean)[row]
    views = (raw - raw.mean(0)) / raw.std(0)
    odd = views[:, :3].sum(1)
    tails = (odd / odd.std(), *views[:, 3:].unbind(1))
    scores = torch.stack([-torch.special.log_ndtr(-tail) for tail in tails]).sum(0).sort().values
    assert torch.allclose(detector.scores_, scores, rtol=1e-5) and detector.scores_.dtype == torch.float64


def test_a_class_of_a_single_image_does_no_harm(clean: Decomposition, fresh: Decomposition) -> None:
    """Its own fold knows nothing of it: it is held to all images, and the others' threshold stays what it was."""
    means = torch.stack([clean.features[k::4].mean(0) for k in range(4)])
    classifier = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    classes, unseen = (clean.features @ classifier.T).argmax(1), (fresh.features @ classifier.T).argmax(1)
    first = (classes == 0).nonzero()[:1, 0]
    few = clean[torch.cat([first, (classes != 0).nonzero()[:, 0]])]
    detector = AgnosticDet(classifier).fit(few)
    assert detector.scores_.isfinite().all()
    assert detector.score(fresh).isfinite().all()
    share = detector.predict(fresh[(unseen != 0).nonzero()[:, 0]], fpr=0.05).double().mean().item()
    assert share < 0.12


def test_a_wild_image_does_not_hide_itself(clean: Decomposition, classifier: torch.Tensor) -> None:
    """An image that was learnt from draws means and spread to itself: by the other folds it is odder."""
    mlps = clean.mlps.clone()
    mlps[17, -1] += 50 * classifier[1]
    wild = clean.edit(mlps=mlps)
    detector = AgnosticDet(classifier).fit(wild)
    assert detector.score(wild).argmax() == 17
    assert detector.scores_[-1] > 1.5 * detector.score(wild)[17]


def test_false_positives_are_as_stated(many: Decomposition, classifier: torch.Tensor) -> None:
    """On fresh images, in the mean over sets of clean images to calibrate on: of one set, the rate is its own chance."""
    fresh, rates = many[: 5 * N], {0.05: [], 0.2: []}
    for start in range(5 * N, len(many), N):
        detector = AgnosticDet(classifier).fit(many[start : start + N])
        for fpr, found in rates.items():
            found.append(detector.predict(fresh, fpr=fpr).double().mean().item())
            assert (detector.scores_ > detector.threshold_at(fpr)).double().mean() <= fpr
    assert len(rates[0.05]) == 15
    # A set's own rate deviates by 0.014 and more, that of the fresh images by 0.006; and since what four fifths taught fits the
    # rest less well than what all taught fits fresh ones, a little less than stated is flagged.
    assert 0.03 < np.mean(rates[0.05]) < 0.06
    assert 0.15 < np.mean(rates[0.2]) < 0.22


class Given(Calibrated):
    """Whose scores are what it is given."""

    def __init__(self, clean: int) -> None:
        self.scores_ = torch.arange(1.0, clean + 1)

    def score(self, x: torch.Tensor, /) -> torch.Tensor:
        return x


def test_suspicious_is_what_exceeds_the_clean_images() -> None:
    """Of 19, a fresh one is above all with probability 1/20; a score as large as theirs is none above them."""
    given = torch.tensor([18.0, 19.0, 20.0])
    assert Given(19).predict(given, fpr=0.05).tolist() == [False, False, True]
    assert Given(19).predict(given, fpr=0.1).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="at least 19 clean images .* received 18"):
        Given(18).predict(given, fpr=0.05)


def test_a_hijacked_feature_is_suspicious(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    detector = AgnosticDet(classifier).fit(clean)
    assert detector.score(hijacked(fresh, classifier[0])).min() > detector.threshold_at(0.05)
    assert detector.views(fresh).shape == (N, len(VIEWS))
    odd, loud = detector.views(fresh).split([len(DISTANCES), 3], 1)
    tails = [odd.sum(1) / detector.spread_, *loud.unbind(1)]
    by_hand = -sum(np.log(scipy.stats.norm.sf(tail.numpy())) for tail in tails)
    assert np.allclose(by_hand, detector.score(fresh).numpy())


def test_features_that_were_written_by_the_blocks_alone_are_suspicious(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    """What the start lacks, the last MLP says: the feature, and how odd it is, stay."""
    detector = AgnosticDet(classifier).fit(clean)
    mlps = fresh.mlps.clone()
    mlps[:, -1] += 0.9 * fresh.embed
    less = fresh.edit(embed=0.1 * fresh.embed, mlps=mlps)
    assert torch.allclose(less.features, fresh.features, atol=1e-5)
    seen, was = (detector.look(d).loud[:, 0].exp().float() for d in (less, fresh))
    start = (0.1 * fresh.embed + fresh.bias).norm(dim=-1)
    assert torch.allclose(seen, 1 / start)
    larger, place = seen > was, VIEWS.index("written")
    assert larger.any()
    assert (detector.views(less)[:, place] > detector.views(fresh)[:, place])[larger].all()


def test_longer_features_are_suspicious(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    """Of the same direction: the constants are a smaller part of the unit feature, and heads say what lacks."""
    detector = AgnosticDet(classifier).fit(clean)
    mlps = fresh.mlps.clone()
    mlps[:, -1] += fresh.bias / 2
    longer = fresh.edit(mlps=mlps).with_fields(bias_coords=fresh.bias_coords / 2)
    assert torch.allclose(longer.features, fresh.features, atol=1e-5)
    assert torch.allclose(lengths(longer), 2 * lengths(fresh))
    place = VIEWS.index("length")
    more = (detector.views(longer) - detector.views(fresh))[:, place]
    assert torch.allclose(more, (np.log(2) / detector.deviation_[place]).expand(N), rtol=1e-4)
    assert (detector.score(longer) > detector.score(fresh)).double().mean() > 0.95


def test_one_clean_image_a_class_is_enough(many: Decomposition) -> None:
    """Classes are held to what they share: false positives do not rise."""
    classifier = torch.nn.functional.normalize(many.features[:60] - many.features.mean(0), dim=1)
    with pytest.raises(
        ValueError,
        match=r"at least 60 clean images, as many as the classifier has classes \(60\).*received 59",
    ):
        AgnosticDet(classifier).fit(many[N : N + 59])
    rates = []
    for start in range(N, 11 * N, N):
        detector = AgnosticDet(classifier).fit(many[start : start + 60])
        assert detector.scores_.isfinite().all()
        rates.append(detector.predict(many[-5 * N :], fpr=0.1).double().mean().item())
    assert np.mean(rates) < 0.12
    assert detector.score(hijacked(many[-N:], classifier[0])).min() > detector.threshold_at(0.05)


def test_too_fine_a_rate_says_how_many_images_it_takes(
    clean: Decomposition, classifier: torch.Tensor
) -> None:
    detector = AgnosticDet(classifier).fit(clean)
    with pytest.raises(
        ValueError,
        match=r"at least 999 clean images to calibrate a false-positive rate of 0.001; received 240",
    ):
        detector.threshold_at(0.001)
    with pytest.raises(ValueError, match=r"in \(0, 1\); received 1"):
        detector.threshold_at(1.0)
    assert detector.threshold_at(1 / (N + 1)) == detector.scores_[-1]


def test_bad_input_is_refused(
    clean: Decomposition, tower: HookedViT, make_tower, classifier: torch.Tensor, images: torch.Tensor
) -> None:
    with pytest.raises(NotFittedError):
        AgnosticDet(classifier).score(clean)
    with pytest.raises(NotFittedError):
        AgnosticRep(classifier)(clean)
    with pytest.raises(ValueError, match=r"received none"):
        AgnosticDet(classifier).fit([])
    with pytest.raises(
        ValueError,
        match=r"at least 50 clean images, as many as the classifier has classes \(4\) and ten a fold; received 20",
    ):
        AgnosticDet(classifier).fit(clean[:20])
    with pytest.raises(ValueError, match=r"all 240 were taken for one"):
        AgnosticDet(classifier[:1]).fit(clean)
    AgnosticDet(classifier[:2]).fit(clean)  # two classes are enough
    with pytest.raises(ValueError, match=r"features' width 20; received 7"):
        AgnosticDet(classifier[:, :7]).fit(clean)
    with pytest.raises(ValueError, match=r"at least 2 folds; received 1"):
        AgnosticDet(classifier, folds=1).fit(clean)
    detector = AgnosticDet(classifier).fit(clean)
    with pytest.raises(ValueError, match=r"unit features.*normalize=True"):
        detector.score(decompose(tower, images))
    with pytest.raises(ValueError, match=r"terms of one model; received those of another"):
        detector.score(decompose(make_tower(seed=9, layer_scale=True), images, normalize=True))
    with pytest.raises(ValueError, match=r"terms with convention='centred'.*received convention='paper'"):
        detector.score(decompose(tower, images, normalize=True, convention="paper"))


# Repair


def test_what_does_not_look_suspicious_stays_as_it_is(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    repair = AgnosticRep(classifier, budget=0.05).fit(clean)
    assert repair.moments_.scatter is None  # means are all that it holds
    touched = repair.flags(fresh)
    assert torch.equal(touched, repair.detector_.predict(fresh, fpr=0.05))
    assert 0 < touched.sum() < N / 4
    repaired = repair(fresh)
    assert torch.equal(repaired.coords, fresh.coords)
    assert torch.equal(repaired.mlps[~touched], fresh.mlps[~touched])
    assert not torch.allclose(repaired.mlps[touched], fresh.mlps[touched])
    quiet = fresh[~touched]
    assert repair(quiet) is quiet


def test_a_hijacked_image_loses_its_answer_and_what_was_said_beneath_it_stands(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    repair = AgnosticRep(classifier, budget=0.05).fit(clean)
    assert torch.allclose(repair.moments_.mlps, clean.mlps.double().mean(0))
    victim = hijacked(fresh, classifier[0])
    assert ((victim.features @ classifier.T).argmax(1) == 0).all() and repair.flags(victim).all()
    repaired = repair(victim).features
    assert torch.allclose(repaired, repair.without_answer(victim.features), atol=1e-5)
    before, after = ((x @ classifier.T).argmax(1) for x in (fresh.features, repaired))
    assert (after != 0).all()
    assert (after == before)[before != 0].double().mean() > 0.9


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_no_answer_stays_whatever_the_features(
    clean: Decomposition, classifier: torch.Tensor, classes: int
) -> None:
    """Below the mean of the classes: image by image, by the projection written out."""
    few = classifier[:classes]
    repair = AgnosticRep(few, budget=0.05).fit(clean)
    features = torch.nn.functional.normalize(
        torch.randn(500, clean.d_embed, generator=torch.Generator().manual_seed(6)), dim=1
    )
    answers = (features @ few.T).argmax(1)
    found = repair.without_answer(features)
    cosines = found @ few.T
    assert (cosines[torch.arange(500), answers] < cosines.mean(1)).all()
    assert torch.allclose(found.norm(dim=1), torch.ones(500))
    mean = clean.features.double().mean(0)
    for feature, kind, repaired in zip(features[:50].double(), answers, found, strict=False):
        direction = torch.nn.functional.normalize(few[kind] - few.mean(0), dim=0).double()
        rest = feature - mean
        rest = rest - rest @ direction * direction
        rest = rest - rest.norm() / 1000 * direction  # so that of two classes the other one stands
        assert torch.allclose(repaired.double(), rest / rest.norm(), atol=1e-5)


def test_a_repair_detects_by_its_own_options(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    repair = AgnosticRep(classifier, budget=0.2, folds=4, seed=3).fit(clean)
    detector = AgnosticDet(classifier, folds=4, seed=3).fit(clean)
    assert torch.allclose(repair.detector_.scores_, detector.scores_, rtol=1e-6)
    flags = repair.flags(fresh)
    assert torch.equal(flags, detector.predict(fresh, fpr=0.2))
    assert flags.sum() > detector.predict(fresh).sum()  # of one in five, and not in twenty


def test_where_restricts_the_images(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    repair = AgnosticRep(classifier, budget=0.05).fit(clean)
    victim = hijacked(fresh, classifier[0])[:10]
    where = torch.zeros(10, fresh.n_layers, fresh.n_heads, dtype=torch.bool)
    assert repair(victim, where=where) is victim
    where[3] = True
    alone, whole = repair.on(where)(victim), repair(victim)
    assert torch.equal(alone.features[:3], victim.features[:3])
    assert torch.allclose(alone.features[3], whole.features[3])
    for wrong in (where[:5], where[..., :1]):
        with pytest.raises(ValueError, match=r"expected where as a boolean mask \[batch, layer, head\]"):
            repair(victim, where=wrong)
    composed = (repair | repair)(victim)
    assert composed.features.shape == victim.features.shape


def test_there_is_no_causal_mode(clean: Decomposition, tower: HookedViT, classifier: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"no causal mode"):
        AgnosticRep(classifier).fit(clean[:100]).fwd_hooks(tower)
    with pytest.raises(ValueError, match=r"clean images to calibrate a false-positive rate of 0.001"):
        AgnosticRep(classifier, budget=0.001).fit(clean)


# Components


def test_each_component_has_its_own_calibrated_distance(
    clean: Decomposition, fresh: Decomposition, many: Decomposition, classifier: torch.Tensor
) -> None:
    distances = ComponentDistances(classifier).fit(clean[i : i + 60] for i in range(0, N, 60))
    components = 3 * 4 + 3
    rates = []
    for start in range(5 * N, len(many), N):
        flags = ComponentDistances(classifier).fit(many[start : start + N]).flags(many[: 5 * N], fpr=0.05)
        assert flags.shape == (5 * N, components + 1)
        assert not flags[:, -1].any()  # the embedding
        rates.append(flags[:, :-1].double().mean(0))
    assert (torch.stack(rates).mean(0) - 0.05).abs().max() < 0.015  # of each component, over 15 sets
    coords = fresh.coords.clone()
    coords[:, 1, 2] *= 4
    odd = fresh.edit(coords=coords)
    classes = (odd.features @ classifier.T).argmax(1) == (fresh.features @ classifier.T).argmax(1)
    assert distances.flags(odd, fpr=0.05)[:, 1 * 4 + 2].double().mean() > 0.9
    others = torch.ones(components, dtype=torch.bool)
    others[1 * 4 + 2] = False
    assert torch.allclose(
        distances.score(odd)[classes][:, others], distances.score(fresh)[classes][:, others]
    )


def test_components_are_learnt_from_all_images_and_calibrated_on_a_sample(
    clean: Decomposition, classifier: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain way: of each fold of the sample, all images but its own teach."""
    monkeypatch.setattr("decompclip.defenses.distances.CALIBRATION", 100)
    monkeypatch.setattr("decompclip.defenses.fitted.BLOCK", 50)
    found = ComponentDistances(classifier, seed=3).fit(clean[i : i + 33] for i in range(0, N, 33))
    sample = torch.rand(N, generator=torch.Generator().manual_seed(3)).argsort()[:100].sort().values
    fold = torch.randperm(100, generator=torch.Generator().manual_seed(3)) % 5
    classes = (clean.features @ classifier.T).argmax(1)
    columns = []
    for x in (clean.coords.flatten(1, 2), clean.mlps):
        logs = torch.zeros(100, x.shape[1]).double()
        for held in range(5):
            own = sample[fold == held]
            rest = torch.ones(N, dtype=torch.bool)
            rest[own] = False
            distance = ClassDistance.fit(x[rest], classes[rest], len(classifier))
            logs[fold == held] = distance(x[own], classes[own]).log()
        columns.append(logs)
    logs = torch.cat(columns, 1)
    assert torch.allclose(found.logs_, logs.sort(0).values, rtol=1e-6)
    own = [ClassDistance.fit(x, classes, len(classifier)) for x in (clean.coords.flatten(1, 2), clean.mlps)]
    some = clean[:7]
    far = [fit(x, classes[:7]) for fit, x in zip(own, (some.coords.flatten(1, 2), some.mlps), strict=True)]
    expected = (torch.cat(far, 1).log() - logs.mean(0)) / logs.std(0)
    assert torch.allclose(found.score(some), expected, rtol=1e-5)


def test_a_component_that_writes_nothing_is_never_flagged(
    clean: Decomposition, fresh: Decomposition, classifier: torch.Tensor
) -> None:
    """Its distance is the same in every image, no further than in any clean one."""
    silent = []
    for d in (clean, fresh):
        coords = d.coords.clone()
        coords[:, 1, 2] = 0
        silent.append(d.edit(coords=coords))
    flags = ComponentDistances(classifier).fit(silent[0]).flags(silent[1], fpr=0.05)
    assert not flags[:, 1 * 4 + 2].any() and flags[:, 0].any()


def test_component_flags_have_a_place_for_the_pool_s_mlp(make_tower) -> None:
    tower = make_tower(pool="attention", pool_heads=4, pool_mlp=24, n_prefix=0)
    d = decompose(tower, torch.randn(60, 3, 24, 16, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(layer_terms(d), torch.stack([d.heads.sum(2), d.mlps], 2))
    flags = ComponentDistances(torch.eye(4, d.d_embed)).fit(d).flags(d, fpr=0.3)
    assert flags.shape == (60, len(resolve(everything, d).flat)) == (60, 3 * 4 + 3 + 2)
    assert flags[:, :-2].any(0).all() and not flags[:, -2:].any()


def test_component_flags_restrict_an_intervention(clean: Decomposition, classifier: torch.Tensor) -> None:
    from decompclip.decomposition.moments import Moments
    from decompclip.operators.ablation import MeanAblate

    distances, moments = ComponentDistances(classifier).fit(clean), Moments.of(clean)
    flags = distances.flags(clean[:20], fpr=0.1)
    edited = MeanAblate(everything, moments).on(flags)(clean[:20])
    heads = flags[:, :12].reshape(20, 3, 4)
    assert heads.any() and not heads.all()
    assert torch.allclose(edited.coords[heads], moments.coords.float().expand(20, -1, -1, -1)[heads])
    assert torch.equal(edited.coords[~heads], clean.coords[:20][~heads])


def test_component_distances_refuse_what_they_cannot_tell(
    clean: Decomposition, tower: HookedViT, classifier: torch.Tensor
) -> None:
    with pytest.raises(NotFittedError):
        ComponentDistances(classifier).flags(clean)
    with pytest.raises(ValueError, match=r"at least 50 clean images; received 20"):
        ComponentDistances(classifier).fit(clean[:20])
    least = ComponentDistances(classifier).fit(clean[:50])
    assert len(least.logs_) == 50 and len(least.terms_) == 0
    with pytest.raises(ValueError, match=r"features' width 20; received 7"):
        ComponentDistances(classifier[:, :7]).fit(clean)
    distances = ComponentDistances(classifier).fit(clean)
    with pytest.raises(ValueError, match=r"at least 999 clean images to calibrate .* 0.001; received 240"):
        distances.flags(clean, fpr=0.001)
    raw = decompose(tower, torch.ones(2, 3, 24, 16))
    with pytest.raises(ValueError, match=r"terms with normalize=True, .* received normalize=False"):
        distances.score(raw)
