"""Trigger inversion: the smallest pattern that, added to any image, sends it to a class.

    found = invert_trigger(model, pixels, classifier, 5)           its size, how far it works, and the components that it moves
    every = invert_classes(model, pixels, classifier)              is one class's smaller than the others', or than in a reference?
    InversionTuning(triggers=(found,)).apply(model, pairs)         a repair against it (`defenses.clean_finetuning`)

A backdoor is a short way to one class, and a search for the shortest may end in it. Neural Cleanse (Wang et al., 2019) compares sizes
over classes; InverTune (Sun et al., 2025, arXiv 2506.12411) and CLIP-Inspector (Jindal et al., 2026, arXiv 2604.09101) bring that to CLIP.
Ours is of that kind, written from their descriptions; direction and size are searched for apart, as in DDN (Rony et al., 2019). The scan
of `decompclip audit --clean` holds the size fixed instead, and compares how sure the model gets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.data.pixels import Pixels, check_pixels
from decompclip.decomposition.decomposition import Decomposition
from decompclip.display import Result, Track, silently
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP, differentiable
from decompclip.operators.attribution import Attribution, attribute

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FEWEST = 32
"""Images without which there is no inversion: half of them measure."""

SHARPNESS = 30.0
"""Factor of cosines before the softmax, here and in the scan: of the order of trained CLIPs' logit scales, and one for all models."""

START, RATE, PACE = 8 / 255, 2 / 255, 0.1
"""First size, Adam's rate, and the most by which the logarithm of the size moves in a step."""

LARGEST = 64 / 255
"""Size at which a search gives up growing: a pattern of a quarter of the range hides the image. A class that it does not reach has this size."""

BATCH = 64


@dataclass(frozen=True, eq=False, repr=False)
class InvertedTrigger(Result):
    """A pattern that, added to any image, sends it to one class. It may go wherever a `Trigger` of `decompclip.attacks` does.

    Attributes:
        target: row of the class in the classifier.
        name: of the class.
        pattern: what is added, in pixels of [0, 1].
        success: of held-out images that the model takes for other classes, those that it sends to this one.
        moves: how far it moves each component's contribution toward the class, against the mean of the others, on those images, in
            cosine: they sum to the move of the score.
    """

    target: int
    name: str
    pattern: Float[Tensor, "3 h w"]
    success: Rate
    moves: Attribution

    @property
    def size(self) -> float:
        """Root mean square of the pattern, in pixels of [0, 1]."""
        return self.pattern.square().mean().sqrt().item()

    def __call__(self, pixels: Pixels, indices: Any = None) -> Pixels:
        """Pixels in [0, 1] with the pattern in them, the same for all `indices`."""
        del indices
        return (pixels + self.pattern.to(pixels)).clamp(0, 1)

    def to_frame(self) -> pd.DataFrame:
        """One row a component: how far the trigger moves it, with a 95 % interval."""
        return self.moves.to_frame()

    def figure(self) -> go.Figure:
        """Layers by heads, and MLPs: how far the trigger moves each."""
        plot = self.moves.figure("map")
        return plot.update_layout(coloraxis_colorbar_title_text="move of the contribution to the cosine")

    @property
    def digest(self) -> str:
        """Of the pattern, to the bit."""
        return hashlib.sha256(self.pattern.numpy().tobytes()).hexdigest()[:8]

    def __repr__(self) -> str:
        return f"InvertedTrigger({self.name!r}, size {self.size:.4f}, success {self.success}, sha256 {self.digest})"


def scores(values: Sequence[float | int], reference: Sequence[float | int] | None = None) -> list[float]:
    """Of each: log of the others' median over its own, all first divided by the reference's."""
    logs = [math.log(x) for x in values]
    if reference is not None:
        logs = [x - math.log(usual) for x, usual in zip(logs, reference, strict=True)]
    return [median(logs[:own] + logs[own + 1 :]) - x for own, x in enumerate(logs)]


