"""Other ways to run a model, one change at a time, and whether they do better on the same images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from decompclip.diagnosis.pictures import NORMALISATIONS, Views, normalise
from decompclip.diagnosis.result import Comparison, Fault, Measurement
from decompclip.intervals import Paired, Rate
from decompclip.models.clip import HookedCLIP
from decompclip.tower.layers import ACTIVATIONS, MLP

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
