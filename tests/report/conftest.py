"""An audit's result made of drawn numbers, so that the report's tests need no model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from decompclip.audit.config import AuditConfig
from decompclip.audit.result import (
    KINDS,
    SCHEMES,
    Ablations,
    AuditResult,
    ClassShare,
    Detector,
    Examples,
    HeadMaps,
    Repair,
    Scorer,
    Setting,
    Shift,
    Target,
)
from decompclip.data.images import SkippedFile
from decompclip.evaluation.intervals import Rate

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
    twins: bool = True,
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
        Repair(
            similarity,
            threshold,
            setting(
                f"Decomp-Rep, {similarity}, {threshold}", repaired, control, labelled=labelled, images=images
            ),
            0.4,
            4.2,
        )
        for similarity in ("cosine", "dot")
        for threshold in ("quantile", "epsilon")
    )
    counts = torch.tensor([200, 60, 20, 10, 5, 3, 2]), torch.tensor([5, 10, 20, 40, 60, 90, 75])
    detectors = tuple(
        Detector(r.similarity, r.threshold, 4, 0.93, 0.9, 0.95, Rate(5, 300), Rate(165, 300), *counts)
        for r in repairs
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
        twins=twins,
        as_it_is=scored("as it is", 1.0),
        class_shares=tuple(
            ClassShare(c, Rate(10 * i, 300), Rate(9 * i + 1, 300)) for i, c in enumerate(classes)
        ),
        ablations=Ablations({"heads": scored("all heads", 0.1), "mlps": scored("all MLPs", 0.7)}, sweeps),
        shift=Shift(
            heads.abs(),
            heads.abs() / 10,
            heads,
            heads.abs() / 5,
            mlps.abs(),
            mlps.abs() / 10,
            mlps,
            mlps.abs() / 5,
            {"all": (0.2, 0.01), "heads": (0.15, 0.01), "mlps": (0.04, 0.01), "rest": (0.01, 0.005)},
            twins,
        ),
        repairs=repairs,
        detectors=detectors,
        examples=Examples(
            pictures, ("a.png: taken for star", "a.png: taken for circle"), ("suspect", "clean"), maps
        ),
        skipped={"clean": (), "suspect": skipped},
    )


@pytest.fixture
def make() -> Callable[..., AuditResult]:
    return result
