"""Whether labels, class names and text tower fit the images, by the model's answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from decompclip.diagnosis.result import FEWEST, Fault, Measurement
from decompclip.display import some
from decompclip.intervals import Paired, Rate

SIMPLE = 0.9
"""A simple order (a shift, the alphabet) is believed where it explains this share of what the best order explains."""

GAIN = 0.05
"""Accuracy that another order of the classes must add, at the least, to be called the right one."""

EXPLAINED = 0.6
"""Share of what the image features know that another order of the classes must explain."""

TEXT_KNOWS_LESS = 2.0
"""Times less than the image features know the classes, and the text side is suspected."""

LIKE_THE_LABELS = 0.3
"""Distance (total variation) between the classes' shares in answers and in labels that speaks for shuffled labels."""

WORDLESS = re.compile(r"n\d{8}|\d+")
MOST_CLASSES = 2000
"""Beyond which the best order of the classes is not searched for."""


def chance(answers: Int[Tensor, " batch"], labels: Int[Tensor, " batch"], n: int) -> float:
    """Accuracy expected of answers and labels of these frequencies that have nothing to do with one another."""
    return float((_shares(answers, n) * _shares(labels, n)).sum())


def _shares(classes: Tensor, n: int) -> Tensor:
    known = classes[classes >= 0]  # an answer that is no number is none
    return torch.bincount(known, minlength=n).double() / max(1, len(classes))


def checked_labels(
    labels: Int[Tensor, " batch"], class_names: Sequence[str]
) -> tuple[Int[Tensor, " batch"], tuple[Fault, ...]]:
    """Labels in the range of the classes.

    Raises:
        ValueError: they are no class indices, or cannot be brought into range.
    """
    if labels.ndim != 1 or not labels.numel() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"expected labels [batch] of an integer type; received {list(labels.shape)} of {labels.dtype}; give each "
            "image the index of its class"
        )
    n, low, high = len(class_names), int(labels.min()), int(labels.max())
    if low >= 0 and high < n:
        return labels.long(), ()
    if low < 1 or high != n:
        raise ValueError(
            f"expected labels in 0..{n - 1}, the indices of {n} class names; received {low}..{high}; give the class names "
            "that the labels count"
        )
    numbers = (Measurement("least label", low), Measurement("largest", high))
    remedy = f"count classes from 0 to {n - 1}: subtract 1; here it was done for the other checks"
    return labels.long() - 1, (Fault("labels", f"the labels count from 1 to {n}", remedy, numbers),)


def name_faults(class_names: Sequence[str]) -> Iterator[Fault]:
    """Class names that no text tower was trained on."""
    odd = [name for name in class_names if WORDLESS.fullmatch(name.strip())]
    if odd:
        what = f"class names are identifiers, not words: {some(odd)}"
        remedy = "give each class a name in words: the text tower reads them"
        yield Fault("class names", what, remedy, (Measurement("of them", len(odd)),), "warning")


