"""Faults that a model's weights show without any image; and other ways to run it, one change at a time, on the same images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.diagnosis.pictures import NORMALISATIONS, Views, normalise
from decompclip.diagnosis.result import Comparison, Fault, Measurement
from decompclip.display import some
from decompclip.intervals import Paired, Rate, mean_interval
from decompclip.models.clip import HookedCLIP
from decompclip.tower.layers import ACTIVATIONS, MLP

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
        what = f"weights are not finite: {some(bad, SHOWN)}"
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


WORDS = {"gelu": "GELU", "quick_gelu": "QuickGELU", "gelu_tanh": "tanh-GELU", "silu": "SiLU"}


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)  # pyright: ignore[reportArgumentType]


def with_activation(model: HookedCLIP, activation: str) -> HookedCLIP:
    """`model` with this activation in both towers, as `load(activation=...)` gives it; the weights are shared."""
    kept = (*model.parameters(), *model.buffers(), model.tokenizer, model.preprocess)
    other = copy.deepcopy(model, {id(thing): thing for thing in kept})
    for mlp in _image_mlps(other):
        mlp.act = ACTIVATIONS[activation]  # pyright: ignore[reportArgumentType]
    for mlp in _text_mlps(other):
        mlp.gelu = _Activation(activation)
    return other


def in_image_tower(model: HookedCLIP) -> set[str]:
    """Names of the activations that the image tower's MLPs run."""
    known = {id(function): name for name, function in ACTIVATIONS.items()}
    return {known.get(id(mlp.act), "another") for mlp in _image_mlps(model)}


def in_text_tower(model: HookedCLIP) -> set[str]:
    """Names of the activations of open_clip's own text tower; none for those of other libraries."""
    known = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
    return {known.get(type(mlp.gelu).__name__, "another") for mlp in _text_mlps(model)}


def in_words(activations: set[str]) -> str:
    return " and ".join(WORDS.get(name, name) for name in sorted(activations))


def _image_mlps(model: HookedCLIP) -> Iterator[MLP]:
    return (module for module in model.visual.modules() if isinstance(module, MLP))


def _text_mlps(model: HookedCLIP) -> Iterator[nn.Sequential]:
    return (m for m in model.text.modules() if isinstance(m, nn.Sequential) and hasattr(m, "gelu"))


MARGIN = 0.01
"""Gain of accuracy that the lower end of an interval must pass: a good model, too, may like one crop a little better."""

GRAVE = 0.05
"""Likewise, to be called an error."""

Classify = Callable[[HookedCLIP], Float[Tensor, "class d_embed"]]


@dataclass(frozen=True)
class Trial:
    """One other way: which images the tower gets, which tower, and which classifier.

    Attributes:
        check, name: what is changed, and to what.
        view: the tower's input; None where these images cannot be given so.
        model, classifier: what they go through.
        what, remedy: of the finding, if this way does better.
    """

    check: str
    name: str
    view: Callable[[Views], Float[Tensor, "batch 3 h w"] | None]
    model: HookedCLIP
    classifier: Float[Tensor, "class d_embed"]
    what: str
    remedy: str


