"""Components: the one vocabulary for which parts of a tower are meant.

    heads[11, 4]                one head
    heads[-1] | mlps[-5:]       the heads of the last layer and the last five MLPs
    layers[3:5]                 heads and MLPs of two layers
    everything - heads[:, 0]    all but head 0 of each layer; `~heads[:, 0]` is the same
    heads[3:] & heads[:, 0]     head 0 of the later layers
    neurons[3, [5, 7]]          two neurons of an MLP

An expression is a recipe: it names no tower, and is held to one by `resolve`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from types import UnionType
from typing import NoReturn

import torch
from jaxtyping import Bool
from torch import Tensor

from decompclip.cache.indices import Index, checked, positions, show, show_all
from decompclip.cache.masks import ComponentMask, NeuronMask, nothing


class Components(ABC):
    """A set of components; made from `heads`, `mlps`, `layers`, `neurons`, `embed`, `pool` and `everything`
    by `[]`, `|`, `&`, `-` and `~`."""

    @abstractmethod
    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        """Which heads `[layer head]`, MLPs `[layer]`, neurons, and whether the embedding and the pool are meant.

        Args:
            pool: whether the tower has an attention pooling with an MLP of its own.

        Raises:
            IndexError: the expression names a layer, a head or a pool that such a tower does not have.
            ValueError: it mixes an MLP and neurons of it where that has no meaning.
        """

    def __or__(self, other: Components) -> Components:
        return Union(self, _operand(self, "|", other))

    def __and__(self, other: Components) -> Components:
        return Intersection(self, _operand(self, "&", other))

    def __sub__(self, other: Components) -> Components:
        return Difference(self, _operand(self, "-", other))

    def __invert__(self) -> Components:
        return Difference(everything, self)

    __iter__ = None  # indices alone would make an endless one

    def __contains__(self, item: object) -> NoReturn:
        raise TypeError(
            f"{self!r} names no tower, so that {item!r} is neither in it nor out of it; hold it to one: "
            "`.resolve(n_layers, n_heads).heads[layer, head]`"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Components) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True, eq=False, repr=False)
class Heads(Components):
    """Attention heads: `heads[layer]`, `heads[layer, head]`; each a number, a slice or a list of numbers."""

    layers: Index = None
    heads: Index = None

    def __getitem__(self, index: object) -> Heads:
        return Heads(*_pair(index, self, "head", bare=self.layers is None and self.heads is None))

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        mask = nothing(n_layers, n_heads, pool)
        chosen = positions(self.layers, n_layers, "layer", self)
        mask.heads[torch.tensor(chosen, dtype=torch.long)[:, None], self._heads(n_heads)] = True
        return mask

    def _heads(self, n_heads: int) -> list[int]:
        return positions(self.heads, n_heads, "head", self)

    def __repr__(self) -> str:
        return _show_pair("heads", self.layers, self.heads)


@dataclass(frozen=True, eq=False, repr=False)
class Neurons(Components):
    """Neurons of MLPs: `neurons[layer]`, `neurons[layer, neuron]`; each a number, a slice or a list of numbers."""

    layers: Index = None
    index: Index = None

    def __getitem__(self, index: object) -> Neurons:
        return Neurons(*_pair(index, self, "neuron", bare=self.layers is None and self.index is None))

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        chosen = torch.zeros(n_layers, dtype=torch.bool)
        chosen[positions(self.layers, n_layers, "layer", self)] = True

        def of(d_mlp: int) -> Bool[Tensor, "layer neuron"]:
            row = torch.zeros(d_mlp, dtype=torch.bool)
            row[positions(self.index, d_mlp, "neuron", self)] = True
            return chosen[:, None] & row

        return replace(
            nothing(n_layers, n_heads, pool), neurons=NeuronMask(chosen, of) if chosen.any() else None
        )

    def __repr__(self) -> str:
        return _show_pair("neurons", self.layers, self.index)


@dataclass(frozen=True, eq=False, repr=False)
class Mlps(Components):
    """MLPs: `mlps[layer]`, a number, a slice or a list of numbers."""

    layers: Index = None

    def __getitem__(self, index: object) -> Mlps:
        if self.layers is not None or isinstance(index, tuple):
            raise IndexError(
                f"expected mlps[layer], for a layer has one MLP; received {self!r}[{show_all(index)}]; "
                "several layers are a slice or a list: mlps[[0, 3]]"
            )
        return Mlps(checked(index))

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        mask = nothing(n_layers, n_heads, pool)
        mask.mlps[positions(self.layers, n_layers, "layer", self)] = True
        return mask

    def __repr__(self) -> str:
        return "mlps" if self.layers is None else f"mlps[{show(self.layers)}]"


@dataclass(frozen=True, eq=False, repr=False)
class Layers(Components):
    """Whole layers, their heads and their MLP: `layers[layer]`, a number, a slice or a list of numbers."""

    layers: Index = None

    def __getitem__(self, index: object) -> Layers:
        if self.layers is not None or isinstance(index, tuple):
            raise IndexError(
                f"expected layers[layer]; received {self!r}[{show_all(index)}]; several layers are a slice or a "
                "list: layers[[0, 3]]"
            )
        return Layers(checked(index))

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        mask = nothing(n_layers, n_heads, pool)
        chosen = positions(self.layers, n_layers, "layer", self)
        mask.heads[chosen], mask.mlps[chosen] = True, True
        return mask

    def __repr__(self) -> str:
        return "layers" if self.layers is None else f"layers[{show(self.layers)}]"


@dataclass(frozen=True, eq=False, repr=False)
class Embed(Components):
    """The stream at the input of block 0."""

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        return replace(nothing(n_layers, n_heads, pool), embed=True)

    def __repr__(self) -> str:
        return "embed"


@dataclass(frozen=True, eq=False, repr=False)
class Pool(Components):
    """The MLP of the attention pooling, in towers whose pooling has one (SigLIP, PE)."""

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        if not pool:
            raise IndexError(
                "expected a tower whose attention pooling has an MLP of its own, as SigLIP's and PE's; received "
                "one without; leave pool out"
            )
        return replace(nothing(n_layers, n_heads, pool), pool=True)

    def __repr__(self) -> str:
        return "pool"


@dataclass(frozen=True, eq=False, repr=False)
class Everything(Components):
    """All heads, all MLPs, the embedding, and the pool where there is one; not the constant biases, which no
    image changes."""

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        none = nothing(n_layers, n_heads, pool)
        return ComponentMask(~none.heads, ~none.mlps, True, pool, pool)

    def __repr__(self) -> str:
        return "everything"


@dataclass(frozen=True, eq=False, repr=False)
class Union(Components):
    left: Components
    right: Components

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        a, b = (side.resolve(n_layers, n_heads, pool) for side in (self.left, self.right))
        return a | b

    def __repr__(self) -> str:
        return f"{self.left!r} | {_within(self.right, Union)}"


@dataclass(frozen=True, eq=False, repr=False)
class Intersection(Components):
    left: Components
    right: Components

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        a, b = (side.resolve(n_layers, n_heads, pool) for side in (self.left, self.right))
        _refuse_parts(a, b, self)
        return a & b

    def __repr__(self) -> str:
        return f"{_within(self.left, Union)} & {_within(self.right, Union | Intersection)}"


@dataclass(frozen=True, eq=False, repr=False)
class Difference(Components):
    left: Components
    right: Components

    def resolve(self, n_layers: int, n_heads: int, pool: bool = False) -> ComponentMask:
        a, b = (side.resolve(n_layers, n_heads, pool) for side in (self.left, self.right))
        _refuse_parts(a, b, self)
        return a - b

    def __repr__(self) -> str:
        # Python binds `-` tighter than `&`, that tighter than `|`, and all to the left.
        left = _within(self.left, Union | Intersection)
        return f"{left} - {_within(self.right, Union | Intersection | Difference)}"


def _operand(left: Components, sign: str, right: object) -> Components:
    if not isinstance(right, Components):
        raise TypeError(
            f"expected components on both sides of {sign!r}; received {left!r} {sign} {right!r}; write heads[...], "
            "mlps[...] or layers[...] on the right"
        )
    return right


heads = Heads()
mlps = Mlps()
layers = Layers()
neurons = Neurons()
embed = Embed()
pool = Pool()
everything = Everything()


def _pair(index: object, whole: Components, axis: str, *, bare: bool) -> tuple[Index, Index]:
    """The indices in `heads[layer, head]` or `neurons[layer, neuron]`."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    if not bare or len(rest) > 1:
        name = f"{axis}s"
        raise IndexError(
            f"expected {name}[layer] or {name}[layer, {axis}]; received {whole!r}[{show_all(index)}]; write all "
            "indices into one pair of brackets"
        )
    return checked(first), checked(rest[0]) if rest else None


def _show_pair(name: str, first: Index, second: Index) -> str:
    if second is None:
        return name if first is None else f"{name}[{show(first)}]"
    return f"{name}[{show(first)}, {show(second)}]"


def _within(part: Components, looser: type | UnionType) -> str:
    """A part of an expression, in brackets where its own operator binds no tighter."""
    return f"({part!r})" if isinstance(part, looser) else repr(part)


def _refuse_parts(a: ComponentMask, b: ComponentMask, whole: Components) -> None:
    """Raises ValueError where one side names an MLP and the other some neurons of it."""
    for x, y in ((a, b), (b, a)):
        if y.neurons is not None and bool((x.mlps & y.neurons.layers).any()):
            layer = int((x.mlps & y.neurons.layers).nonzero()[0])
            raise ValueError(
                f"expected neurons taken from neurons; received {whole!r}, where one side names the MLP of layer "
                f"{layer} and the other neurons of it; name its neurons instead: neurons[{layer}]"
            )
