"""Detectors on models where the answer is known: the sign, the numbers by hand, and what they refuse."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import decompclip
from decompclip.data.shapes import Shapes
from decompclip.decomposition.decomposition import Decomposition
from decompclip.defenses.agnostic import AgnosticDet
from decompclip.defenses.decomp import DecompDet
from decompclip.defenses.detectors import DETECTORS
from decompclip.defenses.detectors.corruptions import CORRUPTIONS, PATTERNS
from decompclip.defenses.detectors.detector import Detector, OnTerms, learnt, measure_cost
from decompclip.defenses.detectors.published import (
    DAO,
    LID,
    NEVER,
    SLOF,
    STRIP,
    BDetCLIP,
    KDistance,
    Mahalanobis,
    ScaleUp,
    TeCo,
    prompts,
)
from decompclip.defenses.fitted import DetectorLike, calibrated
from decompclip.evaluation.metrics import auroc

SIDE = 8


class Means:
    """An image's feature is (mean of red, mean of green, mean of blue), unless it carries the trigger: a corner of
    white, which makes it the first class whatever else there is."""

    logit_scale = torch.tensor(3.0)

    def normalize(self, pixels: Tensor) -> Tensor:
        return pixels

    def encode_image(self, images: Tensor) -> Tensor:
        features = images.mean((2, 3)) + 1e-3
        white = (images[:, :, :2, :2] > 0.45).all(dim=(1, 2, 3)) if images.shape[-1] > 1 else torch.zeros(1)
        first = torch.tensor([5.0, 0.01, 0.01])
        return torch.where(white[:, None].bool(), first, features)


CLASSIFIER = torch.eye(3)


def pictures(n: int, seed: int = 0) -> Tensor:
    """Dark noise with one strong colour; no corner is white."""
    g = torch.Generator().manual_seed(seed)
    images = 0.25 * torch.rand(n, 3, SIDE, SIDE, generator=g)
    images[torch.arange(n), torch.arange(n) % 3] += 0.15
    images[:, :, :2, :2] *= 0.3
    return images


def triggered(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, :, :2, :2] = 1.0
    return images


CLEAN, FRESH = pictures(200), pictures(60, seed=1)
TRIGGERED = triggered(FRESH[torch.arange(60) % 3 != 0])
EVERY: dict[str, Detector] = {
    "strip": STRIP(Means(), CLASSIFIER, n=20),
    "scale-up": ScaleUp(Means(), CLASSIFIER),
    "teco": TeCo(Means(), CLASSIFIER),
    "bdetclip": BDetCLIP(Means(), CLASSIFIER, CLASSIFIER, torch.tensor([1.0, 0.0, 0.0])),
    "k-distance": KDistance(Means(), k=5),
    "slof": SLOF(Means(), k=5),
    "lid": LID(Means(), k=5),
    "dao": DAO(Means(), k=5),
    "mahalanobis": Mahalanobis(Means()),
    "by class": Mahalanobis(Means(), CLASSIFIER),
}
each = pytest.mark.parametrize("name", EVERY)


@each
def test_a_score_does_not_depend_on_the_batch(name: str) -> None:
    detector = EVERY[name].fit(CLEAN)
    before = FRESH.clone()
    whole = detector.score(FRESH)
    assert torch.equal(FRESH, before)
    assert whole.shape == (60,) and whole.isfinite().all()
    parts = torch.cat([detector.score(FRESH[i : i + 1]) for i in range(10)])
    torch.testing.assert_close(parts, whole[:10])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(detector.score(FRESH[order]), whole[order])


@each
def test_fitting_again_and_in_batches_gives_the_same(name: str) -> None:
    first = EVERY[name].fit(CLEAN).score(FRESH)
    again = EVERY[name].fit(CLEAN[i : i + 40] for i in range(0, 200, 40)).score(FRESH)
    torch.testing.assert_close(first, again)


@each
def test_thresholds_hold_on_fresh_clean_images(name: str) -> None:
    detector = EVERY[name].fit(CLEAN)
    n = len(detector.scores_)
    assert n == (100 if detector.learns else 200)
    assert (detector.scores_ > detector.threshold_at(0.1)).double().mean() <= 0.1
    share = detector.predict(pictures(400, seed=5), fpr=0.1).double().mean().item()
    assert share <= 0.1 + 4 * math.sqrt(0.09 / n + 0.09 / 400)


@pytest.mark.parametrize("name", ["strip", "teco", "k-distance", "slof", "mahalanobis", "by class", "dao"])
def test_triggered_images_score_higher(name: str) -> None:
    detector = EVERY[name].fit(CLEAN)
    assert auroc(detector.score(FRESH), detector.score(TRIGGERED)) > 0.9


@each
def test_bad_input_is_refused(name: str) -> None:
    import copy

    unfitted = copy.copy(EVERY[name])
    if hasattr(unfitted, "scores_"):
        del unfitted.scores_
    for use in (lambda: unfitted.score(FRESH), lambda: unfitted.threshold_at(0.1)):
        with pytest.raises(NotFittedError):
            use()
    detector = EVERY[name].fit(CLEAN)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]; received 0.*leave the normalisation"):
        detector.score(FRESH * 10)
    with pytest.raises(ValueError, match=r"\[batch, 3, h, w\]; received \[3, 8, 8\]"):
        detector.score(FRESH[0])
    with pytest.raises(ValueError, match=r"at least 9999 clean images to calibrate.*fit on more"):
        detector.threshold_at(0.0001)
    with pytest.raises(ValueError, match=r"in \(0, 1\); received 0.0"):
        detector.threshold_at(0.0)
    with pytest.raises(ValueError, match=r"clean images"):
        EVERY[name].fit(CLEAN[:0])
    EVERY[name].fit(CLEAN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strip", r"at least 40 clean images, half of them to lay over others; 5 were left"),
        (
            "k-distance",
            r"at least 12 clean images, half of them to be neighbours, 5 of each other; 5 were left",
        ),
        ("mahalanobis", r"at least 20 clean images, half of them to estimate a covariance from; 5 were left"),
    ],
)
def test_too_few_images_say_how_many_it_takes(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EVERY[name].fit(CLEAN[:10])
    EVERY[name].fit(CLEAN)


def test_one_class_is_refused() -> None:
    for kind in (STRIP, ScaleUp, TeCo):
        with pytest.raises(ValueError, match=r"at least 2 classes; received 1"):
            kind(Means(), CLASSIFIER[:1])
    with pytest.raises(
        ValueError, match=r"expected descriptions \[3, 3\], one of each class; received \[2, 3\]"
    ):
        BDetCLIP(Means(), CLASSIFIER, CLASSIFIER[:2], CLASSIFIER[0])


# By hand


def test_strip_is_minus_the_mean_entropy() -> None:
    detector = STRIP(Means(), CLASSIFIER, n=7, seed=3).fit(CLEAN)
    assert detector.forwards == 7 and len(detector.overlays_) == 7
    x, model = FRESH[4], Means()
    entropies = []
    for overlay in detector.overlays_:
        feature = model.encode_image((0.5 * x + 0.5 * overlay)[None])
        p = (math.exp(3.0) * feature / feature.norm()).softmax(1)[0]
        entropies.append(-(p * p.log()).sum())
    assert detector.score(x[None]).item() == pytest.approx(-torch.stack(entropies).mean().item(), abs=1e-5)
    other = STRIP(Means(), CLASSIFIER, n=7, seed=4).fit(CLEAN)
    assert not torch.equal(other.overlays_, detector.overlays_)


def test_scale_up_counts_the_copies_that_keep_the_label() -> None:
    images = torch.full((2, 3, 4, 4), 0.05)
    images[0, 0] = 0.08  # red wins until all are cut at 1; then the first of equals, which is red
    images[1, 2] = 0.3  # blue is cut at 1 from n = 5 on: 0.25 at 5 is less; at 11 the others reach 0.55
    detector = ScaleUp(Means(), CLASSIFIER, factors=(2, 100)).fit(images.repeat(2, 1, 1, 1))
    images[0, 0], images[1, 2] = 0.08, 0.3
    assert detector.score(images).tolist() == [1.0, 0.5]
    assert detector.forwards == 3


def test_teco_finds_the_lowest_severity_that_flips() -> None:
    detector = TeCo(Means(), CLASSIFIER, seed=2).fit(CLEAN[:20])
    assert detector.forwards == 61
    flips, model = detector.flips(FRESH[:6]), Means()
    for i in range(6):
        label = model.encode_image(FRESH[i : i + 1]).argmax()
        for column, corruption in enumerate(CORRUPTIONS):
            severities = [
                s
                for s in range(1, 6)
                if model.encode_image(corruption(FRESH[i : i + 1], s, seed=2)).argmax() != label
            ]
            assert flips[i, column] == (min(severities) if severities else NEVER)
    assert detector.score(FRESH[:6]).tolist() == pytest.approx(flips.numpy().std(1).tolist())


def test_bdetclip_compares_with_what_belongs_to_the_answer() -> None:
    unrelated = torch.tensor([0.6, 0.8, 0.0])
    descriptive = torch.nn.functional.normalize(CLASSIFIER + 0.2, dim=1)
    detector = BDetCLIP(Means(), CLASSIFIER, descriptive, unrelated).fit(CLEAN)
    feature = torch.nn.functional.normalize(Means().encode_image(FRESH[1:2]), dim=1)[0]
    assert feature.argmax() == 1
    expected = feature @ unrelated - feature @ descriptive[1]
    assert detector.score(FRESH[1:2]).item() == pytest.approx(expected.item(), abs=1e-6)
    made, other = prompts(lambda texts: torch.tensor([[float(len(t)), 1.0] for t in texts]), ["cat", "horse"])
    assert made.shape == (2, 2) and other.shape == (2,)
    assert torch.allclose(made.norm(dim=1), torch.ones(2))


def _bank() -> np.ndarray:
    features = Means().encode_image(CLEAN[learnt(torch.arange(200))])
    return torch.nn.functional.normalize(features, dim=1).double().numpy()


def _slow(kind: type[Detector], x: np.ndarray, k: int = 5) -> float:
    """The definitions, one point at a time."""
    bank = _bank()

    def nearest(point: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances = np.linalg.norm(others - point, axis=1)
        places = distances.argsort()[:k]
        return distances[places], places

    def dimension(distances: np.ndarray) -> float:
        return -1 / np.mean([math.log(d / distances[-1]) for d in distances])

    distances, places = nearest(x, bank)
    own = [nearest(bank[p], np.delete(bank, p, axis=0))[0] for p in places]
    match kind.__name__:
        case "KDistance":
            return distances[-1]
        case "SLOF":
            return float(np.mean([distances[-1] / d[-1] for d in own]))
        case "LID":
            return dimension(distances)
        case _:
            return math.log(np.mean([(distances[-1] / d[-1]) ** dimension(d) for d in own]))


@pytest.mark.parametrize("kind", [KDistance, SLOF, LID, DAO])
def test_densities_are_their_definitions(kind: type) -> None:
    detector = kind(Means(), k=5).fit(CLEAN)
    images = torch.cat([FRESH[:5], TRIGGERED[:2]])
    points = torch.nn.functional.normalize(Means().encode_image(images), dim=1).double().numpy()
    assert detector.score(images).tolist() == pytest.approx([_slow(kind, x) for x in points], rel=1e-4)
    assert isinstance(detector.bank_, NearestNeighbors)


def test_a_calibrated_threshold_is_the_conformal_one() -> None:
    scores = torch.arange(1.0, 100.0)
    assert calibrated(scores, 0.05) == 95
    assert calibrated(scores, 0.01) == 99
    with pytest.raises(ValueError, match=r"at least 199 clean images"):
        calibrated(scores, 0.005)


# Corruptions


# How many lines are lost is drawn anew for each severity: of few lines, a greater one may lose fewer.
GROWING = (*CORRUPTIONS, *(kind for kind in PATTERNS if kind.name != "lost_lines"))


@pytest.mark.parametrize("corruption", GROWING, ids=lambda c: c.name)
def test_a_corruption_grows_with_its_severity_and_leaves_the_image_alone(corruption) -> None:
    images = Shapes(6, seed=3).draw(range(6)).images
    before, misses = images.clone(), []
    for severity in range(1, 6):
        made = corruption(images, severity)
        assert torch.equal(images, before)
        assert made.shape == images.shape and made.min() >= 0 and made.max() <= 1
        assert torch.equal(made, corruption(images, severity))
        torch.testing.assert_close(made[2:3], corruption(images[2:3], severity))
        misses.append((made - images).abs().mean().item())
    assert misses[0] > 0.001 and misses[4] > misses[0]
    assert all(b > 0.7 * a for a, b in itertools.pairwise(misses))
    with pytest.raises(ValueError, match=r"a severity of 1..5; received 6"):
        corruption(images, 6)


def test_the_twelve_are_the_paper_s() -> None:
    assert [c.name for c in CORRUPTIONS] == [
        "elastic_transform", "gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "snow", "frost", "fog",
        "brightness", "contrast", "pixelate", "jpeg_compression",
    ]  # fmt: skip


def test_patterns_are_what_their_names_say() -> None:
    grey = torch.full((1, 3, 16, 24), 0.5)
    made = {kind.name: kind(grey, 3)[0, 0] - 0.5 for kind in PATTERNS}
    for period in (2, 4, 8):
        half = period // 2
        turns = torch.tensor([1.0, -1.0]).repeat_interleave(half)
        torch.testing.assert_close(
            made[f"rows_{period}"], 0.2 * turns.repeat(16 // period)[:, None].expand(-1, 24)
        )
        torch.testing.assert_close(made[f"columns_{period}"], 0.2 * turns.repeat(24 // period).expand(16, -1))
        torch.testing.assert_close(
            made[f"chequer_{period}"], made[f"rows_{period}"] * made[f"columns_{period}"] / 0.2
        )
    for cycles in (3, 6):
        for name, line in (
            ("at_0", made[f"sine_{cycles}_at_0"][0]),
            ("at_90", made[f"sine_{cycles}_at_90"][:, 0]),
        ):
            assert int(torch.fft.rfft(line).abs().argmax()) == cycles, name
    assert {round(float(row.unique()), 3) for row in made["lost_lines"]} <= {0.0, -0.5}


# On a real model


def test_every_registered_detector_runs_and_tells_clean_from_clean_by_chance() -> None:
    model = decompclip.load("shapes")
    classifier = model.zero_shot_classifier()
    clean = Shapes(160, seed=71)
    one, other = (Shapes(80, seed=seed).draw(range(80)).images for seed in (72, 73))
    for name, make in DETECTORS.items():
        if name in {"STRIP", "TeCo"}:  # 60 passes an image: tested above
            continue
        detector = make(model, classifier).fit(clean)
        area = auroc(detector.score(one), detector.score(other))
        assert abs(area - 0.5) < 4 * math.sqrt(161 / (12 * 80 * 80)), name
        assert detector.forwards >= 1 and detector.threshold_at(0.1) <= detector.scores_.max()


def test_a_detector_of_several_passes_calibrates_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all images alike, whatever the batches; one of a single pass on all."""
    monkeypatch.setattr("decompclip.defenses.detectors.detector.CALIBRATION", 50)
    whole, parts = (TeCo(Means(), CLASSIFIER).fit(x) for x in (CLEAN, CLEAN.split(7)))
    drawn = torch.rand(len(CLEAN), generator=torch.Generator().manual_seed(0)).argsort()[:50]
    assert torch.equal(whole.scores_, whole.score(CLEAN[drawn]).sort().values)
    assert torch.equal(whole.scores_, parts.scores_)
    single = BDetCLIP(Means(), CLASSIFIER, CLASSIFIER, torch.tensor([1.0, 0.0, 0.0])).fit(CLEAN)
    assert len(single.scores_) == len(CLEAN)