def trials(model: HookedCLIP, classify: Classify, classifier: Float[Tensor, "class d_embed"]) -> list[Trial]:
    """Every way that is worth trying with this model; the first is the model as it is."""
    mode = model.preprocess_cfg.resize_mode
    views: dict[tuple[str, str], tuple[Callable[[Views], Tensor | None], str, str]] = {
        ("as it is", "as it is"): (lambda views: views.fed, "", ""),
        ("preprocessing", "the model's own preprocessing"): (
            lambda views: model.normalize(views.pixels) if views.foreign else None,
            "the images are not preprocessed as this model wants them",
            "pass pictures through this model's `preprocess`, or pixels in [0, 1] through its `normalize`",
        ),
        ("channels", "blue, green, red"): (
            lambda views: model.normalize(views.pixels.flip(1)),
            "the channels are in the wrong order: blue, green, red for red, green, blue (OpenCV's order)",
            "reverse them, as by `images.flip(1)`, or read the pictures with PIL",
        ),
        ("geometry", "cropped" if mode == "squash" else "squashed"): (
            lambda views: None if views.reshaped is None else model.normalize(views.reshaped),
            "the pictures are brought to the tower's size in the wrong way: the model crops where it should squash, or the reverse",
            f"set `resize_mode` of the preprocessing, now {mode!r}",
        ),
    }
    own = torch.tensor([model.mean, model.std])
    for name, by in NORMALISATIONS.items():
        if (own - torch.tensor(by)).abs().max() > 1e-3:
            views["normalisation", f"{name} normalisation"] = (
                lambda views, by=by: normalise(views.pixels, by),
                f"the mean and standard deviation of the preprocessing are wrong: {name} normalisation does better",
                f"load it with the preprocessing mean={by[0]}, std={by[1]}",
            )
    found = [
        Trial(*key, view, model, classifier, what, remedy) for key, (view, what, remedy) in views.items()
    ]
    for key, other, what, remedy in _other_towers(model):
        found.append(Trial(*key, lambda views: views.fed, other, classify(other), what, remedy))
    return found


def _other_towers(model: HookedCLIP) -> Iterator[tuple[tuple[str, str], HookedCLIP, str, str]]:
    """What is changed and to what, the model with it, and what and remedy of the finding."""
    running = in_image_tower(model)
    if not model.cfg.gated and running & {"gelu", "quick_gelu", "gelu_tanh"}:
        # tanh-GELU is GELU to four digits
        worth = {"gelu", "quick_gelu"} - (running | ({"gelu"} if "gelu_tanh" in running else set()))
        for activation in sorted(worth):
            word = WORDS[activation]
            what = f"the activation is wrong: the weights want {word} and the towers run {in_words(running)}"
            other = with_activation(model, activation)
            yield ("activation", word), other, what, f"load them with activation={activation!r}"
    if model.visual.dtype in (torch.float16, torch.bfloat16):
        what = f"{str(model.visual.dtype).removeprefix('torch.')} is too coarse for this model"
        other = copy.deepcopy(model).float()
        yield ("precision", "float32"), other, what, "load it with dtype=torch.float32"


def compare(
    trial: Trial, right: Bool[Tensor, " batch"], base: Bool[Tensor, " batch"], among: int
) -> Comparison:
    """One way beside the model as it is."""
    paired = Paired.of(base, right)
    return Comparison(trial.check, trial.name, Rate.of(right), paired, paired.interval(among))


def better(tried: Sequence[tuple[Trial, Comparison]], accuracy: Rate) -> list[Fault]:
    """A fault for each setting of which another choice does better, the costliest first."""
    best: dict[str, tuple[Trial, Comparison]] = {}
    for trial, comparison in tried:
        held = best.get(trial.check)
        if comparison.interval[0] > MARGIN and (
            held is None or comparison.difference.value > held[1].difference.value
        ):
            best[trial.check] = trial, comparison
    if "preprocessing" in best:
        # what the model's own preprocessing corrects is no fault of the model's: settings are its rivals only
        gain = best["preprocessing"][1].difference.value
        best = {
            check: pair
            for check, pair in best.items()
            if check not in ("normalisation", "channels", "geometry")
            or pair[1].difference.value > gain + MARGIN
        }
    faults = []
    for trial, found in sorted(best.values(), key=lambda pair: -pair[1].difference.value):
        with_it = Measurement.of(f"with {found.name}", found.accuracy)
        numbers = (Measurement.of("zero-shot accuracy", accuracy), with_it, found.evidence)
        severity = "error" if found.interval[0] > GRAVE else "warning"
        faults.append(Fault(trial.check, trial.what, trial.remedy, numbers, severity))
    return faults
