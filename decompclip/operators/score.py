"""Score: one number an image, from its feature and the classes' text features."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Metric = Literal["logit", "logit_difference", "accuracy"]

Classes = int | Int[Tensor, " image"]


class Score:
    """The target's logit, its lead over another class, or whether it is the largest.

    Logits are products of the features, as they come, with the classifier's rows: no temperature.

    Args:
        classifier: text features.
        target: the class scored (or, for accuracy, right): one for all, or one for each image.
        metric: "logit"; "logit_difference": the target's logit minus that of `against`; "accuracy": 1 where the
            target's logit is the largest (the first of equals), else 0.
        against: by default the mean of all other classes.

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
            _check_classes(name, classes, len(classifier))
        self.classifier = classifier.detach()
        self.metric: Metric = metric
        self.target, self.against = target, against

    def __call__(self, features: Float[Tensor, "batch d_embed"], rows: slice) -> Float[Tensor, " batch"]:
        """Of the images whose numbers are `rows`, in fp64.

        Raises:
            ValueError: features of another width than the classifier's, or fewer targets than images.
        """
        if features.shape[1] != self.classifier.shape[1]:
            raise ValueError(
                f"expected a classifier [class, {features.shape[1]}]; received {list(self.classifier.shape)}; build "
                "it with the text tower of the same model"
            )
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
        """Once all images were scored: raises ValueError where there were more targets than images."""
        for name, classes in (("target", self.target), ("against", self.against)):
            if isinstance(classes, Tensor) and classes.ndim and len(classes) != count:
                raise ValueError(_count(name, len(classes), f"{count} images"))


def _count(name: str, received: int, images: str) -> str:
    return (
        f"expected as {name} one class, or one for each of {images}; received {received}; give them in the order "
        "of the images"
    )


def _check_classes(name: str, classes: Classes | None, n_classes: int) -> None:
    if classes is None:
        return
    numbers = torch.as_tensor(classes).flatten()
    if numbers.numel() and not (int(numbers.min()) >= 0 and int(numbers.max()) < n_classes):
        raise IndexError(
            f"expected {name} as classes in 0..{n_classes - 1}, the rows of the classifier; received "
            f"{int(numbers.min())}..{int(numbers.max())}"
        )
