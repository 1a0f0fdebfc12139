"""Masks: which components of a tower of known shape an expression names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Neurons of MLPs, settled once the width of the MLPs is known: `mask.of(d_mlp)`.

    Attributes:
        layers: of which layers some are named.
        of: the width of the MLPs to a mask `[layer neuron]`.
    """

    layers: Bool[Tensor, " layer"]
    of: Callable[[int], Bool[Tensor, "layer neuron"]]


@dataclass(frozen=True, eq=False)
class ComponentMask:
    """The components that an expression names in a tower of known shape.

    Attributes:
        pool: the MLP of the attention pooling.
        has_pool: whether the tower has such a one.
        neurons: None where no neuron is named.
    """

    heads: Bool[Tensor, "layer head"]
    mlps: Bool[Tensor, " layer"]
    embed: bool
    pool: bool = False
    has_pool: bool = False
    neurons: NeuronMask | None = None

    def __or__(self, other: ComponentMask) -> ComponentMask:
        return self._with(other, lambda a, b: a | b)

    def __and__(self, other: ComponentMask) -> ComponentMask:
        return self._with(other, lambda a, b: a & b)

    def __sub__(self, other: ComponentMask) -> ComponentMask:
        return self._with(other, lambda a, b: a & ~b)

    def _with(self, other: ComponentMask, join: Callable[[Tensor, Tensor], Tensor]) -> ComponentMask:
        def single(a: bool, b: bool) -> bool:
            return bool(join(torch.tensor(a), torch.tensor(b)))

        return ComponentMask(
            join(self.heads, other.heads),
            join(self.mlps, other.mlps),
            single(self.embed, other.embed),
            single(self.pool, other.pool),
            self.has_pool,
            _join_neurons(self.neurons, other.neurons, len(self.mlps), join),
        )

    @property
    def empty(self) -> bool:
        some = self.embed or self.pool or bool(self.heads.any()) or bool(self.mlps.any())
        return not (some or self.neurons is not None)

    @property
    def flat(self) -> Bool[Tensor, " component"]:
        """All but neurons in one row: heads layer by layer, MLPs, the embedding, and the pool's MLP if any."""
        ends = [self.embed, *([self.pool] if self.has_pool else [])]
        return torch.cat([self.heads.flatten(), self.mlps, torch.tensor(ends)])


def nothing(n_layers: int, n_heads: int, has_pool: bool) -> ComponentMask:
    """No component of such a tower."""
    none = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    return ComponentMask(none, none.new_zeros(n_layers), False, has_pool=has_pool)


def _join_neurons(
    a: NeuronMask | None, b: NeuronMask | None, n_layers: int, join: Callable[[Tensor, Tensor], Tensor]
) -> NeuronMask | None:
    none = torch.zeros(n_layers, dtype=torch.bool)
    # Whether neurons are left in a layer is known only with the width; a layer of `a` may keep some.
    first, second = (none if side is None else side.layers for side in (a, b))
    layers = join(first, second) | (first & join(torch.tensor(True), torch.tensor(False)))

    def of(d_mlp: int) -> Tensor:
        empty = torch.zeros(n_layers, d_mlp, dtype=torch.bool)
        return join(*(empty if side is None else side.of(d_mlp) for side in (a, b)))

    return NeuronMask(layers, of) if layers.any() else None
