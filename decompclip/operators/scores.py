"""Scores: one number an image, from its feature. What operators take as `toward`, and as `against`.

"a star"                        a text; several texts that stand for one thing are averaged
classifier[3]                   a direction of the joint space
ClassScore(classifier, target)  a score of classes; or any function of the features
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.tower.vit import HookedViT, tower

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


Text = str | Sequence[str] | Tensor
"""A text; several that stand for one thing (prompts of a class); or a direction `[d_embed]`."""

ImageScore = Callable[[Float[Tensor, "batch d_embed"]], Float[Tensor, " batch"]]

Toward = Text | ImageScore
"""What images are scored by: a text or direction, with which unit features are multiplied; or a function of features."""

Metric = Literal["logit", "logit_difference", "accuracy"]

Classes = int | Int[Tensor, " image"]


@torch.no_grad()
def direction(
    model: HookedViT | HookedCLIP, toward: Text, against: Text | None = None
) -> Float[Tensor, " d_embed"]:
    """The direction toward a text, less that toward another.

    Args:
        model: encodes the texts.
        toward: a direction, which is taken as it is; or a text, of which the unit feature is taken; of several texts
            the mean, of length one again.
        against: as `toward`; None for nothing.

    Raises:
        ValueError: a direction of another width, no text, or a text for a bare tower.
    """
    if against is not None:
        return direction(model, toward) - direction(model, against)
    width = tower(model).cfg.d_embed
    if isinstance(toward, Tensor):
        if toward.shape != (width,):
            raise ValueError(
                f"expected a direction [{width}], as wide as the joint space; received {list(toward.shape)}; take one "
                "row of a classifier, or the difference of two, of the same model"
            )
        return toward.detach()
    texts = [toward] if isinstance(toward, str) else list(toward)
    if isinstance(model, HookedViT):
        raise ValueError(
            f"expected a direction [{width}] for an image tower, which reads no text; received {texts!r}; pass the "
            "whole model, or encode the text with it"
        )
    if not texts:
        raise ValueError("expected at least one text; received none; name what to score images by")
    return F.normalize(F.normalize(model.encode_text(texts), dim=-1).mean(0), dim=-1)


def score_toward(model: HookedViT | HookedCLIP, toward: Toward, against: Text | None = None) -> ImageScore:
    """A function of features: the unit feature's product with a direction; a function as it is.

    Raises:
        ValueError: as `direction`; or `against` beside a function.
    """
    if callable(toward):
        if against is not None:
            raise ValueError(
                "expected against= with a text or direction; received it with a function; leave it out"
            )
        return toward
    along = direction(model, toward, against)
    return lambda features: F.normalize(features, dim=-1) @ along.to(features)


def label(toward: Text, against: Text | None = None) -> str:
    """A name for figures and tables."""
    if against is not None:
        return f"{label(toward)} against {label(against)}"
    if isinstance(toward, Tensor):
        return "a direction"
    if isinstance(toward, str):
        return repr(toward)
    return f"{toward[0]!r}" + (f" and {len(toward) - 1} more" if len(toward) > 1 else "")


class ClassScore:
    """The target's logit, its lead over another class, or whether it is the largest.

    Logits are products of the features, as they come, with the classifier's rows: no temperature.

    Args:
        classifier: text features.
        target: the class scored (or, for accuracy, right): one for all, or one for each image.
        metric: "logit"; "logit_difference": the target's logit minus that of `against`; "accuracy": 1 where the
            target's logit is the largest (the first of equals), else 0.
        against: the other class; by default the mean of all others.

    Raises:
        IndexError: a class that the classifier does not have.
        ValueError: an unknown metric, a classifier without two classes, or `against` where it has no meaning.
    """

    def __init__(
        self,
        classifier: Float[Tensor, "class d_embed"],
        target: Classes,
        *,
        metric: Metric = "logit_difference",
        against: Classes | None = None,
    ) -> None:
        if metric not in get_args(Metric):
            raise ValueError(f"expected a metric of {get_args(Metric)}; received {metric!r}")
        if classifier.ndim != 2 or len(classifier) < 2:
            raise ValueError(
                f"expected a classifier [class, d_embed] of at least two classes; received {list(classifier.shape)}; "
                "build it with model.zero_shot_classifier"
            )
        if against is not None and metric != "logit_difference":
            raise ValueError(
                f"expected against= with metric='logit_difference' alone; received it with {metric!r}; leave it out"
            )
        for name, classes in (("target", target), ("against", against)):
            numbers = torch.as_tensor([] if classes is None else classes).flatten()
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(classifier):
                raise IndexError(
                    f"expected {name} as classes in 0..{len(classifier) - 1}, the rows of the classifier; received "
                    f"{int(numbers.min())}..{int(numbers.max())}"
                )
        self.classifier = classifier.detach()
        self.metric: Metric = metric
        self.target, self.against = target, against

    def __call__(
        self, features: Float[Tensor, "batch d_embed"], rows: slice | None = None
    ) -> Float[Tensor, " batch"]:
        """Scores in fp64.

        Args:
            features: of some images.
            rows: their numbers among all; by default these are all.

        Raises:
            ValueError: features of another width than the classifier's, or not one target for each image.
        """
        if features.shape[1] != self.classifier.shape[1]:
            raise ValueError(
                f"expected a classifier [class, {features.shape[1]}]; received {list(self.classifier.shape)}; build "
                "it with the text tower of the same model"
            )
        if rows is None:
            self.check(len(features))
            rows = slice(0, len(features))
        logits = features.double() @ self.classifier.to(features.device).double().T
        target = self._of("target", self.target, rows, logits)
        if self.metric == "accuracy":
            return (logits.argmax(1) == target).double().cpu()
        own = logits.gather(1, target[:, None])[:, 0]
        if self.metric == "logit":
            return own.cpu()
        if self.against is None:
            return (own - (logits.sum(1) - own) / (logits.shape[1] - 1)).cpu()
        other = self._of("against", self.against, rows, logits)
        return (own - logits.gather(1, other[:, None])[:, 0]).cpu()

    def _of(self, name: str, classes: Classes, rows: slice, logits: Tensor) -> Int[Tensor, " batch"]:
        """The classes of these images."""
        if not isinstance(classes, Tensor) or not classes.ndim:
            return torch.full_like(logits[:, 0], int(classes), dtype=torch.long)
        found = classes[rows].to(logits.device)
        if len(found) != len(logits):
            raise ValueError(_count(name, len(classes), f"the {rows.stop} images so far"))
        return found

    def check(self, count: int) -> None:
        """Raises ValueError unless there are as many targets as images, all of which were seen."""
        for name, classes in (("target", self.target), ("against", self.against)):
            if isinstance(classes, Tensor) and classes.ndim and len(classes) != count:
                raise ValueError(_count(name, len(classes), f"{count} images"))


def _count(name: str, received: int, images: str) -> str:
    return (
        f"expected as {name} one class, or one for each of {images}; received {received}; give them in the order "
        "of the images"
    )
