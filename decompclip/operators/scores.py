"""Scores: one number an image, from its feature. What operators take as `toward`, and as `against`.

"a star"                        a text; several texts that stand for one thing are averaged (`encode_texts`: each by itself)
classifier[3]                   a direction of the joint space
ClassScore(classifier, target)  a score of classes; or any function of the features
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_choice
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import same_model, term_maps
from decompclip.models.text import texts_of
from decompclip.operators.inputs import TextFeatures
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
        TypeError: a text that is no string.
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
    texts = texts_of(toward)
    if isinstance(model, HookedViT):
        raise ValueError(
            f"expected a direction [{width}] for an image tower, which reads no text; received {texts!r}; pass the "
            "whole model, or encode the text with it"
        )
    if not texts:
        raise ValueError("expected at least one text; received none; name what to score images by")
    return F.normalize(F.normalize(model.encode_text(texts), dim=-1).mean(0), dim=-1)


@torch.no_grad()
def directions(
    d: Decomposition,
    toward: Text | TextFeatures | Float[Tensor, "text d_embed"],
    against: Text | None = None,
    model: HookedCLIP | None = None,
) -> tuple[Float[Tensor, "text d_embed"], tuple[str, ...]]:
    """One direction, or many, for terms that are there already; with a name for each.

    Args:
        d: the terms, which know their width and model.
        toward: as `direction` takes it; or features of many texts.
        against: subtracted from each.
        model: encodes texts in words.

    Raises:
        ValueError: as `direction`; a text without a model; texts or a model other than that of the terms; a function.
    """
    if isinstance(toward, TextFeatures) or (isinstance(toward, Tensor) and toward.ndim == 2):
        along, names = features_of(toward, d.d_embed, d.maps.fingerprint)
    else:
        along = _direction(d, toward, model)[None]
        names = (toward if isinstance(toward, str) else label(toward),)
    if against is None:
        return along, names
    away = _direction(d, against, model)
    other = against if isinstance(against, str) else label(against)
    return along - away.to(along), tuple(f"{name} against {other}" for name in names)


def features_of(
    texts: TextFeatures | Tensor, width: int, mark: Tensor | None
) -> tuple[Float[Tensor, "text d_embed"], tuple[str, ...]]:
    """Features of many texts, each by itself, with a name for each.

    Args:
        texts: the features.
        width: of the joint space.
        mark: fingerprint of the model that they are used with; None where unknown.

    Raises:
        ValueError: none, features of another width, or texts of another model.
    """
    if isinstance(texts, TextFeatures):
        _check_model(texts.model, mark, f"{texts!r}", "encode_texts(model, texts)")
        along, names = texts.features, texts.texts
    else:
        along, names = texts.detach(), tuple(f"text {i}" for i in range(len(texts)))
    if along.ndim != 2 or along.shape[1] != width or not len(along):
        raise ValueError(
            f"expected text features [text, {width}], as wide as the joint space; received {list(along.shape)}; "
            "encode the texts with the text tower of the same model"
        )
    return along, names


def _direction(d: Decomposition, toward: Any, model: HookedCLIP | None) -> Float[Tensor, " d_embed"]:
    if isinstance(toward, Tensor) and toward.shape == (d.d_embed,):
        return toward.detach()
    if callable(toward) or isinstance(toward, Tensor):
        shown = f"directions {list(toward.shape)}" if isinstance(toward, Tensor) else "a function of features"
        raise ValueError(
            f"expected a text, or a direction [{d.d_embed}], along which a score is a sum over components; received "
            f"{shown}; take a row of a classifier, or the classifier with target="
        )
    if model is None:
        raise ValueError(
            f"expected a direction, or the model that encodes the text; received {toward!r} alone; pass model=model"
        )
    mark = term_maps(tower(model), d.convention).fingerprint
    _check_model(mark, d.maps.fingerprint, repr(model), "decompose its own images")
    return direction(model, toward)


def _check_model(ours: Tensor | None, theirs: Tensor | None, received: str, remedy: str) -> None:
    if ours is not None and theirs is not None and not same_model(ours, theirs):
        raise ValueError(
            f"expected texts by the model that reads the images; received {received}, of other weights; {remedy}"
        )


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
        TypeError: a class by its name.
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
        check_choice("metric", metric, Metric)
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
            if isinstance(classes, str):
                raise TypeError(
                    f"expected {name} by its row of the classifier; received {classes!r}; take class_names.index({classes!r})"
                )
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

    @property
    def label(self) -> str:
        """A name for figures and tables."""

        def name(classes: Classes | None) -> str:
            if classes is None:
                return "all others"
            single = not isinstance(classes, Tensor) or not classes.ndim
            return f"class {int(classes)}" if single else "each image's class"

        return name(self.target) + (
            f" against {name(self.against)}" if self.metric == "logit_difference" else ""
        )

    def directions(self, rows: slice) -> Float[Tensor, "#batch d_embed"]:
        """What features are multiplied by, on the CPU: one direction for all images, or one for each of these.

        Raises:
            ValueError: accuracy, which is no product.
        """
        if self.metric == "accuracy":
            raise ValueError(
                "expected a logit or a difference of logits; received 'accuracy', which is no product"
            )
        weights = self.classifier.cpu().double()

        def of(name: str, classes: Classes) -> Tensor:
            if not isinstance(classes, Tensor) or not classes.ndim:
                return weights[[int(classes)]]
            if len(classes) < rows.stop:
                raise ValueError(_count(name, len(classes), f"the {rows.stop} images so far"))
            return weights[classes[rows].cpu()]

        own = of("target", self.target)
        if self.metric == "logit":
            return own
        if self.against is None:
            return own - (weights.sum(0) - own) / (len(weights) - 1)
        return own - of("against", self.against)

    def _of(self, name: str, classes: Classes, rows: slice, logits: Tensor) -> Int[Tensor, " batch"]:
        """The classes of these images."""
        if not isinstance(classes, Tensor) or not classes.ndim:
            return logits.new_full((len(logits),), int(classes), dtype=torch.long)
        found = classes[rows].to(logits.device)
        if len(found) != len(logits):
            raise ValueError(_count(name, len(classes), f"the {rows.stop} images so far"))
        return found

    def check(self, count: int) -> None:
        """Raises ValueError unless there are as many targets as images, all of which were seen."""
        for name, classes in (("target", self.target), ("against", self.against)):
            if isinstance(classes, Tensor) and classes.ndim and len(classes) != count:
                raise ValueError(_count(name, len(classes), f"{count} images"))


def class_score(toward: object, target: Classes, metric: Metric, against: Any) -> ClassScore:
    """The score of a target among classes, whose texts are in order.

    Raises:
        ValueError: `toward` is no classifier; or as `ClassScore`.
    """
    toward = toward.features if isinstance(toward, TextFeatures) else toward
    if not isinstance(toward, Tensor):
        raise ValueError(
            f"expected text features [class, d_embed] beside a target; received {toward!r}; make them with "
            "model.zero_shot_classifier"
        )
    return ClassScore(toward, target, metric=metric, against=against)


def _count(name: str, received: int, images: str) -> str:
    return (
        f"expected as {name} one class, or one for each of {images}; received {received}; give them in the order "
        "of the images"
    )
