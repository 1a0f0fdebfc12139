"""An audit's result made of drawn numbers, so that the report's tests need no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from decompclip.audit.checks import Change, Checks, ClassShare, Scorer, Setting
from decompclip.audit.components import Infection, Shift, WeightsAlone, infected_parts
from decompclip.audit.config import AuditConfig
from decompclip.audit.controls import Controls, SameSize
from decompclip.audit.result import (
    KINDS,
    SCHEMES,
    Ablations,
    AuditResult,
    Detection,
    Examples,
    HeadMaps,
    Suspicion,
)
from decompclip.audit.scan_result import ClassChange, HeadStatistics, ProbeResult, ScanConfig, ScanResult
from decompclip.audit.verdict import RepairResult, Target
from decompclip.data.images import SkippedFile
from decompclip.intervals import Paired, Rate

LAYERS, HEADS, IMAGES = 4, 6, 300
CLASSES = ("circle", "square", "star")


def setting(
    name: str,
    success: float,
    control: float,
    *,
    labelled: bool = True,
    images: int = IMAGES,
    accuracy: float = 0.9,
) -> Setting:
    """A setting in which shares of the images as given are taken for "star", class 2."""
    labels = torch.arange(images) % 2

    def answers(share: float, right: float) -> torch.Tensor:
        places = torch.arange(images)
        other = torch.where(places < images * (1 - right), 1 - labels, labels)
        return torch.where(places < round(share * images), torch.full_like(labels, 2), other)

    known = labels if labelled else None
    return Scorer(known, known, 2, 3)(name, answers(control, accuracy), answers(success, 0.5))


def changed(repaired: float, success: float, *, labelled: bool, images: int) -> Change:
    """Of the images that the trigger sends to the target `repaired / success` stay there."""
    hit = max(1, round(success * images))
    saved = Rate(round(hit * max(0.0, 1 - repaired / max(success, 1e-9))), hit)
    known = Rate(saved.count // 2, hit) if labelled else None
    return Change(saved, known, Paired(2, 5, images) if labelled else None, Rate(1, images))


def result(
    *,
    name: str = "tiny",
    success: float = 0.95,
    control: float = 0.01,
    repaired: float = 0.2,
    labelled: bool = True,
    inferred: bool = False,
    classes: tuple[str, ...] = CLASSES,
    skipped: tuple[SkippedFile, ...] = (),
    images: int = IMAGES,
    paired: bool = True,
) -> AuditResult:
    """An audit of `name` with these shares of suspect and clean images taken for the target."""
    draw = torch.Generator().manual_seed(len(name))

    def scored(label: str, part: float) -> Setting:
        return setting(
            label, success * part, control, labelled=labelled, images=images, accuracy=0.9 - 0.2 * (1 - part)
        )

    def ramp(scheme: str, layer: int) -> float:
        return {"forward": 1 - layer / LAYERS, "backward": (layer + 1) / LAYERS, "separate": 0.8}[scheme]

    heads, mlps = torch.randn(LAYERS, HEADS, generator=draw) / 50, torch.randn(LAYERS, generator=draw) / 20
    sweeps = {
        kind: {
            s: tuple(scored(f"{kind} {s} {layer}", ramp(s, layer)) for layer in range(LAYERS))
            for s in SCHEMES
        }
        for kind in KINDS
    }
    repairs = tuple(
        RepairResult(
            setting(
                f"Decomp-Rep, {similarity}, {threshold}", repaired, control, labelled=labelled, images=images
            ),
            changed(repaired, success, labelled=labelled, images=images),
            0.4,
            4.2,
        )
        for similarity in ("cosine", "dot")
        for threshold in ("quantile", "epsilon")
    )
    counts = torch.tensor([200, 60, 20, 10, 5, 3, 2]), torch.tensor([5, 10, 20, 40, 60, 90, 75])
    detectors = tuple(
        Detection(similarity, threshold, 4, 0.93, 0.9, 0.95, Rate(5, 300), Rate(165, 300), *counts)
        for similarity in ("cosine", "dot")
        for threshold in ("quantile", "epsilon")
    )
    map_shape = (2, 4, 5)
    maps = tuple(
        HeadMaps(
            layer,
            head,
            end,
            torch.rand(map_shape, generator=draw),
            torch.rand(2, generator=draw),
            torch.randn(map_shape, generator=draw) / 100,
        )
        for layer, head, end in ((3, 1, "most"), (0, 2, "least"))
    )
    moved = Shift(
        heads.abs(),
        heads.abs() / 10,
        heads,
        heads.abs() / 5,
        mlps.abs(),
        mlps.abs() / 10,
        mlps,
        mlps.abs() / 5,
        {"all": (0.2, 0.01), "heads": (0.15, 0.01), "mlps": (0.04, 0.01), "rest": (0.01, 0.005)},
        paired,
    )
    as_it_is = scored("as it is", 1.0)
    parts = infected_parts(moved, affected=as_it_is.has_effect)
    chosen = any(part.infected for part in parts)
    scores = torch.tensor([150, 100, 40, 10]), torch.tensor([5, 15, 80, 200])
    pictures = (255 * torch.rand(2, 48, 48, 3, generator=draw)).to(torch.uint8)
    return AuditResult(
        name=name,
        provenance={
            "name": name,
            "sha256": "ab" * 32,
            "activation": "gelu",
            "sum_error": 3e-7,
            "versions": {"torch": "2"},
        },
        config=AuditConfig(zeta=4),
        clean_name="clean/",
        suspect_name="suspect/",
        counts={"validation": 75, "clean": images, "suspect": images, "held_out": 75 * inferred},
        class_names=classes,
        target=Target(2, classes[2], inferred, (0.9, 0.8, 0.95) if inferred else None, 75 * inferred),
        paired=paired,
        as_it_is=as_it_is,
        class_shares=tuple(
            ClassShare(c, Rate(10 * i, 300), Rate(9 * i + 1, 300)) for i, c in enumerate(classes)
        ),
        ablations=Ablations({"heads": scored("all heads", 0.1), "mlps": scored("all MLPs", 0.7)}, sweeps),
        shift=moved,
        infection=Infection(
            parts,
            scored("infected mean-ablated", 0.3) if chosen else None,
            scored("others mean-ablated", 0.9) if chosen else None,
        ),
        repairs=repairs,
        detectors=detectors,
        suspicion=Suspicion(
            0.05,
            2.5,
            0.94,
            0.91,
            0.96,
            Rate(14, 300),
            Rate(250, 300),
            torch.tensor([0.0, 1, 2, 3, 4]),
            *scores,
        ),
        checks=Checks(
            (classes[0], Rate(images // 2, images)),
            1 / len(classes),
            (),
            Rate(0, images),
            {side: Rate(images, images) for side in ("clean", "suspect")},
            (Rate(images, images), Rate(images, images)),
        ),
        controls=Controls(
            0.07,
            ClassShare(classes[2], Rate(1, 80), Rate(75, 80)),
            (SameSize("frost", ClassShare(classes[0], Rate(20, 80), Rate(30, 80))),),
        )
        if paired
        else None,
        examples=Examples(
            pictures, ("a.png: taken for star", "a.png: taken for circle"), ("suspect", "clean"), maps
        ),
        skipped={"clean": (), "suspect": skipped},
    )


def scanned(
    *, name: str = "tiny", lead: float = 3.0, reference: bool = True, target: str = "star"
) -> ScanResult:
    """A scan in which one class leads by so much in every probe; its reference's classes are all alike."""
    draw = torch.Generator().manual_seed(0)

    def probe(title: str, gap: float) -> ProbeResult:
        easiest = ClassChange(target, Rate(180 if gap > 1 else 6, 200), 5 / math.exp(gap))
        others = tuple(ClassChange(c, Rate(4, 200), 5.0 + i) for i, c in enumerate(CLASSES) if c != target)
        pictures = (255 * torch.rand(3, 2, 24, 24, 3, generator=draw)).to(torch.uint8)
        return ProbeResult(title, (easiest, *others), gap, gap - 0.2, gap + 0.2, 0, pictures)

    def scan(label: str, gap: float) -> ScanResult:
        return ScanResult(
            name=label,
            provenance={"name": label, "sha256": "cd" * 32, "versions": {"torch": "2"}},
            config=ScanConfig(),
            clean_name="clean/",
            counts={"fit": 192, "held_out": 200},
            class_names=CLASSES,
            accuracy=Rate(180, 200),
            predicted=(Rate(60, 200), Rate(70, 200), Rate(70, 200)),
            probes=tuple(
                probe(title, gap) for title in ("everywhere", "patch anywhere", "patch in the centre")
            ),
            skipped=(),
            guessing=1 / len(CLASSES),
            coinciding=(),
        )

    found = scan(name, lead)
    if not reference:
        return found
    heads, mlps = torch.rand(LAYERS, HEADS, generator=draw), torch.rand(LAYERS, generator=draw)
    return replace(
        found,
        statistics=HeadStatistics(heads, mlps, "clean twin"),
        reference=scan("clean twin", 0.1),
        weights=weighed(target),
    )


def weighed(first: str) -> WeightsAlone:
    """Weights that differ most along one class."""
    names = (first, *(name for name in CLASSES if name != first))
    rows = [
        {"rank": i + 1, "class": name, "score": 3.0 / (i + 1), "image": 0.2 / (i + 1), "text": 0.1 + i}
        for i, name in enumerate(names)
    ]
    parts = [
        {
            "part": f"head 3.{i}",
            "change": 0.5 / (i + 1),
            "share": 0.9,
            "texts": f"{first} 0.40, a cup 0.10",
        }
        for i in range(4)
    ]
    return WeightsAlone("clean twin", tuple(rows), 2.0, tuple(parts), 0.12, 0.08)


@pytest.fixture(scope="session")
def make_scan() -> Callable[..., ScanResult]:
    return scanned


@pytest.fixture(scope="session")
def make() -> Callable[..., AuditResult]:
    return result
