"""Replacement: what all edits share that put something in a component's place."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from decompclip.cache.components import Components
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import term_maps
from decompclip.cache.masks import ComponentMask
from decompclip.cache.moments import Moments, StreamMeans
from decompclip.models.vit import Hook, HookedViT
from decompclip.operators.fills import Fill, Rows, check_rows, edit_stream, edit_terms, resolve
from decompclip.operators.intervention import Intervention, Where
from decompclip.operators.splits import Measured, apart


class Replacement(Intervention):
    """Components replaced by something: what all ablations share."""

    components: Components
    rows: Rows

    def __post_init__(self) -> None:
        check_rows(self.rows)

    @abstractmethod
    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        """What stands in for the terms."""

    @abstractmethod
    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        """What stands in for the stream's writes."""

    def __call__(self, d: Measured, *, where: Where | None = None) -> Decomposition:
        d = apart(getattr(self, "moments", None), d)
        mask = resolve(self.components, d)
        return edit_terms(d, mask, self.term_fill(d, mask), where)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        mask = resolve(self.components, visual)
        if mask.empty:
            return []
        return edit_stream(visual, mask, self.stream_fill(visual, mask), rows=self.rows, where=where)


def stream_means(visual: HookedViT, moments: Moments, purpose: str) -> StreamMeans:
    """The means that causal edits fill in.

    Raises:
        ValueError: moments of another model, or without stream means.
    """
    moments.check_model(term_maps(visual, moments.maps.convention))
    if moments.streams is None:
        raise ValueError(
            f"expected moments with stream means, which {purpose} fills in; received moments of "
            "terms alone; fit them with Moments.fit(model, batches, stream=True)"
        )
    return moments.streams


def need_images(images: Tensor | None, name: str) -> Tensor:
    """Raises ValueError where a causal edit lacks the images of its source."""
    if images is None:
        raise ValueError(
            "expected the source's images, for a causal edit writes what they leave in the stream; received none; "
            f"pass {name}(..., images=images)"
        )
    return images
