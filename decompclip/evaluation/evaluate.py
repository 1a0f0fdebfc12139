"""One evaluation for a model, a guarded model and an edited decomposition: clean accuracy, attack success and its control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.api import check_count
from decompclip.data.feed import Labelled
from decompclip.data.pixels import check_pixels
from decompclip.data.processes import Processes
from decompclip.decomposition.decomposition import Decomposition
from decompclip.display import Result
from decompclip.evaluation.metrics import (
    AttackReport,
    attack_report,
    check_target,
    per_class_accuracy,
    predict,
)
from decompclip.intervals import Rate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from accelerate import Accelerator


TriggerFunction = Callable[[Tensor, Any], Tensor]
"""From pixels and their indices to the pixels with the trigger in them; every `Trigger` is one. Others get pixels on the CPU."""

Edit = Callable[[Decomposition], Decomposition]
"""What is done to terms before they are summed; every `Intervention` is one."""


@runtime_checkable
class Encoder(Protocol):
    """What is evaluated: a `HookedCLIP`, also inside `model.hooks(...)`, or a `Guard`."""

    def normalize(self, pixels: Any) -> Any: ...

    def encode_image(self, images: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class DecomposedImages:
    """Decomposed images with their labels, for `evaluate` with an edit.

    Raises:
        ValueError: not a label for each image.
    """

    decomposition: Decomposition
    labels: Int[Tensor, " image"]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.decomposition):
            raise ValueError(
                f"expected a label for each of {len(self.decomposition)} decomposed images; received {len(self.labels)}; take "
                "both from the same batches"
            )

    def batches(self, batch_size: int = 256) -> Iterator[Any]:
        for start in range(0, len(self.labels), batch_size):
            part = slice(start, start + batch_size)
            yield SimpleNamespace(images=self.decomposition[part], labels=self.labels[part])


@dataclass(frozen=True)
class ClassRates:
    """One class's accuracy; the share of its triggered, and of its clean, images taken for the target."""

    name: str
    accuracy: Rate
    asr: Rate | None
    control: Rate | None


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """CACC, ASR and control, over all images and class by class, with every prediction.

    Attributes:
        report: the rates over all images; ASR and control are None without a trigger and a target.
        per_class: the same for each class; the target's own row says how many of its images stay with it.
        target: the attacker's class, if there is one.
        labels: the images' classes, in the order of the data.
        predictions: of the clean images.
        triggered_predictions: of the triggered ones.
    """

    report: AttackReport
    per_class: tuple[ClassRates, ...]
    target: int | None
    labels: Int[Tensor, " image"]
    predictions: Int[Tensor, " image"]
    triggered_predictions: Int[Tensor, " triggered"] | None

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

    def figure(self) -> go.Figure:
        """Accuracy of each class, and with a trigger what it and the clean images send to the target."""
        from decompclip.figures.bars import bar_rows

        kinds = ("accuracy",) if self.target is None else ("accuracy", "asr", "control")
        rates = {kind: [getattr(row, kind) for row in self.per_class] for kind in kinds}
        series = {kind: [rate.value for rate in found] for kind, found in rates.items()}
        rows = [row.name for row in self.per_class]
        return bar_rows(rows, series, unit="share of images", percent=True, ends=(0, 1))

    def __repr__(self) -> str:
        return f"Evaluation({self})"

    def __str__(self) -> str:
        if self.asr is None:
            return f"CACC {self.cacc}"
        rates = f"CACC {self.cacc}; ASR {self.asr}; control {self.report.control}"
        return f"{rates}; ASR with target-class images {self.report.asr_with_target}"


@torch.no_grad()
def classify(
    model: Encoder | Edit | None,
    images: Float[Tensor, "batch 3 h w"] | Decomposition,
    classifier: Float[Tensor, "class d_embed"],
) -> Int[Tensor, " batch"]:
    """The class that each image is taken for, on the CPU.

    Args:
        model: a model or guard, with pixels in [0, 1]; or an edit of terms, with a decomposition (None: as it is).
        images: pixels, or their decomposition.
        classifier: `model.zero_shot_classifier(...)`.

    Raises:
        ValueError: a classifier of another width, or features that are not numbers.
    """
    if isinstance(images, Decomposition):
        edit: Any = model
        features = (images if edit is None else edit(images)).features
    else:
        assert isinstance(model, Encoder)
        features = model.encode_image(model.normalize(images)).float()
        classifier = classifier.float()
    return predict(features, classifier.to(features.device)).cpu()


