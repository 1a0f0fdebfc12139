"""What predictions and detector scores say: accuracy, attack success with its control, AUROC.

An attack success rate (ASR) alone cannot tell a trigger that works from a model that answers the target
whatever it sees. Its control is the share of *clean* images that the same model, under the same
intervention, sends to the target; `AttackReport` keeps the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Real
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor

from decompclip.api import check_count
from decompclip.display import Result, some
from decompclip.intervals import CONFIDENCE, Rate, difference_interval, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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


@dataclass(frozen=True, eq=False, repr=False)
class GroupAccuracy(Result):
    """Accuracy in each group of images of a class and a cue, such as a kind of background (`group_accuracy`).

    A model that answers by the cue fails in the groups where it goes with another class: the worst group says so, the mean
    over images does not.

    Attributes:
        names: of the groups: class and cue.
        group: of each image.
        right: whether it got its own class.
    """

    names: tuple[tuple[str, str], ...]
    group: Int[Tensor, " image"]
    right: Bool[Tensor, " image"]

    @property
    def rates(self) -> tuple[Rate, ...]:
        """Of each group."""
        return tuple(Rate.of(self.right[self.group == place]) for place in range(len(self.names)))

    @property
    def accuracy(self) -> Rate:
        """Of all images."""
        return Rate.of(self.right)

    @property
    def worst(self) -> float:
        """The accuracy of the group where it is least."""
        return min(rate.value for rate in self.rates)

    @property
    def worst_group(self) -> tuple[str, str]:
        """Class and cue of that group; the first of equals."""
        values = [rate.value for rate in self.rates]
        return self.names[values.index(min(values))]

    def interval(self, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95 % interval of `worst`: percentiles over what each group's accuracy may be, given its images (Jeffreys' posterior).

        Which group is worst is found anew in each draw; so it lies low where many small groups are about as bad. A group whose
        few images are all right, or all wrong, is not taken for certain, as it would be if its images were drawn again.

        Args:
            draws: how many.
            seed: of the draws.
        """
        low, high = _ends(self._drawn(self.right[None], draws, seed)[0])
        return low, high

    def gain(self, before: GroupAccuracy, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
        """How much higher `worst` is than it was, and its 95 % interval: both answers to an image are drawn together.

        Args:
            before: of the same images, in the same order.
            draws: how many.
            seed: of the draws.

        Raises:
            ValueError: other images, or other groups.
        """
        if self.names != before.names or not torch.equal(self.group, before.group):
            raise ValueError(
                f"expected answers to the same images in the same groups; received {self!r} and {before!r}; give both one order"
            )
        own, theirs = self._drawn(torch.stack([self.right, before.right]), draws, seed)
        return self.worst - before.worst, *_ends(own - theirs)

    def _drawn(
        self, right: Bool[Tensor, "way image"], draws: int, seed: int
    ) -> Float[np.ndarray, "way draw"]:
        """The worst group's accuracy, of several answers to the same images."""
        check_count(draws, "draws", "draws")
        generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
        outcomes = np.array([*product((0, 1), repeat=len(right))])  # each way right or wrong, together
        codes, worst = right.cpu().numpy(), np.ones((len(right), draws))
        for place in range(len(self.names)):
            own = codes[:, (self.group == place).cpu().numpy()]
            counts = [(own == outcome[:, None]).all(0).sum() for outcome in outcomes]
            # a prior that leaves one half for right and one half for wrong, whatever is answered beside it
            shares = generator.dirichlet(np.array(counts) + 1 / len(counts), draws)
            worst = np.minimum(worst, (shares @ outcomes).T)
        return worst

    def to_dict(self) -> dict[str, Any]:
        """For JSON: each group's rate, the worst one with its interval, and the accuracy of all images."""
        low, high = self.interval()
        groups = [
            {"class": name, "cue": cue, **rate.to_dict()}
            for (name, cue), rate in zip(self.names, self.rates, strict=True)
        ]
        worst = {"value": self.worst, "low": low, "high": high, "group": list(self.worst_group)}
        return {"groups": groups, "worst": worst, "accuracy": self.accuracy.to_dict()}

    def to_frame(self) -> pd.DataFrame:
        """One row a group: class, cue, images, accuracy and its 95 % Wilson interval."""
        import pandas as pd

        rows = [
            (*name, rate.total, rate.value, rate.low, rate.high)
            for name, rate in zip(self.names, self.rates, strict=True)
        ]
        return pd.DataFrame(rows, columns=["class", "cue", "images", "accuracy", "low", "high"])

    def figure(self) -> go.Figure:
        """One row a class, a point a cue, with its interval."""
        from decompclip.figures.scatter import Panel, Point, point_panels

        rows, cues = (list(dict.fromkeys(column)) for column in zip(*self.names, strict=True))
        found = dict(zip(self.names, self.rates, strict=True))
        points = {cue: [Point.of(found[name, cue].to_dict()) for name in rows] for cue in cues}
        return point_panels(rows, [Panel("", "accuracy, %", points)], bars="95 % interval")

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        name, cue = self.worst_group
        return f"GroupAccuracy({len(self)} groups, {len(self.group)} images; worst {100 * self.worst:.1f} %: {name}, {cue})"


def _ends(values: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high


def group_accuracy(
    predictions: Int[Tensor, " image"],
    labels: Int[Tensor, " image"],
    cues: Int[Tensor, " image"],
    *,
    class_names: Sequence[str] | None = None,
    cue_names: Sequence[str] | None = None,
) -> GroupAccuracy:
    """Accuracy in the groups of images that classes and a cue make, and that of the worst group (Sagawa et al., ICLR 2020).

    Args:
        predictions: the classes that images are taken for.
        labels: their classes.
        cues: the value of the cue in each, such as its background's place in `cue_names`.
        class_names, cue_names: by default numbers, up to the largest there is.

    Returns:
        The groups, class by class.

    Raises:
        ValueError: no images, not a label and cue for each, a number that has no name, a name that comes twice, or a group without
            images, of which no accuracy can be told.
    """
    _check(predictions, labels)
    _check(predictions, cues)
    names = []
    for what, places, given in (("labels", labels, class_names), ("cues", cues, cue_names)):
        least, most = int(places.min()), int(places.max())
        known = list(map(str, range(most + 1))) if given is None else list(given)
        if isinstance(given, str) or not known or len(set(known)) < len(known):
            raise ValueError(
                f"expected a list of names of {what}, each once; received {given!r}; tell them apart in words"
            )
        if least < 0 or most >= len(known):
            raise ValueError(
                f"expected {what} in 0..{len(known) - 1}, one of {', '.join(known)}; received {least}..{most}"
            )
        names.append(known)
    pairs = tuple((name, cue) for name in names[0] for cue in names[1])
    group = labels.cpu().long() * len(names[1]) + cues.cpu().long()
    counts = group.bincount(minlength=len(pairs))
    if empty := [f"{name}, {cue}" for (name, cue), n in zip(pairs, counts.tolist(), strict=True) if not n]:
        raise ValueError(
            f"expected images in each of the {len(pairs)} groups of a class and a cue; received none in {len(empty)}: "
            f"{some(empty, comma='; ')}; take more images, or only classes and cues that come together"
        )
    return GroupAccuracy(pairs, group, predictions.cpu() == labels.cpu())


def attack_success(predictions: Int[Tensor, " batch"], labels: Int[Tensor, " batch"], target: int) -> Rate:
    """The share of images of other classes that are taken for the target: of triggered ones the ASR, of clean ones its control.

    Args:
        predictions: the classes that images are taken for.
        labels: the images' true classes, not the attacker's.
        target: the attacker's class.

    Raises:
        ValueError: no images, not one label for each prediction, or a target below 0.
    """
    _check(predictions, labels, target)
    return Rate.of(predictions[labels != target] == target)


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
        cacc = Rate.of(clean_predictions == clean_labels)
    if target is not None:
        asr_with_target = Rate.of(triggered_predictions == target)
        if triggered_labels is not None:
            asr = attack_success(triggered_predictions, triggered_labels, target)
        if clean_labels is not None:
            control = attack_success(clean_predictions, clean_labels, target)
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
    truth = np.repeat([False, True], [len(clean), len(suspect)])
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
    for x in (predictions, labels):
        if not isinstance(x, Tensor) or x.ndim != 1 or x.is_floating_point():
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"expected a whole number an image, the place of its class, as a tensor; received {found}; of scores take .argmax(1)"
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
