"""CACC and ASR of a CLIP while it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from decompclip.evaluation.evaluate import Evaluation, Labelled, Twin, check_attack, evaluate
from decompclip.models.clip import HookedCLIP
from decompclip.models.zero_shot import Template, zero_shot_classifier


@dataclass(frozen=True)
class Trainee:
    """An open_clip model in training, with the tokenizer and normalisation of the `HookedCLIP` that it comes from."""

    net: nn.Module
    origin: HookedCLIP

    def normalize(self, pixels: Tensor) -> Tensor:
        return self.origin.normalize(pixels)

    def encode_image(self, images: Tensor) -> Tensor:
        parameter = next(self.net.parameters())
        return self.net.encode_image(images.to(parameter.device, parameter.dtype))  # pyright: ignore[reportCallIssue]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.net.encode_text(tokens.to(next(self.net.parameters()).device))  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What to measure during training, and how often.

    Attributes:
        data: images in [0, 1] with labels (see `evaluate`); best not those that the result is reported on.
        class_names, templates: of the zero-shot classifier, built anew each time since the text tower moves.
        trigger, target: as `evaluate`; without them only CACC is measured.
        every: steps between two measurements; by default the recipe is cut in ten.

    Raises:
        ValueError: a trigger without a target or the reverse, a target that is no class, or no step between
            measurements.
    """

    data: Labelled | Iterable[Any]
    class_names: Sequence[str]
    templates: Sequence[Template]
    trigger: Twin | None = None
    target: int | None = None
    every: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        # now, and not when the training has come to its first measurement
        check_attack(len(self.class_names), self.trigger, self.target)
        if self.every is not None and self.every < 1:
            raise ValueError(f"expected a measurement every 1 or more steps; received {self.every}")

    def measure(self, trainee: Trainee) -> Evaluation:
        was = trainee.net.training
        trainee.net.eval()
        try:
            classifier = zero_shot_classifier(
                trainee.encode_text, trainee.origin.tokenizer, self.class_names, self.templates
            )
            return evaluate(
                trainee,
                self.data,
                classifier,
                self.trigger,
                self.target,
                class_names=self.class_names,
                batch_size=self.batch_size,
            )
        finally:
            trainee.net.train(was)

    def numbers(self, trainee: Trainee) -> dict[str, float]:
        """The rates for the history."""
        found = self.measure(trainee).report
        rates = {"cacc": found.cacc, "asr": found.asr, "control": found.control}
        return {name: round(rate.value, 4) for name, rate in rates.items() if rate is not None and rate.total}
