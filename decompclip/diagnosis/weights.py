"""Faults that a model's weights and provenance show, without any image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.diagnosis.result import Fault, Measurement
from decompclip.diagnosis.trials import in_image_tower, in_text_tower, in_words
from decompclip.intervals import mean_interval
from decompclip.models.clip import HookedCLIP

LARGEST = math.log(100)
"""Of CLIP's logarithmic logit scale: training clamps it there. Sigmoid losses (SigLIP), with their bias, do not."""

LARGEST_SIGMOID = 7.0
TEMPERATURE = 0.2
"""Factors that training leaves are above 10; a temperature, their inverse, is below this."""

INITIAL = {"CLIP": math.log(1 / 0.07), "SigLIP": math.log(10)}
SHOWN = 3
_NAMES = (("w", "weight"), ("b", "bias"))


def weight_faults(model: HookedCLIP) -> Iterator[Fault]:
    """Weights that are not finite or still as they were drawn; activations at odds."""
    yield from _not_finite(model)
    random = model.provenance.get("pretrained") == "random"
    towers = {"image tower": model.visual, "text tower": model.text}
    for name, tower in towers.items():
        untouched, norms = _untouched(tower)
        if untouched or (random and norms):
            yield _drawn(name, untouched, norms, random)
    yield from _activations(model)


def _not_finite(model: HookedCLIP) -> Iterator[Fault]:
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        what = f"weights are not finite: {', '.join(bad[:SHOWN])}{', ...' if len(bad) > SHOWN else ''}"
        remedy = "load the checkpoint again in float32; if they are so in the file, the training diverged"
        yield Fault("weights", what, remedy, (Measurement("weights", len(bad)),))


def _untouched(tower: nn.Module) -> tuple[int, int]:
    """LayerNorms whose gains are all one and biases all zero, as no training leaves them; and all LayerNorms."""
    found = []
    for module in tower.modules():
        if type(module).__name__ == "LayerNorm" or isinstance(module, nn.LayerNorm):
            gain, bias = (getattr(module, short, getattr(module, long, None)) for short, long in _NAMES)
            if isinstance(gain, Tensor) and isinstance(bias, Tensor):
                found.append(bool((gain == 1).all() and (bias == 0).all()))
    return sum(found), len(found)


def _drawn(name: str, untouched: int, norms: int, random: bool) -> Fault:
    numbers = (Measurement("LayerNorms at their initial values", untouched), Measurement("of", norms))
    if random:
        what = f"the {name} has random weights, as was asked for"
        return Fault(name, what, "load trained weights", numbers)
    remedy = "load a checkpoint that holds its weights, and see that none of them is skipped"
    if untouched == norms:
        return Fault(name, f"the {name} looks untrained", remedy, numbers)
    return Fault(name, f"a part of the {name} looks untrained", remedy, numbers, "warning")


def _activations(model: HookedCLIP) -> Iterator[Fault]:
    """Activations that contradict one another need no images to be seen."""
    image, text = in_image_tower(model), in_text_tower(model)
    declared = {
        "the configuration": model.cfg.activation,
        "the provenance": model.provenance.get("activation"),
    }
    for whose, name in declared.items():
        if name and image != {name}:
            what = f"the activation is not the one that {whose} names: that is {in_words({name})}, and the image tower runs {in_words(image)}"
            yield Fault("activation", what, f"load the weights with activation={name!r}")
            return
    plain = {"gelu", "quick_gelu"}
    if image <= plain and text and text <= plain and image != text:
        what = f"the towers differ in their activation: the image tower runs {in_words(image)}, the text tower {in_words(text)}"
        remedy = "load both from one checkpoint, with one `activation`"
        yield Fault("activation", what, remedy, severity="warning")


def logit_scale_faults(
    model: HookedCLIP,
    similarity: Float[Tensor, "batch class"] | None,
    labels: Int[Tensor, " batch"],
) -> Iterator[Fault]:
    """A logit scale that cannot be the logarithm of a factor that training left.

    Args:
        model: whose logit scale is looked at.
        similarity: cosines of images and classes, for the log loss under the present and the proposed scale;
            None where they show nothing.
        labels: the images' classes.
    """
    value = float(model.logit_scale.detach())
    sigmoid = getattr(model.text, "logit_bias", None) is not None
    largest = LARGEST_SIGMOID if sigmoid else LARGEST
    numbers = (Measurement("logit scale", value), Measurement("factor", math.exp(min(value, 700.0))))
    if (read := _misread(value, largest)) is not None:
        gain = None
        # far above, the loss is that of a few images and its interval means nothing
        if read.proposal is not None and similarity is not None and not sigmoid and value < LARGEST_SIGMOID:
            gain = mean_interval(_loss(similarity, labels, value) - _loss(similarity, labels, read.proposal))
            numbers += (Measurement("log loss saved by the remedy", *gain),)
        if read.sure or (gain is not None and gain[1] > 0):
            what = read.what
            remedy = "keep the logarithm of the factor in `logit_scale`"
            remedy += "" if read.proposal is None else f": {read.proposal:.4f} here"
            if value > largest and gain is not None and gain[1] <= 0:
                what, numbers = "the logit scale is above ln 100, where training clamps it", numbers[:2]
                remedy = f"set it to at most {largest:.4f}"
            yield Fault("logit scale", what, remedy + _DEPENDS, numbers)
        return
    for loss, initial in INITIAL.items():
        if abs(value - initial) < 1e-6 and (loss == "SigLIP") == sigmoid:
            what = f"the logit scale is the one that {loss}'s training starts with: it was not loaded, or not trained"
            remedy = "take it from the checkpoint" + _DEPENDS
            yield Fault("logit scale", what, remedy, numbers, "warning")


_DEPENDS = "; probabilities and losses depend on it, zero-shot accuracy does not"


@dataclass(frozen=True)
class _Reading:
    """What a value seems to be, what it should be then, and whether that is sure without images."""

    what: str
    proposal: float | None
    sure: bool


def _misread(value: float, largest: float) -> _Reading | None:
    if not math.isfinite(value):
        return _Reading("the logit scale is not finite", None, True)
    if value > largest + 1e-3:
        factor = 1 < value <= math.exp(largest)
        what = "above ln 100: a factor is kept where its logarithm belongs" if factor else "far above ln 100"
        return _Reading(f"the logit scale is {what}", math.log(value) if factor else None, True)
    if value < 0:
        what = "the logit scale is negative: the logarithm of the temperature, its inverse, is kept"
        return _Reading(what, -value, True)
    if value <= TEMPERATURE:
        what = "the logit scale is next to 0: the temperature itself is kept where a logarithm belongs"
        return _Reading(what, -math.log(value) if value else None, True)
    if value <= math.log(largest) + 0.05:
        what = "the logit scale is the logarithm of a logarithm: a log was taken for the factor"
        return _Reading(what, math.exp(value), False)
    return None


def _loss(similarity: Tensor, labels: Tensor, scale: float) -> Float[Tensor, " batch"]:
    return F.cross_entropy(similarity.double() * math.exp(scale), labels, reduction="none")