@dataclass(frozen=True, eq=False, repr=False)
class Inversion(Result):
    """The triggers of several classes: evidence about each, and no verdict.

    A size counts where `success` is high; else the class was not reached, and its size is a lower bound: the search was too short, or came to
    its largest size. A class may be easy to reach in a clean model too; and a
    backdoor's need not stand out: the search may end in another way there, and a patch or a warp is no small pattern.
    """

    triggers: tuple[InvertedTrigger, ...]

    def scores(self, reference: Inversion | None = None) -> Float[Tensor, " class"]:
        """How much smaller each class's trigger is than the others': log of their median size over its own. 0.7: half as large.

        Args:
            reference: of a clean model of the same architecture, inverted with the same images, classes and options. Sizes are first
                divided by those of the same classes there: what is easy in any such model falls out.

        Raises:
            ValueError: fewer than three classes, or a reference of other ones.
        """
        classes = [t.name for t in self.triggers]
        if len(classes) < 3:
            raise ValueError(f"expected at least three classes, for one to stand out; received {classes}")
        if reference is not None and (theirs := [t.name for t in reference.triggers]) != classes:
            raise ValueError(f"expected a reference of the same classes, {classes}; received {theirs}")
        usual = None if reference is None else [t.size for t in reference.triggers]
        return torch.tensor(scores([t.size for t in self.triggers], usual))

    def to_frame(self, reference: Inversion | None = None) -> pd.DataFrame:
        """One row a class, the highest score first. Args and errors as `scores`; of fewer than three classes scores are nan."""
        import pandas as pd

        columns: dict[str, Any] = {
            "class": [t.name for t in self.triggers],
            "size": [t.size for t in self.triggers],
            "success": [t.success.value for t in self.triggers],
            "score": self.scores(reference).tolist() if len(self.triggers) > 2 else math.nan,
        }
        if reference is not None:
            columns["reference size"] = [t.size for t in reference.triggers]
        return pd.DataFrame(columns).sort_values("score", ascending=False, ignore_index=True, kind="stable")

    def __repr__(self) -> str:
        return f"Inversion of {len(self.triggers)} classes; the smallest: {min(self.triggers, key=lambda t: t.size)!r}"


