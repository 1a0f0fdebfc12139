"""Intervention: one edit, in two modes.

edit(d)                                   direct: the terms alone are edited, as in the paper
with visual.hooks(edit.fwd_hooks(visual)) causal: the stream is edited, and later layers see it
first | second                            both, left first
edit.on(where)                            for each image its own components
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from decompclip.decomposition.components import ComponentMask
from decompclip.decomposition.decomposition import Decomposition
from decompclip.tower.vit import Hook, HookedViT

Where = Bool[Tensor, "batch *component"]
"""Which components of which images: `[batch layer head]`, that restricts heads alone, or `[batch component]`,
that restricts all, in the order of `ComponentMask.flat` (heads layer by layer, MLPs, embedding, pool). Single neurons
have no place of their own in it: a neuron is edited in the images in which its MLP is."""


class Intervention(ABC):
    """An edit of components, applied to terms (direct) or inside a forward pass (causal).

    `where` restricts it to some components of some images: see `Where`.
    """

    @abstractmethod
    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """The decomposition with edited terms; the same object where nothing is edited.

        Raises:
            IndexError: the edit names a component that `d` does not have.
            ValueError: `where`, or what the edit was made from, does not fit `d`.
        """

    @abstractmethod
    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """The edit as hooks for `visual.hooks(...)` or `visual.run_with_hooks(images, fwd_hooks=...)`.

        Args:
            visual: the tower that is to run with the edit.
            where: restricts it to some components of some images.

        Raises:
            IndexError: the edit names a component that the tower does not have.
            ValueError: what the edit was made from does not fit the tower.
        """

    def on(self, where: Where) -> Restricted:
        """This edit on these components of these images alone, as an intervention of its own.

        Args:
            where: which: True where the edit acts.

        Raises:
            TypeError: no boolean mask `[batch, layer, head]` or `[batch, component]` (heads layer by layer, MLPs,
                embedding, and the pool's MLP where there is one).
        """
        if not isinstance(where, Tensor) or where.dtype != torch.bool or where.ndim not in (2, 3):
            shape = (
                f"{where.dtype} {list(where.shape)}" if isinstance(where, Tensor) else type(where).__name__
            )
            raise TypeError(
                f"expected a boolean mask [batch, layer, head] or [batch, component]; received {shape}; for whole "
                "images repeat it over the components: mask[:, None].expand(-1, n_components)"
            )
        return Restricted(self, where)

    def __or__(self, other: Intervention) -> Composition:
        return (
            Composition((*steps_of(self), *steps_of(other)))
            if isinstance(other, Intervention)
            else NotImplemented
        )


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Intervention):
    """Interventions one after the other; of none, the identity."""

    steps: tuple[Intervention, ...] = ()

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        for step in self.steps:
            d = step(d, where=where)
        return d

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        return [hook for step in self.steps for hook in step.fwd_hooks(visual, where=where)]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.steps)) or "Composition()"


@dataclass(frozen=True, eq=False, repr=False)
class Restricted(Intervention):
    """An intervention on some components of each image; `where` of a call restricts it further."""

    edit: Intervention
    where: Where

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        return self.edit(d, where=both(self.where, where))

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        return self.edit.fwd_hooks(visual, where=both(self.where, where))

    def __repr__(self) -> str:
        return f"({self.edit!r}).on(mask {list(self.where.shape)})"


def both(ours: Where, where: Tensor | None) -> Where:
    """Where the two restrictions agree.

    Raises:
        ValueError: they are of different shapes.
    """
    if where is None:
        return ours
    if where.shape != ours.shape:
        raise ValueError(
            f"expected where of the shape {list(ours.shape)} that this intervention is restricted by already; "
            f"received {list(where.shape)}; give both for the same images and in the same form"
        )
    return ours & where.to(ours.device)


def steps_of(intervention: Intervention) -> tuple[Intervention, ...]:
    """The steps of a composition; an intervention alone is one."""
    return intervention.steps if isinstance(intervention, Composition) else (intervention,)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The components to edit, image by image where `where` restricts them (else a batch axis of length 1)."""

    heads: Bool[Tensor, "#batch layer head"]
    mlps: Bool[Tensor, "#batch layer"]
    embed: Bool[Tensor, " #batch"]
    pool: Bool[Tensor, " #batch"]

    @staticmethod
    def of(mask: ComponentMask, where: Where | None, batch: int) -> Chosen:
        """Both put together.

        Raises:
            ValueError: `where` is no mask of one of the two shapes, or not of this batch.
        """
        one = Chosen(mask.heads[None], mask.mlps[None], torch.tensor([mask.embed]), torch.tensor([mask.pool]))
        if where is None:
            return one
        n_layers, n_heads = mask.heads.shape
        check_where(where, (batch, n_layers, n_heads), len(mask.flat))
        where = where.cpu()
        if where.ndim == 3:
            return Chosen(one.heads & where, one.mlps, one.embed, one.pool)
        sizes = (n_layers * n_heads, n_layers, *([1] * (len(mask.flat) - n_layers * (n_heads + 1))))
        of_heads, of_mlps, of_embed, *of_pool = where.split(sizes, dim=1)
        return Chosen(
            one.heads & of_heads.unflatten(1, (n_layers, n_heads)),
            one.mlps & of_mlps,
            one.embed & of_embed[:, 0],
            one.pool & of_pool[0][:, 0] if of_pool else one.pool,
        )


def check_where(where: Tensor | None, expected: tuple[int, int, int], components: int) -> None:
    """Raises ValueError unless `where` is a mask of an expected shape (or there is none)."""
    if where is None:
        return
    flat = (expected[0], components)
    if tuple(where.shape) not in (expected, flat) or where.dtype != torch.bool:
        raise ValueError(
            f"expected where as a boolean mask [batch, layer, head] = {list(expected)} or [batch, component] = {list(flat)}; "
            f"received {where.dtype} {list(where.shape)}; give one row for each image of this very batch"
        )
