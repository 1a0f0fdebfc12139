"""All ways of running a model in one pass over the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.diagnosis.pictures import SAME, Views
from decompclip.audit.diagnosis.result import Fault
from decompclip.audit.diagnosis.trials import Trial

NO_ANSWER = -1
"""In place of a class, where a score is not a number."""


@dataclass(frozen=True)
class Answers:
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
def answer(tried: Sequence[Trial], batches: Iterable[Views]) -> Answers:
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
            with (
                trial.model.raw_pixels.asleep() if place else nullcontext()
            ):  # a wrong way is tried on purpose
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
    return Answers(joined, finite, torch.cat(features), truth, tuple(faults), differs)
