"""Changes: what ablating a component adds to the logits, for a chunk of images.

A change is `(fill - coords) @ maps @ classifier.T`, and its two factors on the right belong to the model: they
are multiplied once, unless there are so many classes that two steps are cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.moments import Moments


@dataclass(frozen=True, eq=False)
class Shared:
    """What all chunks of a data set have in common.

    Attributes:
        to_class: heads' coordinates to logits, `[layer head coord class]`; None where that is no gain.
        heads, mlps, embed: the logits of what is filled in; None for zero.
    """

    classifier: Float[Tensor, "d_embed class"]
    to_class: Float[Tensor, "layer head coord class"] | None
    heads: Float[Tensor, "layer head class"] | None
    mlps: Float[Tensor, "layer class"] | None
    embed: Float[Tensor, " class"] | None

    @staticmethod
    def of(d: Decomposition, moments: Moments | None, classifier: Float[Tensor, "class d_embed"]) -> Shared:
        """What belongs to the model, the means and the classifier."""
        weights = classifier.detach().to(d.embed).T.contiguous()
        n_heads, coord, d_embed = d.maps.heads.shape[1:]
        n_classes = weights.shape[1]
        one_step = n_heads * coord * n_classes
        two_steps = n_heads * coord * d_embed + d_embed * n_classes
        fused = not d.maps.direct and one_step <= two_steps
        to_class = d.maps.heads @ weights if fused else None
        if moments is None:
            return Shared(weights, to_class, None, None, None)
        wide = weights.double()
        return Shared(
            weights,
            to_class,
            *((term @ wide).to(weights) for term in (moments.heads, moments.mlps, moments.embed)),
        )


@dataclass(frozen=True, eq=False)
class Changes:
    """Of one chunk.

    Attributes:
        d: its images.
        shared: of the data set: `Shared.of`.
    """

    d: Decomposition
    shared: Shared

    @property
    def n_layers(self) -> int:
        return self.d.n_layers

    @property
    def n_heads(self) -> int:
        return self.d.n_heads

    @property
    def before(self) -> Float[Tensor, "batch class"]:
        """The logits with nothing ablated."""
        return self._logits[0]

    def of_layers(self, kind: str) -> list[Float[Tensor, "batch class"]]:
        """What ablating each layer's "heads", or its MLP ("mlps"), adds."""
        return self._logits[1][kind]

    def of_entry(self) -> Float[Tensor, "batch class"]:
        """What ablating the stream's entry, the embedding, adds."""
        now = self.d.embed @ self.shared.classifier
        return -now if self.shared.embed is None else self.shared.embed - now

    @cached_property
    def _logits(self) -> tuple[Tensor, dict[str, list[Tensor]]]:
        d, shared = self.d, self.shared
        parts = {
            "heads": [self._heads(layer) for layer in range(d.n_layers)],
            "mlps": [d.mlps[:, layer] @ shared.classifier for layer in range(d.n_layers)],
        }
        before = (d.embed + d.bias + d.pool.sum(1)) @ shared.classifier
        for part in (*parts["heads"], *parts["mlps"]):
            before += part
        fills = {"heads": None if shared.heads is None else shared.heads.sum(1), "mlps": shared.mlps}
        for kind, fill in fills.items():
            for layer, part in enumerate(parts[kind]):
                torch.neg(part, out=part) if fill is None else torch.sub(fill[layer], part, out=part)
        return before, parts

    def _heads(self, layer: int) -> Float[Tensor, "batch class"]:
        """The logits of a layer's heads together."""
        d, shared = self.d, self.shared
        if shared.to_class is not None:
            return d.coords[:, layer].flatten(1) @ shared.to_class[layer].flatten(0, 1)
        if d.maps.direct:
            return d.coords[:, layer].sum(1) @ shared.classifier
        return (d.coords[:, layer].flatten(1) @ d.maps.heads[layer].flatten(0, 1)) @ shared.classifier

    def of_head(self, layer: int, head: int) -> Float[Tensor, "batch class"]:
        """What ablating one head adds."""
        d, shared = self.d, self.shared
        coords = d.coords[:, layer, head]
        if shared.to_class is not None:
            now = coords @ shared.to_class[layer, head]
        else:
            now = (coords if d.maps.direct else coords @ d.maps.heads[layer, head]) @ shared.classifier
        return -now if shared.heads is None else shared.heads[layer, head] - now


def predictions(logits: Float[Tensor, "batch class"]) -> Int[Tensor, " batch"]:
    """The class of largest logit, the first of equals."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(logits.numpy().argmax(1))  # many times faster than torch's own
    return logits.argmax(1)


def check_classifier(classifier: Tensor, width: int) -> None:
    """Raises ValueError unless the classifier has classes, and the features' width."""
    if classifier.ndim == 2 and classifier.shape[1] == width and not len(classifier):
        raise ValueError(
            f"expected a classifier of at least one class; received {list(classifier.shape)}; build it with "
            "model.zero_shot_classifier"
        )
    if classifier.ndim != 2 or classifier.shape[1] != width:
        raise ValueError(
            f"expected a classifier [class, {width}]; received {list(classifier.shape)}; build it with the "
            "text tower of the same model"
        )
