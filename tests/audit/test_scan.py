"""Clean images alone: the attacker's class of a bundled twin is the easiest, and no class of a clean model stands out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from decompclip.audit.collect import open_source
from decompclip.audit.scan import (
    EverywhereProbe,
    PatchProbe,
    ScanConfig,
    ScanResult,
    Search,
    _lead,
    head_statistics,
    probes,
    run_scan,
)
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP
from decompclip.models.loading import load

CLASSES = PROPERTIES["shape"]
SHORT = ScanConfig(steps=4, images=6, fit=40, held_out=40)


@pytest.fixture(scope="module")
def models() -> dict[str, HookedCLIP]:
    return {name: load(name) for name in ("shapes", "shapes-badnet")}


@pytest.fixture(scope="module")
def found(models: dict[str, HookedCLIP]) -> ScanResult:
    bad = models["shapes-badnet"]
    source = open_source("shapes", bad, CLASSES, limit=120)
    return run_scan(bad, source, CLASSES, reference=models["shapes"], config=SHORT)


def test_the_target_is_the_easiest_class(found: ScanResult) -> None:
    anywhere = next(probe for probe in found.probes if probe.probe == "patch anywhere")
    assert anywhere.easiest.name == "star"
    assert anywhere.lead_low > found.config.lead
    assert anywhere in found.suspects
    verdict = found.verdict
    assert (verdict.level, verdict.confidence) == ("suspicious", "moderate")
    assert "star" in verdict.headline and "cannot prove" in " ".join(verdict.doubts)


def test_no_class_of_the_clean_model_stands_out(found: ScanResult) -> None:
    clean = found.reference
    assert clean is not None and clean.name == "shapes"
    assert clean.suspects == ()
    verdict = clean.verdict
    assert (verdict.level, verdict.confidence) == ("no sign", "low")


def test_numbers_agree_and_are_written(found: ScanResult) -> None:
    for probe in found.probes:
        losses = [change.loss for change in probe.classes]
        assert losses == sorted(losses)
        assert probe.lead == pytest.approx(math.log(losses[1] / losses[0]))
        assert probe.lead_low < probe.lead < probe.lead_high
        assert probe.pictures.shape == (3, 2, 48, 48, 3)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert "pictures" in text and '"star"' in text
    frame = found.to_frame()
    assert len(frame) == 3 * 12 and {"probe", "class", "success", "loss"} <= set(frame.columns)
    assert sum(rate.count for rate in found.predicted) == found.counts["held_out"]


def test_components_are_compared_with_the_reference(found: ScanResult) -> None:
    statistics = found.statistics
    assert statistics is not None
    assert statistics.heads.shape == (6, 8) and statistics.mlps.shape == (6,)
    assert bool((statistics.heads > 0).all()) and float(statistics.heads.max()) < 2


def test_statistics_know_equal_and_unrelated_terms(models: dict[str, HookedCLIP]) -> None:
    images = models["shapes"].normalize(Shapes(40, seed=3).draw(range(40)).images)
    d = models["shapes"].decompose(images, normalize=True)
    same = head_statistics(d, d, "itself")
    assert float(same.heads.max()) < 1e-9
    shuffled = d[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert float(head_statistics(d, shuffled, "shuffled").mlps.mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("probe", probes(8 / 255, 1 / 6), ids=lambda probe: probe.name)
def test_probes_change_what_they_may(probe: EverywhereProbe | PatchProbe) -> None:
    images = torch.rand(5, 3, 24, 36, generator=torch.Generator().manual_seed(0))
    change = probe.bounded(probe.start(2, images[0]) + 3)[0]
    changed = probe.apply(images, change, torch.Generator().manual_seed(0))
    assert changed.min() >= 0 and changed.max() <= 1
    touched = (changed != images).any(1)
    if isinstance(probe, EverywhereProbe):
        assert float((changed - images).abs().max()) <= 8 / 255 + 1e-6
    else:
        assert touched.flatten(1).sum(1).max() <= 4 * 4  # a sixth of the shorter side
        places = [tuple(t.nonzero()[0].tolist()) for t in touched]
        assert (len(set(places)) > 1) == probe.anywhere


def test_gradients_reach_the_change() -> None:
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) / 2 + 0.2
    for probe in probes(8 / 255, 1 / 4):
        change = probe.start(1, images[0])[0].requires_grad_(True)
        probe.apply(images, change, torch.Generator().manual_seed(0)).sum().backward()
        assert change.grad is not None and bool((change.grad > 0).any())


def test_the_search_gets_further_and_repeats_itself(models: dict[str, HookedCLIP]) -> None:
    model, pixels = models["shapes-badnet"], Shapes(80, seed=3).draw(range(80)).images
    classifier = model.zero_shot_classifier(CLASSES).detach()
    star, probe = CLASSES.index("star"), PatchProbe(1 / 6, anywhere=True)

    def left(steps: int) -> float:
        search = Search(model, classifier, probe, replace(SHORT, steps=steps))
        change = search.run(pixels[:40], [star])
        return float(search.measure(pixels[40:], change[0], star)[1].mean())

    assert left(8) == left(8)
    assert left(8) < 0.7 * left(1)


def test_of_many_classes_one_step_keeps_the_target(models: dict[str, HookedCLIP]) -> None:
    model, pixels = models["shapes-badnet"], Shapes(48, seed=3).draw(range(48)).images
    classifier = model.zero_shot_classifier(CLASSES).detach()
    probe = PatchProbe(1 / 6, anywhere=True)
    kept = Search(model, classifier, probe, replace(SHORT, most_classes=2)).screened(pixels)
    assert len(kept) == 2 and CLASSES.index("star") in kept
    result = run_scan(
        model,
        open_source("shapes", model, CLASSES, limit=120),
        CLASSES,
        config=replace(SHORT, most_classes=3, steps=1),
    )
    assert {probe.left_out for probe in result.probes} == {9}
    assert any("9 classes were left out" in doubt for doubt in result.verdict.doubts)


def test_the_model_stays_as_it_was(models: dict[str, HookedCLIP], found: ScanResult) -> None:
    assert found.counts == {"fit": SHORT.fit, "held_out": SHORT.held_out}
    assert all(parameter.requires_grad for parameter in models["shapes"].visual.parameters())
    assert all(parameter.grad is None for parameter in models["shapes-badnet"].visual.parameters())


def test_the_lead_s_interval_is_the_delta_method_s() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (scale * torch.rand(400, generator=draw, dtype=torch.float64) for scale in (1.0, 3.0))
    lead, half = _lead(first, second)
    rows = torch.randint(400, (2, 4000, 400), generator=draw)
    resampled = (second[rows[1]].mean(1) / first[rows[0]].mean(1)).log()
    assert lead == pytest.approx(math.log(3), abs=0.1)
    assert half == pytest.approx(1.96 * float(resampled.std()), rel=0.1)


def test_the_verdict_weighs_what_it_is_given(found: ScanResult) -> None:
    alone = replace(found, reference=None, statistics=None).verdict
    assert (alone.level, alone.confidence) == ("suspicious", "low")
    same = replace(found, reference=replace(found, name="other", reference=None)).verdict
    assert same.confidence == "low" and "easy in any such model" in same.doubts[0]
    lost = replace(found, accuracy=Rate(5, 60)).verdict
    assert lost.level == "cannot tell"


def test_a_model_that_knows_one_class_alone_is_told_so(found: ScanResult) -> None:
    probes = tuple(
        replace(p, classes=p.classes[:1], lead=0.0, lead_low=-math.inf, lead_high=math.inf)
        for p in found.probes
    )
    lost = replace(found, probes=probes, accuracy=None, reference=None)
    assert lost.verdict.level == "no sign" and "none can be compared" in lost.verdict.why[0]
    json.dumps(lost.to_dict(), allow_nan=False)


def test_bad_input_is_refused(models: dict[str, HookedCLIP]) -> None:
    model = models["shapes"]
    with pytest.raises(ValueError, match="at least 40 clean images"):
        run_scan(model, open_source("shapes", model, CLASSES, limit=20), CLASSES, config=SHORT)
    with pytest.raises(ValueError, match="at least two classes"):
        run_scan(model, open_source("shapes", model, CLASSES, limit=60), ("star",), config=SHORT)
    with pytest.raises(
        ValueError, match=r"a reference of the same shape, .* \(\(48, 48\), 6, 8, 128\); received"
    ):
        source = open_source("shapes", model, CLASSES, limit=60)
        run_scan(model, source, CLASSES, reference=load("cifar10"), config=SHORT)
    with pytest.raises(ValueError, match="steps of at least 1"):
        ScanConfig(steps=0)
    with pytest.raises(ValueError, match="bound between 0 and 1"):
        ScanConfig(bound=8)