def test_terms_are_handed_on_batch_by_batch() -> None:
    """No more than one batch is held: earlier ones are gone when the next is asked for."""
    alive: list[int] = []

    class Streaming:
        def fit(self, clean: Iterable[Decomposition]) -> None:
            seen = []
            for d in clean:
                seen.append(weakref.ref(d))
                del d
                gc.collect()
                alive.append(sum(ref() is not None for ref in seen[:-1]))

        def score(self, d: Decomposition) -> Tensor:
            return d.features[:, 0]

        def predict(self, d: Decomposition) -> Tensor:
            return self.score(d) > 0

    model = decompclip.load("shapes")
    OnTerms(model, Streaming(), batch_size=16).fit(Shapes(80, seed=71))
    assert alive == [0] * 5
    with pytest.raises(ValueError, match=r"at least 20 clean images.*were left to learn from"):
        OnTerms(model, Streaming()).fit(Shapes(12, seed=71))


def test_a_detector_of_terms_scores_what_it_scores_on_terms() -> None:
    model = decompclip.load("shapes")
    clean = Shapes(60, seed=71).draw(range(60)).images
    inner = DecompDet(similarity="cosine", threshold="quantile", quantile=0.2)
    outer = OnTerms(model, inner, batch_size=16).fit(clean)
    fresh = (
        Shapes(20, seed=72).draw(range(20)).images
    )  # a clean image that a quantile rests on would be a tie
    with torch.no_grad():
        d = model.decompose(model.normalize(fresh), normalize=True)
    assert torch.equal(outer.score(fresh), inner.score(d).double())