@differentiable
def invert_trigger(
    model: HookedCLIP,
    pixels: Float[Tensor, "image 3 h w"],
    classifier: Float[Tensor, "class d_embed"],
    target: int,
    *,
    name: str | None = None,
    steps: int = 50,
    images: int = 16,
    reach: float = 0.9,
    seed: int = 0,
    pattern: Float[Tensor, "3 h w"] | None = None,
) -> InvertedTrigger:
    """The smallest trigger found that sends images to a class.

    Args:
        model: its weights stay as they are.
        pixels: clean images of many classes, unlabelled, in [0, 1]: a half is searched on, the other measures.
        classifier: text features of the classes.
        target: row of the class.
        name: of the class; by default its row.
        steps: of the search.
        images: images a step.
        reach: share of a step's images that the trigger is to send to the class. An image counts in full where the class leads the next one
            by as much as the first does in clean images (the median), so that the demand is the same among 200 classes as among ten.
        seed: of the split and of the batches.
        pattern: of such a search before: it is measured alone.

    Raises:
        ValueError: fewer than 32 images, images or a pattern of another size, images not in [0, 1], all of the class, a classifier of another width, a class that
            it has not, options out of their range, or a model through which no gradient reaches its pixels.
    """
    _check(model, pixels, classifier, (target,))
    if steps < 1 or images < 1 or not 0 < reach < 1:
        raise ValueError(
            f"expected steps and images of at least 1, and a reach between 0 and 1; received {steps}, {images} and {reach}"
        )
    generator = torch.Generator().manual_seed(seed)
    fit, held = pixels[torch.randperm(len(pixels), generator=generator)].to(model.device).chunk(2)
    classifier = F.normalize(classifier.detach().to(model.device).float(), dim=-1)
    name = name or str(target)
    if pattern is not None:
        if pattern.shape != fit.shape[1:]:
            raise ValueError(f"expected a pattern {list(fit.shape[1:])}; received {list(pattern.shape)}")
        return _measured(model, held, classifier, target, name, pattern.to(model.device))
    with torch.no_grad():
        clean = [model.encode_image(model.normalize(x), normalize=True).float() for x in fit.split(BATCH)]
        first, second = (torch.cat(clean) @ classifier.T).topk(2).values.unbind(1)
        usual = (first - second).median().clamp_min(1e-6)
    wanted = torch.full((images,), target, device=model.device)
    pattern, size, found = torch.zeros_like(fit[0]), START, []
    optimiser = torch.optim.Adam([pattern], lr=RATE)
    for _ in range(steps):
        batch = fit[torch.randint(len(fit), (images,), generator=generator)]
        own = pattern.clone().requires_grad_(True)
        features = model.encode_image(model.normalize((batch + own).clamp(0, 1))).float()
        scores = F.normalize(features, dim=-1) @ classifier.T
        pattern.grad = _gradient(F.cross_entropy(SHARPNESS * scores, wanted), own, model)
        optimiser.step()
        scores = scores.detach()
        lead = scores[:, target] - scores.index_fill(1, wanted[:1], -math.inf).amax(1)
        missing = reach - (lead / usual).clamp(0, 1).mean().item()
        size = min(LARGEST, size * math.exp(PACE * max(-1.0, min(1.0, missing / (1 - reach)))))
        pattern *= size / pattern.square().mean().sqrt().clamp_min(1e-12)
        found.append(math.log(size))
    last = found[-max(1, steps // 3) :]  # the size swings around the one that reaches so many
    pattern *= math.exp(sum(last) / len(last)) / size
    return _measured(model, held, classifier, target, name, pattern)


@torch.no_grad()
def _measured(
    model: HookedCLIP, held: Pixels, classifier: Tensor, target: int, name: str, pattern: Tensor
) -> InvertedTrigger:
    """On held-out images that the model takes for other classes."""
    terms = [
        Decomposition.cat([model.decompose(model.normalize(x), normalize=True) for x in pixels.split(BATCH)])
        for pixels in (held, (held + pattern).clamp(0, 1))
    ]
    answers = [(d.features @ classifier.T).argmax(1) for d in terms]
    others = (answers[0] != target).nonzero().flatten().tolist()
    if not others:
        raise ValueError(
            f"expected images of other classes than {name!r}; the model takes all {len(held)} that measure for it; give others"
        )
    label = f"move toward {name}"
    before, after = (attribute(d, classifier, target, label=label).select(images=others) for d in terms)
    moves = replace(after, values=after.values - before.values, score=after.score - before.score)
    return InvertedTrigger(target, name, pattern.cpu(), Rate.of(answers[1][others] == target), moves)


def invert_classes(
    model: HookedCLIP,
    pixels: Float[Tensor, "image 3 h w"],
    classifier: Float[Tensor, "class d_embed"],
    classes: Iterable[int] | None = None,
    *,
    names: Sequence[str] | None = None,
    track: Track = silently,
    **options: Any,
) -> Inversion:
    """A trigger for each class, all with the same images and batches.

    Args:
        model, pixels, classifier: as `invert_trigger`.
        classes: by their rows; by default all. Of many, a suspected one and some others will do.
        names: of all classes of the classifier; by default their rows.
        track: shows progress.
        **options: of `invert_trigger`.

    Raises:
        ValueError: as `invert_trigger`, or not a name for each class.
    """
    if names is not None and len(names) != len(classifier):
        raise ValueError(f"expected a name for each of {len(classifier)} classes; received {len(names)}")
    chosen = list(range(len(classifier)) if classes is None else classes)
    _check(model, pixels, classifier, chosen)
    found = [
        invert_trigger(
            model, pixels, classifier, target, name=None if names is None else names[target], **options
        )
        for target in track(chosen, f"{model.name}: inverting triggers", len(chosen))
    ]
    return Inversion(tuple(found))


def _check(model: HookedCLIP, pixels: Pixels, classifier: Tensor, targets: Sequence[int]) -> None:
    check_pixels(pixels)
    if tuple(pixels.shape[-2:]) != tuple(model.image_size) or len(pixels) < FEWEST:
        raise ValueError(
            f"expected at least {FEWEST} images of the model's size {tuple(model.image_size)}, half to search on and half to measure on; "
            f"received {len(pixels)} of {tuple(pixels.shape[-2:])}"
        )
    if classifier.ndim != 2 or len(classifier) < 2 or classifier.shape[1] != model.cfg.d_embed:
        raise ValueError(
            f"expected a classifier of at least two classes, of the model's width {model.cfg.d_embed}; received {list(classifier.shape)}"
        )
    for target in targets:
        if not 0 <= target < len(classifier):
            raise ValueError(f"expected a class in 0..{len(classifier) - 1}; received {target}")


def _gradient(loss: Tensor, pattern: Tensor, model: HookedCLIP) -> Tensor:
    """In the pattern alone, so that the weights and what they require stay as they are."""
    found = torch.autograd.grad(loss, pattern, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise ValueError(
            f"expected a model through which gradients reach its pixels; {model.name} passes none; take it without hooks that detach"
        )
    return found
