"""One evaluation of a CLIP on clean images and their triggered twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.evaluation.metrics import (
    AttackReport,
    attack_report,
    clean_accuracy,
    per_class_accuracy,
    predict,
)
from decompclip.intervals import Rate

if TYPE_CHECKING:
    import pandas as pd


Twin = Callable[[Tensor, Any], Tensor]
"""From images in [0, 1] and their indices to their triggered twins; every `Trigger` is one."""


@runtime_checkable
class Encoder(Protocol):
    """What is evaluated: a `HookedCLIP`, for instance, also inside `model.hooks(...)`."""

    def normalize(self, pixels: Any) -> Any: ...

    def encode_image(self, images: Any) -> Any: ...


@runtime_checkable
class Labelled(Protocol):
    """Images in [0, 1] with labels, in the same order each time; `Shapes` is such.

    A batch has `images`, `labels` and may have `indices` (else images are counted from 0).
    """

    def batches(self, batch_size: int = ...) -> Iterator[Any]: ...


@dataclass(frozen=True)
class ClassRates:
    """One class's accuracy; the share of its triggered, and of its clean, images taken for the target."""

    name: str
    accuracy: Rate
    asr: Rate | None
    control: Rate | None


@dataclass(frozen=True)
class Evaluation:
    """CACC, ASR and control, over all images and class by class, with every prediction.

    Attributes:
        report: the rates over all images; ASR and control are None without a trigger and a target.
        per_class: the same for each class; the target's own row says how many of its images stay with it.
        predictions, triggered_predictions: of the clean images and of their twins, in the order of the data.
    """

    report: AttackReport
    per_class: tuple[ClassRates, ...]
    target: int | None
    labels: Int[Tensor, " image"]
    predictions: Int[Tensor, " image"]
    triggered_predictions: Int[Tensor, " image"] | None

    @property
    def cacc(self) -> Rate:
        rate = self.report.cacc
        assert rate is not None  # labels are always known here
        return rate

    @property
    def asr(self) -> Rate | None:
        """Of images that are not of the target's class."""
        return self.report.asr

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the report, and the rates of each class; predictions are left out."""
        rows = [
            {"class": row.name}
            | {key: rate and rate.to_dict() for key, rate in vars(row).items() if key != "name"}
            for row in self.per_class
        ]
        return self.report.to_dict() | {"target": self.target, "per_class": rows}

    def to_frame(self) -> pd.DataFrame:
        """One row a class, and a last one over all: every rate with its interval."""
        import pandas as pd

        report = self.report
        whole = ClassRates("all", self.cacc, report.asr, report.control)
        rows = []
        for row in (*self.per_class, whole):
            cells: dict[str, Any] = {"class": row.name, "images": row.accuracy.total}
            for key in ("accuracy", "asr", "control"):
                rate = getattr(row, key)
                if rate is not None:
                    cells |= {key: rate.value, f"{key}_low": rate.low, f"{key}_high": rate.high}
            rows.append(cells)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        parts = [f"CACC {self.cacc}"]
        if self.asr is not None:
            parts += [f"ASR {self.asr}", f"control {self.report.control}"]
            parts += [f"ASR with target-class images {self.report.asr_with_target}"]
        return "; ".join(parts)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.3f}".format, na_rep="")


@torch.no_grad()
def evaluate(
    model: Encoder,
    data: Labelled | Iterable[Any],
    classifier: Float[Tensor, "class d_embed"],
    trigger: Twin | None = None,
    target: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
    batch_size: int = 256,
    track: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Evaluation:
    """Clean accuracy, and attack success beside its control (docs/method.md, section 7), each with a 95 % Wilson interval.

    The trigger gets each image's place in the data, so that the size of the batches is a matter of speed
    alone.

    Args:
        data: images in [0, 1] with labels: `Shapes`, any source whose `batches` yield such, or image-text pairs
            that know their classes (`decompclip.data.pairs`).
        classifier: `model.zero_shot_classifier(...)`.
        target: the attacker's class, as a place in the classifier.
        class_names: names for the table; by default the places in the classifier.
        track: shows progress: passes the batches through.

    Raises:
        ValueError: a trigger without a target or the reverse, a target that is no class, no images, images
            without labels or outside [0, 1], labels that are no classes, or names that are not one a class.
    """
    n = len(classifier)
    names = [str(place) for place in range(n)] if class_names is None else list(class_names)
    check_attack(n, trigger, target)
    _check(n, names, batch_size)
    labels, clean, triggered = [], [], []
    seen = 0
    for batch in track(batches_of(data, batch_size)):
        _check_batch(batch, seen)
        found = getattr(batch, "indices", None)
        indices = torch.arange(seen, seen + len(batch.images)) if found is None else found
        labels.append(batch.labels.cpu())
        clean.append(_predict(model, batch.images, classifier))
        if trigger is not None:
            triggered.append(_predict(model, trigger(batch.images, indices), classifier))
        seen += len(batch.images)
    if not seen:
        raise ValueError("expected images; received none; check the image source")
    truth, before = torch.cat(labels), torch.cat(clean)
    accuracies = per_class_accuracy(before, truth, n)
    if trigger is None or target is None:
        report = AttackReport(clean_accuracy(before, truth), None, None, None)
        rows = [ClassRates(name, rate, None, None) for name, rate in zip(names, accuracies, strict=True)]
        return Evaluation(report, tuple(rows), None, truth, before, None)
    after = torch.cat(triggered)
    rows = [
        ClassRates(
            names[label],
            accuracies[label],
            Rate.of(after[truth == label] == target),
            Rate.of(before[truth == label] == target),
        )
        for label in range(n)
    ]
    report = attack_report(before, truth, after, truth, target, n_classes=n)
    return Evaluation(report, tuple(rows), target, truth, before, after)


def batches_of(data: Labelled | Iterable[Any], batch_size: int) -> Iterator[Any]:
    """Batches of a source, or of pairs that are gone through one by one."""
    if isinstance(data, Labelled):
        yield from data.batches(batch_size)
        return
    pairs = iter(data)
    while some := list(islice(pairs, batch_size)):
        labels = [pair.label for pair in some]
        known = None if None in labels else torch.tensor(labels)
        yield SimpleNamespace(images=torch.stack([pair.image for pair in some]), labels=known)


def _predict(model: Encoder, pixels: Tensor, classifier: Tensor) -> Tensor:
    features = model.encode_image(model.normalize(pixels))
    return predict(features.float(), classifier.to(features.device).float()).cpu()


def check_attack(n_classes: int, trigger: Twin | None, target: int | None) -> None:
    """Raises ValueError unless trigger and target come together and the target is one of the classes."""
    if (trigger is None) != (target is None):
        given, lacking = ("a target", "trigger") if trigger is None else ("a trigger", "target")
        raise ValueError(
            f"expected a trigger and a target, or neither; received {given} alone; pass the {lacking} too"
        )
    if target is not None and not 0 <= target < n_classes:
        raise ValueError(
            f"expected a target in 0..{n_classes - 1}, the classifier's classes; received {target}; "
            "`decompclip.data.images.class_index` finds it by name"
        )


def _check(n: int, names: Sequence[str], batch_size: int) -> None:
    if len(names) != n:
        raise ValueError(
            f"expected a name for each of the classifier's {n} classes; received {len(names)}; pass the names "
            "that the classifier was built from"
        )
    if batch_size < 1:
        raise ValueError(f"expected batches of at least 1 image; received {batch_size}")


def _check_batch(batch: Any, seen: int) -> None:
    if batch.labels is None:
        raise ValueError(
            f"expected a class for every image; received none from image {seen} on; sort the images into folders "
            "named after the classes"
        )
    low, high = (float(x) for x in batch.images.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"expected pixels in [0, 1]; received {low:.2f}..{high:.2f} from image {seen} on; leave the "
            "normalisation to the model"
        )