def other_order(
    answers: Int[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    class_names: Sequence[str],
    *,
    reach: float,
    by_features: Rate | None,
) -> tuple[Fault, Int[Tensor, " class"]] | None:
    """The order of classes that explains the answers better than the given one: label `c` stands for class `order[c]`.

    Half of the images choose the order and the other half judge it, and the reverse: what is chosen for
    chance agreement gains nothing where it is judged.

    Args:
        answers: classes that the model answers.
        labels: classes as given.
        class_names: in the order of the answers.
        reach: the best accuracy of any setting in the given order; an order has to do better.
        by_features: `known_by_features`. Features that know the classes and a text tower that does not can be
            matched in part by some order; the right one explains most.
    """
    if len(labels) < FEWEST:
        return None
    half = _halves(labels)
    free = by_features is not None
    judged = []
    for side in (0, 1):
        _, chosen = _best_order(answers[half == side], labels[half == side], class_names, free=free)
        judged.append(chosen[labels] == answers)
    after = torch.where(half == 0, judged[1], judged[0])
    paired, ordered = Paired.of(labels == answers, after), Rate.of(after)
    low, high = paired.interval()
    if low <= GAIN or ordered.value <= reach + GAIN:
        return None
    if by_features is not None and ordered.value < EXPLAINED * by_features.value:
        return None
    name, order = _best_order(answers, labels, class_names, free=free)
    moved = [
        f"{class_names[label]!r} holds what the model calls {class_names[int(cls)]!r}"
        for label, cls in enumerate(order)
        if label != int(cls) and bool((labels == label).any())
    ]
    kind = "off by one" if name in _BY_ONE else "in another order than the class names"
    what = f"the labels are {kind}{f' ({name})' if name else ''}: {some(moved, comma='; ')}"
    numbers = (
        Measurement.of("accuracy", Rate.of(labels == answers)),
        Measurement.of("in that order", ordered),
        Measurement("difference", paired.value, low, high, "points"),
    )
    remedy = "give class_names in the order that the labels count, or the labels that count class_names; the other checks "
    remedy += "went on in that order"
    return Fault("classes", what, remedy, numbers), order


_BY_ONE = ("each class one place on", "each class one place back")


def _halves(labels: Tensor) -> Int[Tensor, " batch"]:
    """0 and 1 in turn within each class, so that both halves know all classes."""
    order = torch.argsort(labels, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    first = torch.searchsorted(labels[order], labels)
    return (place - first) % 2


def _best_order(
    answers: Tensor, labels: Tensor, class_names: Sequence[str], *, free: bool
) -> tuple[str, Int[Tensor, " class"]]:
    """The order that explains most, and its name; the name is empty for one that has none."""
    n, identity = len(class_names), torch.arange(len(class_names))

    def explained(order: tuple[str, Tensor]) -> int:
        return int((order[1][labels] == answers).sum())

    simple = {"as given": identity} | {
        name: identity.roll(by) for name, by in zip(_BY_ONE, (-1, 1), strict=True)
    }
    for name, key in (("the alphabet's", str), ("the alphabet's, capitals aside", str.casefold)):
        simple[name] = torch.tensor(sorted(range(n), key=lambda i, key=key: key(class_names[i])))
    simple["reversed"] = identity.flip(0)
    best = max(simple.items(), key=explained)  # the first of equals
    if not free or n > MOST_CLASSES:
        return best
    known = answers >= 0
    counts = torch.bincount(labels[known] * n + answers[known], minlength=n * n).view(n, n).numpy()
    # classes without images stay where they are, if they can
    _, columns = linear_sum_assignment(counts + 1e-3 * np.eye(n), maximize=True)
    fitted = ("", torch.from_numpy(columns))
    return best if explained(best) >= SIMPLE * explained(fitted) else fitted


def known_by_features(features: Float[Tensor, "batch d_embed"], labels: Int[Tensor, " batch"]) -> Rate | None:
    """Accuracy of the nearest class mean, each image left out of its own: what the image features know by themselves.

    None where too few images have another one of their class.
    """
    counts = torch.bincount(labels)
    kept = (counts[labels] > 1) & features.isfinite().all(dim=1)
    labels, features = labels[kept], features[kept].double()
    if len(labels) < FEWEST or len(labels.unique()) < 2:
        return None
    features = F.normalize(features - features.mean(0), dim=1)
    _, labels = labels.unique(return_inverse=True)
    sums = torch.zeros(int(labels.max()) + 1, features.shape[1], dtype=features.dtype).index_add(
        0, labels, features
    )
    scores = features @ F.normalize(sums, dim=1).T
    without = (features * F.normalize(sums[labels] - features, dim=1)).sum(1)
    scores[torch.arange(len(labels)), labels] = without
    return Rate.of(scores.argmax(dim=1) == labels)


def mismatch(
    accuracy: Rate,
    by_features: Rate | None,
    answers: Int[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    n: int,
) -> Fault | None:
    """Labels, images or text tower that do not belong together.

    Args:
        accuracy: the best that any setting reaches.
        by_features: `known_by_features`.
        answers: classes that the model answers.
        labels: classes as given.
        n: number of classes.
    """
    if accuracy.total < FEWEST:
        return None
    guess = chance(answers, labels, n)
    numbers = (Measurement.of("zero-shot accuracy", accuracy), Measurement("chance", guess, unit="%"))
    # the one may be too few images; not to know a class, half-way to perfection must be ruled out
    lost = accuracy.low <= guess and accuracy.high < (1 + guess) / 2
    if by_features is None:
        what = "the answers have nothing to do with the labels (too few images a class to tell why)"
        remedy = "check labels, class names and weights, or give several images a class"
        return Fault("labels", what, remedy, numbers) if lost else None
    numbers += (Measurement.of("nearest class mean of the image features", by_features),)
    largest = float(_shares(labels, n).max())
    if by_features.low > max(guess, largest) and accuracy.high < by_features.value / TEXT_KNOWS_LESS:
        what = "the text side knows little of the classes that the image features tell apart: a random or foreign text "
        what += "tower, another tokenizer, or class names that are not these classes'"
        remedy = "take text tower, tokenizer and image tower from one checkpoint, and class names in words"
        return Fault("text tower", what, remedy, numbers)
    if not lost or by_features.low > largest:
        return None
    distance = float((_shares(answers, n) - _shares(labels, n)).abs().sum() / 2)
    numbers += (Measurement("distance between the classes' shares in answers and labels", distance),)
    if distance < LIKE_THE_LABELS:
        what = "the labels look shuffled: the model answers each class as often as it is a label, but for other images"
        remedy = "keep images and labels in one order: shuffle both or none, and sort files as their labels are sorted"
        return Fault("labels", what, remedy, numbers)
    what = "neither the answers nor the image features have to do with the labels: an untrained or broken image tower, "
    what += "or labels of other images"
    return Fault("labels", what, "check the image tower's weights, then images and labels", numbers)