def evaluate(
    model: Encoder | Edit | None,
    data: Labelled | Iterable[Any],
    classifier: Float[Tensor, "class d_embed"],
    trigger: TriggerFunction | DecomposedImages | None = None,
    target: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
    track: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Evaluation:
    """Clean accuracy, and attack success beside its control (docs/method.md, section 7), each with a 95 % Wilson interval.

        evaluate(model, Shapes(512), classifier, trigger, target)      a model, or a Guard
        evaluate(edit, DecomposedImages(clean, labels), classifier, DecomposedImages(triggered, their_labels), target)

    The trigger gets each image's place in the data: the size of the batches changes the speed alone.

    Args:
        model: a model, a guard, or an edit of terms (None: the terms as they are).
        data: images in [0, 1] with labels: `Shapes`, any source whose `batches` yield such, or image-text pairs
            that know their classes (`decompclip.data.pairs`); for an edit, `DecomposedImages`.
        classifier: `model.zero_shot_classifier(...)`.
        trigger: puts the trigger into images; for an edit, the triggered images decomposed.
        target: the attacker's class, as a place in the classifier.
        class_names: names for the table; by default the places in the classifier.
        batch_size: images at a time.
        accelerator: of Hugging Face's accelerate, to spread the batches over its processes: all return what one process would.
            Images must be read by place, as those of this package are.
        track: shows progress: passes the batches through.

    Returns:
        The rates, over all images and class by class, and every prediction.

    Raises:
        ValueError: a trigger without a target or the reverse, a target that is no class, no images, images
            without labels or outside [0, 1], labels that are no classes, names that are not one a class, fewer images
            than processes, or processes that disagree.
        TypeError: a model with decomposed images, an edit with others, or images of several processes that are not read by place.
    """
    n = len(classifier)
    names = [str(place) for place in range(n)] if class_names is None else list(class_names)
    check_attack(n, trigger, target)
    for what, given in (("images", data), ("trigger", trigger)):
        if given is not None and isinstance(given, DecomposedImages) == isinstance(model, Encoder):
            raise TypeError(
                "expected a model with images and a trigger, or an edit (or None) with DecomposedImages for both; received "
                f"{type(model).__name__} with {type(given).__name__} as {what}; for an edit decompose the images: "
                "DecomposedImages(model.decompose(images), labels)"
            )
    if len(names) != n:
        raise ValueError(
            f"expected a name for each of the classifier's {n} classes; received {len(names)}; pass the names "
            "that the classifier was built from"
        )
    check_count(batch_size, "images", "batch_size")
    group = Processes(accelerator)
    about = {"the trigger": trigger, "the target": target, "the size of batches": batch_size}
    group.check_work(model, classifier, {"the images or their preprocessing": data}, about)
    seen = 0

    def look(batch: Any) -> _Answers:
        nonlocal seen
        places = getattr(batch, "indices", None)
        places = torch.arange(seen, seen + len(batch.images)) if places is None else places
        seen += len(batch.images)
        _check_batch(batch, int(places[0]) if len(places) else seen)
        before, after = classify(model, batch.images, classifier), None
        if trigger is not None and not isinstance(trigger, DecomposedImages):
            pixels = batch.images if getattr(trigger, "any_device", False) else batch.images.cpu().clone()
            after = classify(model, trigger(pixels, places), classifier)  # a trigger may write in place
        return _Answers(batch.labels.cpu(), before, after)

    with closing(group.batches(data, batch_size, device=getattr(model, "device", None))) as batches:
        own = [batch and look(batch) for batch in track(batches)]
    found = list(group.in_order(own))

    def summary() -> Evaluation:
        if not found:
            raise ValueError("expected images; received none; check the image source")
        truth, before = torch.cat([x.labels for x in found]), torch.cat([x.clean for x in found])
        if target is None:
            return _evaluation(names, truth, before)
        if isinstance(trigger, DecomposedImages):
            theirs = trigger.labels.cpu()
            after = [classify(model, part.images, classifier) for part in trigger.batches(batch_size)]
        else:
            theirs, after = truth, [x.triggered for x in found if x.triggered is not None]
        return _evaluation(names, truth, before, (theirs, torch.cat(after), target))

    return group.in_first(summary)


class _Answers(NamedTuple):
    """Of a batch."""

    labels: Int[Tensor, " image"]
    clean: Int[Tensor, " image"]
    triggered: Int[Tensor, " image"] | None


def _evaluation(
    names: list[str],
    truth: Int[Tensor, " image"],
    before: Int[Tensor, " image"],
    attack: tuple[Int[Tensor, " triggered"], Int[Tensor, " triggered"], int] | None = None,
) -> Evaluation:
    """Rates of the answers to clean images, and of an attack: triggered images' classes, the answers to them, and the target."""
    n = len(names)
    accuracies = per_class_accuracy(before, truth, n)
    if attack is None:
        report = AttackReport(Rate.of(before == truth), None, None, None)
        rows = [ClassRates(name, rate, None, None) for name, rate in zip(names, accuracies, strict=True)]
        return Evaluation(report, tuple(rows), None, truth, before, None)
    theirs, after, target = attack
    rows = [
        ClassRates(
            names[label],
            accuracies[label],
            Rate.of(after[theirs == label] == target),
            Rate.of(before[truth == label] == target),
        )
        for label in range(n)
    ]
    report = attack_report(before, truth, after, theirs, target)
    return Evaluation(report, tuple(rows), target, truth, before, after)


def check_attack(n_classes: int, trigger: object, target: int | None) -> None:
    """Raises ValueError unless trigger and target come together and the target is one of the classes."""
    if (trigger is None) != (target is None):
        given, lacking = ("a target", "trigger") if trigger is None else ("a trigger", "target")
        raise ValueError(
            f"expected a trigger and a target, or neither; received {given} alone; pass the {lacking} too"
        )
    if target is not None:
        check_target(target, n_classes)


def _check_batch(batch: Any, seen: int) -> None:
    if batch.labels is None:
        raise ValueError(
            f"expected a class for every image; received none from image {seen} on; sort the images into folders "
            "named after the classes"
        )
    if not isinstance(batch.images, Decomposition):
        check_pixels(batch.images, f" from image {seen} on")
