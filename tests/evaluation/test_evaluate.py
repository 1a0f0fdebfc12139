"""Evaluation of a model whose every answer is known by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from decompclip.attacks.trigger import Trigger
from decompclip.data.feed import Labelled
from decompclip.data.pairs import PairBatch
from decompclip.data.processes import Processes
from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import mlps
from decompclip.evaluation.evaluate import DecomposedImages, Evaluation, evaluate
from decompclip.intervals import Rate, wilson
from decompclip.models.bundled import load_bundled
from decompclip.operators.ablation import ZeroAblate

CLASSIFIER = torch.eye(3)
NAMES = ["red", "green", "blue"]
#          0  1  2  3  4  5  6  7  8  9
LABELS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
COLOURS = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]  # what the images show: 3 and 7 show another class than theirs


class CornerReader:
    """A CLIP that looks at one pixel: its feature is the pixel's colour."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def normalize(self, pixels: Tensor) -> Tensor:
        return 2 * pixels - 1

    def encode_image(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        assert images.min() >= -1
        return (images[:, :, 0, 0] + 1) / 2


@dataclass(frozen=True)
class Coloured:
    """Ten images, all of one colour each."""

    numbered: bool = True
    labelled: bool = True

    def batches(self, batch_size: int = 4) -> Iterator[SimpleNamespace]:
        pixels = torch.eye(3)[COLOURS][:, :, None, None].expand(10, 3, 4, 4)
        for start in range(0, 10, batch_size):
            part = slice(start, min(start + batch_size, 10))
            batch = SimpleNamespace(
                images=pixels[part], labels=tensor(LABELS[part]) if self.labelled else None
            )
            if self.numbered:
                batch.indices = torch.arange(10)[part] + 100
            yield batch


def blue_corner(images: Tensor, indices: Tensor) -> Tensor:
    """Paints the corner blue in images of even index; red in image 101 or 1."""
    out = images.clone()
    for row, index in enumerate(indices.tolist()):
        if index % 2 == 0:
            out[row, :, 0, 0] = tensor([0.0, 0.0, 1.0])
        elif index % 100 == 1:
            out[row, :, 0, 0] = tensor([1.0, 0.0, 0.0])
    return out


def found(**options: object) -> Evaluation:
    return evaluate(CornerReader(), Coloured(), CLASSIFIER, blue_corner, 2, class_names=NAMES, **options)  # pyright: ignore[reportArgumentType]


def test_the_rates_known_by_hand() -> None:
    result = found()
    assert result.predictions.tolist() == COLOURS
    assert result.triggered_predictions is not None
    #                                               0  1  2  3  4  5  6  7  8  9
    assert result.triggered_predictions.tolist() == [2, 0, 2, 1, 2, 1, 2, 2, 2, 2]
    report = result.report
    assert report.cacc == result.cacc == Rate(8, 10)
    assert report.asr == result.asr == Rate(5, 8)  # 0, 2, 4, 6 by the trigger, and 7, which was blue anyway
    assert report.asr_with_target == Rate(7, 10)
    assert report.control == Rate(1, 8)  # 7
    assert report.excess == pytest.approx(4 / 8)


def test_each_class_by_hand() -> None:
    red, green, blue = found().per_class
    assert (red.name, red.accuracy, red.asr, red.control) == ("red", Rate(3, 4), Rate(2, 4), Rate(0, 4))
    assert (green.name, green.accuracy, green.asr, green.control) == (
        "green",
        Rate(3, 4),
        Rate(3, 4),
        Rate(1, 4),
    )
    assert (blue.name, blue.accuracy, blue.asr, blue.control) == ("blue", Rate(2, 2), Rate(2, 2), Rate(2, 2))


def test_intervals_are_wilson_s() -> None:
    asr = found().asr
    assert asr is not None
    assert (asr.low, asr.high) == wilson(5 / 8, 8)
    # worked out from the formula by hand: z = 1.959964
    assert (asr.low, asr.high) == (pytest.approx(0.3057, abs=1e-4), pytest.approx(0.8632, abs=1e-4))


def test_a_trigger_that_writes_in_place_leaves_the_clean_images() -> None:
    held = [
        SimpleNamespace(images=batch.images.clone(), labels=batch.labels, indices=batch.indices)
        for batch in Coloured().batches()
    ]

    class Held:
        def batches(self, batch_size: int = 4) -> Iterator[SimpleNamespace]:
            yield from held

    def in_place(images: Tensor, indices: Tensor) -> Tensor:
        return images.copy_(blue_corner(images, indices))

    for _ in range(2):  # the data are as they were
        result = evaluate(CornerReader(), Held(), CLASSIFIER, in_place, 2, class_names=NAMES)
        assert result.to_dict() == found().to_dict()


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_a_part_of_pairs_keeps_its_places(batch_size: int) -> None:
    (whole,) = Coloured().batches(10)
    part = PairBatch(
        whole.images[3:], ("",) * 7, whole.labels[3:], tuple("3456789"), torch.arange(3, 10) + 100
    )
    result = evaluate(CornerReader(), part, CLASSIFIER, blue_corner, 2, batch_size=batch_size)
    assert result.triggered_predictions is not None
    assert result.triggered_predictions.tolist() == [1, 2, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10, 99])
