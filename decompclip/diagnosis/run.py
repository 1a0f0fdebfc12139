"""diagnose: what is wrong with the way a CLIP is loaded and fed, before any number of it is believed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.diagnosis.answers import (
    chance,
    checked_labels,
    known_by_features,
    mismatch,
    name_faults,
    other_order,
)
from decompclip.diagnosis.pictures import SAME, Pictures, Views, labelled, views
from decompclip.diagnosis.result import Diagnosis, Fault, Measurement
from decompclip.diagnosis.trials import (
    MARGIN,
    Trial,
    better,
    compare,
    logit_scale_faults,
    trials,
    weight_faults,
)
from decompclip.display import Track, silently
from decompclip.intervals import Rate, noticeable
from decompclip.models.clip import HookedCLIP
from decompclip.models.zero_shot import Template

NO_ANSWER = -1
"""In place of a class, where a score is not a number."""


@dataclass(frozen=True)
class TrialAnswers:
    """What the trials answer, in their order; the first is the model as it is.

    Attributes:
        answers: a class for each image; None for a way in which these images cannot be given.
        finite: how many of the images have scores that are numbers.
        features: unit features of the model as it is.
        labels: those that the images bring along.
        faults: of the images.
        differs: whether what the model is fed differs from what its own preprocessing gives.
    """

    answers: list[Int[Tensor, " batch"] | None]
    finite: list[int]
    features: Float[Tensor, "batch d_embed"]
    labels: Int[Tensor, " batch"] | None
    faults: tuple[Fault, ...]
    differs: bool


@torch.no_grad()
def answer(tried: Sequence[Trial], batches: Iterable[Views]) -> TrialAnswers:
    """Run each trial on each batch.

    Raises:
        ValueError: there is no image.
    """
    answers: list[list[Tensor] | None] = [[] for _ in tried]
    finite = [0] * len(tried)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    faults: dict[Fault, None] = {}
    differs = False
    for batch in batches:
        faults |= dict.fromkeys(batch.faults)
        if batch.labels is not None:
            labels.append(batch.labels)
        for place, trial in enumerate(tried):
            view, held = trial.view(batch), answers[place]
            if view is None or held is None:
                answers[place] = None
                continue
            if trial.check == "preprocessing":
                differs = differs or not torch.allclose(view, batch.fed, atol=SAME)
            # a wrong way is tried on purpose
            with trial.model.raw_pixels.asleep() if place else nullcontext():
                found = F.normalize(trial.model.encode_image(view).float(), dim=-1).cpu()
            scores = found @ trial.classifier.T
            known = scores.isfinite().all(dim=1)
            held.append(scores.argmax(dim=1).masked_fill(~known, NO_ANSWER))
            finite[place] += int(known.sum())
            if not place:
                features.append(found)
    if not features:
        raise ValueError("expected at least one image; received none; check the image source")
    joined = [None if held is None else torch.cat(held) for held in answers]
    truth = torch.cat(labels) if labels else None
    return TrialAnswers(joined, finite, torch.cat(features), truth, tuple(faults), differs)


def diagnose(
    model: HookedCLIP,
    images: Pictures,
    labels: Int[Tensor, " batch"] | Sequence[int] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: str | Sequence[Template] | None = None,
    batch_size: int = 64,
    track: Track = silently,
) -> Diagnosis:
    """Look for the traps that people fall into with a CLIP: each costs accuracy, and none raises an error.

    Beside the model as it is run the other activation (docs/method.md, section 8: QuickGELU weights in a GELU tower), the usual
    normalisations, reversed channels, another geometry and, in half precision, fp32, each alone. The answers are
    compared image by image; a finding needs an interval (simultaneous, 95 %) of the gained accuracy that lies
    above one point. Labels, class names, text tower, logit scale, pixels and weights are checked besides.

    It takes about seven times one pass over the images; some hundred images serve as a rule.

    Args:
        model: what is looked at.
        images: pixels in [0, 1] `[batch, 3, h, w]`, which the model's `normalize` follows; a list of PIL
            images; or a `FolderSource` or other source, whose own preprocessing is then checked too.
        labels: index of each image's class, in the images' order; by default the source's.
        class_names: by default the model's own.
        templates: as in `HookedCLIP.zero_shot_classifier`.
        batch_size: images a forward pass.
        track: shows progress.

    Raises:
        ValueError: no images, no labels or not one for each image, fewer than two classes, labels that count
            other classes, or images that are none.
        MissingTextError: the model has no text tower.
    """
    names = tuple(model.class_names if class_names is None else class_names)
    if len(names) < 2:
        raise ValueError(
            f"expected at least two classes to tell apart; received {list(names)}; pass class_names"
        )

    def classify(clip: HookedCLIP) -> Tensor:
        return clip.zero_shot_classifier(names, templates).detach().float().cpu()

    given = None if labels is None else checked_labels(torch.as_tensor(labels).cpu(), names)
    if given is None and not labelled(images):
        raise ValueError(_NO_LABELS)
    if given is not None and not hasattr(images, "batches"):  # sources may skip files
        _check_count(len(given[0]), len(images))
    tried = trials(model, classify, classify(model))
    total = -(-len(images) // batch_size)
    batches = track(views(model, images, batch_size), f"{model.name}: trying other settings", total)
    run = answer(tried, batches)
    if given is None and run.labels is None:
        raise ValueError(_NO_LABELS)
    truth, label_faults = given or checked_labels(cast(Tensor, run.labels), names)
    _check_count(len(truth), len(run.features))
    return _judge(model, names, tried, run, truth, [*run.faults, *label_faults])


_NO_LABELS = (
    "expected labels, one for each image; received none, and the images bring none along; pass labels, or name "
    "the folder's sub-folders after the classes"
)


def _check_count(labels: int, images: int) -> None:
    if labels != images:
        raise ValueError(
            f"expected one label for each image; received {labels} labels and {images} images; take both from the same list"
        )


def _judge(
    model: HookedCLIP,
    names: tuple[str, ...],
    tried: list[Trial],
    run: TrialAnswers,
    labels: Tensor,
    faults: list[Fault],
) -> Diagnosis:
    unchecked: list[str] = []
    base = run.answers[0]
    assert base is not None, "the model as it is takes every image"
    faults += [*name_faults(names), *weight_faults(model)]
    usable = [
        (trial, answers)
        for trial, answers in zip(tried[1:], run.answers[1:], strict=True)
        if answers is not None and (run.differs or trial.check != "preprocessing")
    ]
    reach = max(Rate.of(answers == labels).value for answers in (base, *(a for _, a in usable)))
    by_features = known_by_features(run.features, labels)
    truth = labels
    if (found := other_order(base, labels, names, reach=reach, by_features=by_features)) is not None:
        fault, order = found
        faults.append(fault)
        truth = order[labels]
    right = base == truth
    compared = [(trial, compare(trial, answers == truth, right, len(usable))) for trial, answers in usable]
    best = max([Rate.of(right), *(c.accuracy for _, c in compared)], key=lambda rate: rate.value)
    lost = mismatch(best, by_features, base, truth, len(names))
    overflow = _overflow(model, tried, run)
    faults += overflow
    if lost is not None:
        faults.append(lost)
        unchecked.append(
            "activation, preprocessing and geometry: without answers that fit, accuracy cannot compare them"
        )
    else:
        checks = {fault.check for fault in overflow}  # found already
        faults += [fault for fault in better(compared, Rate.of(right)) if fault.check not in checks]
    similarity = None if lost is not None or NO_ANSWER in base else run.features @ tried[0].classifier.T
    faults += logit_scale_faults(model, similarity, truth)
    if len(labels.unique()) < 2:
        unchecked.append(
            "labels and text tower: all images are of one class, which a model may answer always"
        )
    if all(trial.check != "geometry" for trial, _ in usable):
        unchecked.append("crop against squash: it needs the pictures themselves, as PIL images or a folder")
    return Diagnosis(
        model=model.name,
        images=len(labels),
        classes=len(names),
        accuracy=Rate.of(base == labels),
        chance=chance(base, labels, len(names)),
        findings=tuple(sorted(faults, key=lambda fault: fault.severity != "error")),
        comparisons=tuple(comparison for _, comparison in compared),
        noticeable=noticeable(len(labels), comparisons=len(usable), margin=MARGIN),
        unchecked=tuple(unchecked),
    )


def _overflow(model: HookedCLIP, tried: list[Trial], run: TrialAnswers) -> list[Fault]:
    """Images without an answer."""
    total, kept = len(run.features), run.finite[0]
    if kept == total:
        return []
    numbers = [Measurement.of("images without finite scores", Rate(total - kept, total))]
    dtype = str(model.visual.dtype).removeprefix("torch.")
    wide = [finite for trial, finite in zip(tried, run.finite, strict=True) if trial.check == "precision"]
    if wide and wide[0] > kept:
        numbers.append(Measurement.of("in float32", Rate(total - wide[0], total)))
        what = f"{dtype} overflows: activations pass its largest number"
        remedy = "load it with dtype=torch.float32, or torch.bfloat16, which has float32's range"
    else:
        what = f"the scores are not finite in {dtype}"
        remedy = "check the weights: some are not finite, or far too large"
    return [Fault("precision", what, remedy, tuple(numbers))]
