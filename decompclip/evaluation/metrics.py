"""What predictions and detector scores say: accuracy, attack success with its control, AUROC.

An attack success rate (ASR) alone cannot tell a trigger that works from a model that answers the target
whatever it sees. Its control is the share of *clean* images that the same model, under the same
intervention, sends to the target; `AttackReport` keeps the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor

from decompclip.intervals import Rate, difference_interval, wilson


def predict(
    features: Float[Tensor, "batch d_embed"], classifier: Float[Tensor, "class d_embed"]
) -> Int[Tensor, " batch"]:
    """The class of largest dot product; the first of equals. Image features need not be unit vectors.

    Raises:
        ValueError: the widths differ, or a score is not a number.
    """
    if features.shape[-1] != classifier.shape[-1]:
        raise ValueError(
            f"expected a classifier of the features' width {features.shape[-1]}; received one of width "
            f"{classifier.shape[-1]}; build it with the text tower of the same model"
        )
    dtype = torch.promote_types(features.dtype, classifier.dtype)
    scores = features.to(dtype) @ classifier.to(dtype).T
    if scores.isnan().any():
        bad = int(scores.isnan().any(dim=1).sum())
        raise ValueError(
            f"expected numbers as scores; received nan for {bad} of {len(scores)} images; run the model in float32"
        )
    return scores.argmax(dim=1)


def clean_accuracy(predictions: Int[Tensor, " batch"], labels: Int[Tensor, " batch"]) -> Rate:
    """CACC: the share of clean images that get their own class.

    Raises:
        ValueError: no images, or not one label for each prediction.
    """
    _check(predictions, labels)
    return Rate.of(predictions == labels)


def per_class_accuracy(
    predictions: Int[Tensor, " batch"], labels: Int[Tensor, " batch"], n_classes: int
) -> list[Rate]:
    """The accuracy among each class's images; a class without images has a rate of nothing.

    Raises:
        ValueError: as `clean_accuracy`, or a label lies outside `0 .. n_classes-1`.
    """
    _check(predictions, labels)
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise ValueError(
            f"expected labels in 0..{n_classes - 1}; received {int(labels.min())}..{int(labels.max())}; label "
            "the images with the class list that the classifier was built from"
        )
    return [Rate.of(predictions[labels == label] == label) for label in range(n_classes)]


def attack_success(
    predictions: Int[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    target: int,
    *,
    n_classes: int | None = None,
) -> Rate:
    """ASR: the share of triggered images that are taken for the target.

    Args:
        labels: the images' true classes, not the attacker's.
        n_classes: number of classes, where known, to hold the target to.

    Raises:
        ValueError: no images, not one label for each prediction, or a target out of range.
    """
    _check(predictions, labels, target, n_classes)
    return Rate.of(predictions[labels != target] == target)


def target_rate(
    predictions: Int[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    target: int,
    *,
    n_classes: int | None = None,
) -> Rate:
    """The control of an ASR: the share of *clean* images of other classes that are taken for the target.

    Raises:
        ValueError: as `attack_success`.
    """
    return attack_success(predictions, labels, target, n_classes=n_classes)


ENOUGH = 20
"""Images that bear half of an AUROC's trials beyond the most that a few could give (`auroc_interval`)."""