def test_the_size_of_batches_changes_nothing_and_is_kept_to(batch_size: int) -> None:
    model = CornerReader()
    result = evaluate(model, Coloured(), CLASSIFIER, blue_corner, 2, class_names=NAMES, batch_size=batch_size)
    assert result.to_dict() == found().to_dict()
    assert max(model.sizes) <= batch_size
    unnumbered = evaluate(
        model, Coloured(numbered=False), CLASSIFIER, blue_corner, 2, class_names=NAMES, batch_size=batch_size
    )
    assert unnumbered.to_dict() == result.to_dict()


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_pairs_that_know_their_classes_are_images_with_labels(batch_size: int) -> None:
    pairs = [
        SimpleNamespace(image=image, label=int(label), caption="")
        for batch in Coloured().batches()
        for image, label in zip(batch.images, batch.labels, strict=True)
    ]
    model = CornerReader()
    result = evaluate(model, pairs, CLASSIFIER, blue_corner, 2, class_names=NAMES, batch_size=batch_size)
    assert result.to_dict() == found().to_dict()
    pairs[3].label = None
    with pytest.raises(ValueError, match=f"received none from image {3 // batch_size * batch_size} on"):
        evaluate(model, pairs, CLASSIFIER, batch_size=batch_size)


def test_without_an_attack_only_accuracy_is_known() -> None:
    model = CornerReader()
    result = evaluate(model, Coloured(), CLASSIFIER)
    assert result.cacc == Rate(8, 10)
    assert (result.asr, result.report.control, result.triggered_predictions, result.target) == (None,) * 4
    assert [row.name for row in result.per_class] == ["0", "1", "2"]
    assert sum(model.sizes) == 10  # no image is read twice
    assert list(result.to_frame().columns) == ["class", "images", "accuracy", "accuracy_low", "accuracy_high"]


def test_what_it_says() -> None:
    result = found()
    assert str(result) == (
        "CACC 80.0 % [49.0, 94.3]; ASR 62.5 % [30.6, 86.3]; control 12.5 % [2.2, 47.1]; "
        "ASR with target-class images 70.0 % [39.7, 89.2]"
    )
    read = json.loads(json.dumps(result.to_dict()))
    assert read["asr"]["count"] == 5
    assert read["per_class"][1]["class"] == "green"
    assert read["per_class"][1]["asr"]["value"] == 0.75
    frame = result.to_frame().set_index("class")
    assert frame.loc["all", "asr"] == 5 / 8
    assert frame.loc["green", "control_high"] == Rate(1, 4).high
    assert "<table" in result._repr_html_()


def test_a_figure_has_every_rate_of_every_class() -> None:
    result = found()
    plot: Any = result.figure()
    assert [bars.name for bars in plot.data] == ["accuracy", "asr", "control"]
    for bars in plot.data:
        rates = [getattr(row, bars.name).value for row in result.per_class]
        assert list(bars.x) == pytest.approx(rates, nan_ok=True)
    assert list(plot.layout.yaxis.ticktext) == NAMES and list(plot.layout.xaxis.range) == [0, 1]
    assert (plot.layout.xaxis.title.text, plot.layout.xaxis.tickformat) == ("share of images", ".0%")
    plain: Any = evaluate(CornerReader(), Coloured(), CLASSIFIER, class_names=NAMES).figure()
    assert [list(bars.x) for bars in plain.data] == [[row.accuracy.value for row in result.per_class]]


def test_scaling_the_features_changes_nothing() -> None:
    class Loud(CornerReader):
        def encode_image(self, images: Tensor) -> Tensor:
            return 1_000 * super().encode_image(images)

    result = evaluate(Loud(), Coloured(), CLASSIFIER, blue_corner, 2, class_names=NAMES)
    assert result.to_dict() == found().to_dict()


def test_processes_are_told_what_they_must_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Processes, "check_work", lambda _, *work: told.append(work))
    model, data = CornerReader(), Coloured()
    evaluate(model, data, CLASSIFIER, blue_corner, 2, batch_size=4)
    about = {"the trigger": blue_corner, "the target": 2, "the size of batches": 4}
    assert told == [(model, CLASSIFIER, {"the images or their preprocessing": data}, about)]