def test_cost_is_in_forward_passes() -> None:
    model = decompclip.load("shapes")
    images = Shapes(32, seed=71).draw(range(32)).images
    scale_up = ScaleUp(model, model.zero_shot_classifier()).fit(images)
    assert scale_up.forwards == 6 and 3 < measure_cost(scale_up, images, repeats=2) < 15
    with pytest.raises(ValueError, match=r"received 0 images"):
        measure_cost(scale_up, images[:0])


def test_a_detector_that_calibrates_itself_gets_all_images() -> None:
    model = decompclip.load("shapes")
    clean = Shapes(140, seed=71)
    outer = OnTerms(model, AgnosticDet(model.zero_shot_classifier())).fit(clean)
    assert len(outer.scores_) == 140
    assert outer.threshold_at(0.05) == outer.detector.threshold_at(0.05)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"expected at least 50 clean images, .* received 8"):
        outer.fit(Shapes(8, seed=71))


def test_one_protocol_for_detectors_of_pixels_and_of_terms() -> None:
    for detector in (*EVERY.values(), AgnosticDet(CLASSIFIER), DecompDet()):
        assert isinstance(detector, DetectorLike)
    assert list(DETECTORS) == [
        *("STRIP", "SCALE-UP", "TeCo", "BDetCLIP", "k-distance", "SLOF", "LID", "DAO", "Mahalanobis"),
        *("Mahalanobis by class", "Decomp-Det (paper)", "Decomp-Det (cosine, quantile)", "agnostic", "token"),
    ]  # the order of committed results
