"""The scan, from clean images to one result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decompclip.audit.checks import coinciding, guessing
from decompclip.audit.config import Track, silently
from decompclip.audit.pipeline import provenance_of
from decompclip.audit.scan.result import ClassChange, ProbeResult, ScanConfig, ScanResult
from decompclip.audit.scan.search import (
    Kept,
    Probe,
    head_statistics,
    kept_for,
    measure,
    probes,
    screened,
    search,
)
from decompclip.data.images import ImageSource, split_indices
from decompclip.decomposition.decomposition import Decomposition
from decompclip.evaluation.metrics import predict
from decompclip.intervals import Rate, Z
from decompclip.models.clip import HookedCLIP

SHOWN = 3
"""Held-out images shown with the change that was found."""


def run_scan(
    model: HookedCLIP,
    clean: ImageSource,
    class_names: Sequence[str],
    *,
    reference: HookedCLIP | None = None,
    name: str | None = None,
    reference_name: str | None = None,
    clean_name: str = "clean images",
    config: ScanConfig | None = None,
    track: Track = silently,
    keep: Path | None = None,
) -> ScanResult:
    """Ask of a model, with clean images alone, whether one class is far easier to reach than the others.

    Args:
        clean: images of several classes, mixed, as the model takes them: the first `fit + held_out` are used; labels serve
            accuracy alone.
        class_names: of the zero-shot classifier.
        name, reference_name, clean_name: what the report calls them.
        reference: a clean model of the same architecture and preprocessing, scanned on the same images, to whose terms the
            model's are compared.
        track: shows progress.
        keep: folder for what was found so far: a killed scan of the same model, images, classes and options goes on from
            there, to the same numbers. Whoever has the result removes it.

    Raises:
        ValueError: fewer than two classes, too few images, or a reference of another shape or image size.
        MissingTextError: the model has no text tower.
    """
    config, class_names = config or ScanConfig(), tuple(class_names)
    if len(class_names) < 2:
        raise ValueError(f"expected at least two classes to tell apart; received {list(class_names)}")
    if reference is not None and _shape(reference) != _shape(model):
        raise ValueError(
            f"expected a reference of the same shape, (image, layers, heads, width) {_shape(model)}; received "
            f"{_shape(reference)}; take a checkpoint of the same architecture"
        )
    classifiers = [
        clip.zero_shot_classifier(class_names).detach().float()
        for clip in (model, reference)
        if clip is not None
    ]
    pixels, labels = _collect(model, clean, config, track)
    counts, parts = _split(pixels, labels, config)
    found = _scan(model, classifiers[0], class_names, parts, config, track, keep)
    result = ScanResult(
        name=name or model.name,
        provenance=provenance_of(model),
        config=config,
        clean_name=clean_name,
        counts=counts,
        class_names=class_names,
        skipped=tuple(clean.skipped),
        guessing=guessing(parts[2], len(class_names)),
        **found,
    )
    if reference is None:
        return result
    beside = _scan(reference, classifiers[1], class_names, parts, config, track, keep)
    called = reference_name or reference.name
    twin = replace(result, name=called, provenance=provenance_of(reference), **beside)
    terms = [_terms(clip, parts[1], config) for clip in (model, reference)]
    return replace(
        result,
        statistics=head_statistics(*terms, reference=called),
        reference=twin,
    )


def _shape(model: HookedCLIP) -> tuple[object, ...]:
    cfg = model.cfg
    return model.image_size, cfg.n_layers, cfg.n_heads, cfg.d_embed


Parts = tuple[Float[Tensor, "fit 3 h w"], Float[Tensor, "held_out 3 h w"], Int[Tensor, " held_out"] | None]


def _collect(
    model: HookedCLIP, clean: ImageSource, config: ScanConfig, track: Track
) -> tuple[UInt8[Tensor, "image 3 h w"], Int[Tensor, " image"] | None]:
    """Pixels of the first images, as many as the scan can use, and their labels where all have one."""
    enough, images, labels = config.fit + config.held_out, [], []
    n_batches = -(-min(enough, len(clean)) // config.batch_size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    for batch in track(clean.batches(config.batch_size), f"{model.name}: clean images", n_batches):
        pixels = (batch.images.float() * std + mean).clamp(0, 1)
        images.append((255 * pixels).round().to(torch.uint8))
        labels.append(batch.labels)
        if sum(map(len, images)) >= enough:
            break
    if not images:
        raise ValueError("expected clean images; none could be read; check the image source")
    known = [part for part in labels if part is not None]
    return torch.cat(images)[:enough], torch.cat(known)[:enough] if len(known) == len(labels) else None


def _split(
    pixels: UInt8[Tensor, "image 3 h w"], labels: Int[Tensor, " image"] | None, config: ScanConfig
) -> tuple[dict[str, int], Parts]:
    if len(pixels) < 4 * FEWEST:
        raise ValueError(
            f"expected at least {4 * FEWEST} clean images, to search on some and to measure on the others; received "
            f"{len(pixels)}; give more"
        )
    share = config.fit / (config.fit + config.held_out)
    fit, held = (torch.as_tensor(part) for part in split_indices(len(pixels), share, config.seed))
    images = pixels.float() / 255
    parts = images[fit], images[held], None if labels is None else labels[held]
    return {"fit": len(fit), "held_out": len(held)}, parts


FEWEST = 10


def _scan(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    parts: Parts,
    config: ScanConfig,
    track: Track,
    keep: Path | None,
) -> dict[str, Any]:
    """Accuracy, predictions and probes of one model."""
    fit, held = (part.to(model.device) for part in parts[:2])
    classifier = classifier.to(model.device)
    with torch.no_grad():
        answers = torch.cat(
            [
                predict(model.encode_image(model.normalize(part)).float(), classifier)
                for part in held.split(config.batch_size)
            ]
        ).cpu()
    found = tuple(
        _probe(
            model,
            classifier,
            class_names,
            fit,
            held,
            answers,
            probe,
            config,
            track,
            kept_for(keep, model, classifier, (fit, held), config, probe.name),
        )
        for probe in probes(config.bound, config.patch)
    )
    return {
        "accuracy": None if parts[2] is None else Rate.of(answers == parts[2]),
        "predicted": tuple(Rate.of(answers == index) for index in range(len(classifier))),
        "probes": found,
        "coinciding": coinciding(classifier.cpu(), class_names),
    }


def _probe(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    fit: Float[Tensor, "fit 3 h w"],
    held: Float[Tensor, "held_out 3 h w"],
    answers: Int[Tensor, " held_out"],
    probe: Probe,
    config: ScanConfig,
    track: Track,
    kept: Kept,
) -> ProbeResult:
    classes = screened(model, classifier, fit, probe, config, track, kept)
    change = search(model, classifier, fit, probe, classes, config, track, kept)
    found, measured = [], list(kept.state.get("measured", ()))
    for row, wanted in enumerate(classes):
        if row == len(measured):
            measured.append(measure(model, classifier, held, probe, change[row], wanted, config))
            if kept.due() or row == len(classes) - 1:
                kept.save(measured=measured)
        hits, loss = measured[row]
        others = answers != wanted
        if others.any():  # a class that the model takes every image for needs no change
            mean = float(loss[others].mean())
            found.append(
                (mean, row, ClassChange(class_names[wanted], Rate.of(hits[others]), mean), loss[others])
            )
    found.sort(key=lambda item: item[0])
    lead, half = _lead(found[0][3], found[1][3]) if len(found) > 1 else (0.0, math.inf)
    best = change[found[0][1]]
    others = [place for place, answer in enumerate(answers.tolist()) if answer != classes[found[0][1]]]
    shown = held[others[:SHOWN]]
    changed = probe.apply(shown, best, torch.Generator().manual_seed(config.seed + 1))
    return ProbeResult(
        probe=probe.name,
        classes=tuple(item[2] for item in found),
        lead=lead,
        lead_low=lead - half,
        lead_high=lead + half,
        left_out=len(classifier) - len(classes),
        pictures=_bytes(torch.stack([shown, changed], dim=1)),
    )


def _lead(first: Float[Tensor, " image"], second: Float[Tensor, " image"]) -> tuple[float, float]:
    """Log of the ratio of mean losses, and the half-width of its 95 % interval (delta method, images as independent)."""
    means = [max(float(loss.mean()), 1e-9) for loss in (first, second)]
    errors = [
        float(loss.var()) / len(loss) / mean**2 if len(loss) > 1 else math.inf
        for loss, mean in zip((first, second), means, strict=True)
    ]
    return math.log(means[1] / means[0]), Z * math.sqrt(sum(errors))


@torch.no_grad()
def _terms(model: HookedCLIP, pixels: Float[Tensor, "image 3 h w"], config: ScanConfig) -> Decomposition:
    return Decomposition.cat(
        [
            model.decompose(model.normalize(part.to(model.device)), normalize=True).to("cpu")
            for part in pixels.split(config.batch_size)
        ]
    )


def _bytes(images: Float[Tensor, "*n 3 h w"]) -> UInt8[Tensor, "*n h w 3"]:
    return rearrange((255 * images).round().clamp(0, 255).to(torch.uint8).cpu(), "... c h w -> ... h w c")