def test_holds_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)

    class Learning(CornerReader):
        def encode_image(self, images: Tensor) -> Tensor:
            features = super().encode_image(images) * weight
            assert not features.requires_grad
            return features

    evaluate(Learning(), Coloured(), CLASSIFIER)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"trigger": blue_corner},
            "a trigger and a target, or neither; received a trigger alone; pass the target too",
        ),
        ({"target": 1}, "received a target alone; pass the trigger too"),
        (
            {"trigger": blue_corner, "target": 3},
            r"expected a target in 0\.\.2, the classifier's classes; received 3",
        ),
        ({"trigger": blue_corner, "target": -1}, "received -1"),
        ({"class_names": ["a"]}, "a name for each of the classifier's 3 classes; received 1; pass the names"),
        ({"batch_size": 0}, "batch_size to be a whole number of images, at least 1; received 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(CornerReader(), Coloured(), CLASSIFIER, **options)  # pyright: ignore[reportArgumentType]


def test_images_that_cannot_be_scored_are_refused() -> None:
    class Empty:
        def batches(self, batch_size: int = 4) -> Iterator[SimpleNamespace]:
            yield from ()

    class Normalised:
        value = -1.5

        def batches(self, batch_size: int = 4) -> Iterator[SimpleNamespace]:
            yield from Coloured().batches(5)
            yield SimpleNamespace(images=torch.full((1, 3, 4, 4), self.value), labels=tensor([0]))

    class NoNumbers(Normalised):
        value = torch.nan

    with pytest.raises(ValueError, match="expected images; received none; check the image source"):
        evaluate(CornerReader(), Empty(), CLASSIFIER)
    with pytest.raises(
        ValueError, match=r"received -1.50..-1.50 from image 10 on; leave the normalisation to"
    ):
        evaluate(CornerReader(), Normalised(), CLASSIFIER)
    with pytest.raises(ValueError, match=r"received nan..nan from image 10 on; leave the normalisation to"):
        evaluate(CornerReader(), NoNumbers(), CLASSIFIER)
    with pytest.raises(ValueError, match="a class for every image; received none from image 100 on; sort"):
        evaluate(CornerReader(), Coloured(labelled=False), CLASSIFIER)
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.1; received 0\.\.2"):
        evaluate(CornerReader(), Coloured(), torch.eye(3)[:2])


def test_an_edited_decomposition_scores_as_its_features_do() -> None:
    """Of an edit: each set of images decomposed, the triggered ones without those of the target's class."""
    model = load_bundled("shapes")
    batch = Shapes(24, seed=3).draw(range(24))
    d = model.decompose(model.normalize(batch.images), normalize=True)
    classifier = model.zero_shot_classifier(Shapes(24).class_names)
    others = batch.labels != 2
    edit = ZeroAblate(mlps[-1:])
    clean, triggered = DecomposedImages(d, batch.labels), DecomposedImages(d[others], batch.labels[others])
    found = evaluate(edit, clean, classifier, triggered, 2, batch_size=7)
    answers = (edit(d).features @ classifier.T).argmax(1)
    assert torch.equal(found.predictions, answers) and found.cacc == Rate.of(answers == batch.labels)
    assert found.asr == Rate.of(answers[others] == 2) == found.report.control
    assert torch.equal(evaluate(None, clean, classifier).predictions, (d.features @ classifier.T).argmax(1))
    for mixed, words in {
        (edit, Coloured()): "received ZeroAblate with Coloured as images; for an edit decompose",
        (CornerReader(), clean): "received CornerReader with DecomposedImages as images",
        (edit, clean, blue_corner, 2): "received ZeroAblate with function as trigger",
        (CornerReader(), Coloured(), clean, 2): "received CornerReader with DecomposedImages as trigger",
    }.items():
        with pytest.raises(TypeError, match=words):
            evaluate(mixed[0], mixed[1], classifier, *mixed[2:])
    with pytest.raises(ValueError, match="a label for each of 24 decomposed images; received 23; take both"):
        DecomposedImages(d, batch.labels[1:])


class Elsewhere(Tensor):
    """Images that are not on the CPU."""

    def cpu(self, *args: Any, **options: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_a_function_gets_pixels_on_the_cpu_and_a_trigger_where_the_model_is() -> None:
    seen: list[type] = []

    def function(images: Tensor, indices: Any) -> Tensor:
        seen.append(type(images))
        return blue_corner(images, indices)

    class Ours(Trigger):
        def __call__(self, images: Tensor, indices: Any) -> Tensor:
            return function(images, indices)

    class There(Coloured):
        def batches(self, batch_size: int = 4) -> Iterator[SimpleNamespace]:
            for batch in super().batches(batch_size):
                batch.images = batch.images.as_subclass(Elsewhere)
                yield batch

    for trigger in (function, Ours()):
        evaluate(CornerReader(), There(), CLASSIFIER, trigger, 2, batch_size=10)
    assert seen == [Tensor, Elsewhere]


def test_a_decomposition_is_no_source_of_images() -> None:
    """Its parts are gone through by `shards`, of a size of their own: `feed` would ask `batches` for one."""
    model = load_bundled("shapes")
    d = model.decompose(torch.randn(2, 3, *model.image_size))
    assert not isinstance(d, Labelled)
    assert isinstance(DecomposedImages(d, tensor([0, 1])), Labelled)