@dataclass(frozen=True)
class AttackReport:
    """Clean accuracy, attack success and its control; None where labels or a target were not known."""

    cacc: Rate | None
    asr: Rate | None
    asr_with_target: Rate | None
    control: Rate | None

    @property
    def excess(self) -> float | None:
        """What the trigger adds: ASR minus control; nan where either is a rate of nothing."""
        return None if self.asr is None or self.control is None else self.asr.value - self.control.value

    @property
    def excess_interval(self) -> tuple[float, float] | None:
        """95 % interval of `excess` (see `difference_interval`)."""
        return (
            None if self.asr is None or self.control is None else difference_interval(self.asr, self.control)
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the four rates and the excess, None where unknown."""
        rates = {field.name: getattr(self, field.name) for field in fields(self)}
        low, high = self.excess_interval or (None, None)
        known = self.excess is not None and not np.isnan(self.excess)
        excess = {"value": self.excess, "low": low, "high": high} if known else None
        return {name: rate and rate.to_dict() for name, rate in rates.items()} | {"excess": excess}


def attack_report(
    clean_predictions: Int[Tensor, " clean"],
    clean_labels: Int[Tensor, " clean"] | None,
    triggered_predictions: Int[Tensor, " triggered"],
    triggered_labels: Int[Tensor, " triggered"] | None,
    target: int | None = None,
    *,
    n_classes: int | None = None,
) -> AttackReport:
    """Score clean and triggered images that went through the same model and intervention.

    What the given labels and target cannot tell is None: clean labels serve CACC and the control, triggered
    labels the ASR without target-class images, a target all but CACC.

    Raises:
        ValueError: as `attack_success`.
    """
    for predictions, labels in ((clean_predictions, clean_labels), (triggered_predictions, triggered_labels)):
        _check(predictions, predictions if labels is None else labels, target, n_classes)
    cacc = asr = asr_with_target = control = None
    if clean_labels is not None:
        cacc = clean_accuracy(clean_predictions, clean_labels)
    if target is not None:
        asr_with_target = Rate.of(triggered_predictions == target)
        if triggered_labels is not None:
            asr = attack_success(triggered_predictions, triggered_labels, target)
        if clean_labels is not None:
            control = target_rate(clean_predictions, clean_labels, target)
    return AttackReport(cacc, asr, asr_with_target, control)


def auroc(clean_scores: Real[Tensor, " clean"], suspect_scores: Real[Tensor, " suspect"]) -> float:
    """Probability that a suspect image scores above a clean one (ties count half): higher = more suspicious.

    Args:
        clean_scores: of images without a trigger.
        suspect_scores: of images with one.

    Raises:
        ValueError: either side is empty, or a score is not finite.
    """
    clean, suspect = _scores(clean_scores, "clean"), _scores(suspect_scores, "suspect")
    truth = np.repeat([0, 1], [len(clean), len(suspect)])
    return float(roc_auc_score(truth, np.concatenate([clean, suspect])))


def auroc_interval(
    clean_scores: Real[Tensor, " clean"], suspect_scores: Real[Tensor, " suspect"]
) -> tuple[float, float]:
    """95 % interval of `auroc`: DeLong's variance, as an effective number of trials of Wilson's interval.

    It assumes no distribution of the scores, needs no resampling (hence no seed), stays inside 0..1, and does
    not shrink to a point where the scores separate perfectly: near 0 and 1 the variance stands on few images, and
    what it gives beyond `2 min(n, m)` trials (as where a few triggered images look just like clean ones) counts only as
    far as so many images bear it. Images are taken as independent.

    Raises:
        ValueError: as `auroc`.
    """
    clean, suspect = _scores(clean_scores, "clean"), _scores(suspect_scores, "suspect")
    ranks = rankdata(np.concatenate([clean, suspect]))
    # The share of the other side below each image: its variance is that of the share above.
    of_clean = (ranks[: len(clean)] - rankdata(clean)) / len(suspect)
    of_suspect = (ranks[len(clean) :] - rankdata(suspect)) / len(clean)
    area = float(of_suspect.mean())
    variance = sum(v.var(ddof=1) / len(v) for v in (of_clean, of_suspect) if len(v) > 1)
    trials = most = 2 * min(len(clean), len(suspect))
    if variance:
        trials = area * (1 - area) / variance
    if trials > most:
        squares = np.concatenate([((v - v.mean()) / len(v)) ** 2 for v in (of_clean, of_suspect)])
        bearing = squares.sum() ** 2 / (squares**2).sum()
        trials = most + (trials - most) * bearing / (bearing + ENOUGH)
    return wilson(area, trials)


def _scores(scores: Tensor, side: str) -> np.ndarray:
    if not scores.numel():
        raise ValueError(f"expected scores of clean and of suspect images; received no {side} ones")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ValueError(
            f"expected finite scores; received {bad} infinite or nan among {scores.numel()} {side} ones; "
            "leave those images out, and say so"
        )
    return scores.detach().cpu().double().numpy()


def _check(
    predictions: Tensor, labels: Tensor, target: int | None = None, n_classes: int | None = None
) -> None:
    if len(predictions) != len(labels):
        raise ValueError(
            f"expected one label for each prediction; received {len(predictions)} predictions and {len(labels)} "
            "labels; take both from the same batches"
        )
    if not len(predictions):
        raise ValueError("expected predictions of at least one image; received none; check the image source")
    if target is not None:
        check_target(target, n_classes)


def check_target(target: int, n_classes: int | None) -> None:
    """Raises ValueError where the target is no class."""
    if target < 0 or (n_classes is not None and target >= n_classes):
        raise ValueError(
            f"expected a target in 0..{'' if n_classes is None else n_classes - 1}, the classifier's classes; received "
            f"{target}; `decompclip.data.images.class_index` finds it by name"
        )
