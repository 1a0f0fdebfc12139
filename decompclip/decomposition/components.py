"""Indices of component expressions: what may stand in the brackets, how it reads, and what it names.

Masks: which components of a tower of known shape an expression names.

Components: the one vocabulary for which parts of a tower are meant.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import UnionType
from typing import NoReturn

import torch
from jaxtyping import Bool
from torch import Tensor

Index = int | slice | tuple[int, ...] | None  # None: all


def checked(index: object) -> Index:
    """An index in the form that expressions keep.

    Raises:
        TypeError: it is no number, slice or list of numbers.
    """
    if isinstance(index, slice):
        return None if index == slice(None) else index
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(index, list | range) and all(isinstance(i, int) for i in index):
        return tuple(index)
    raise TypeError(f"expected a number, a slice or a list of numbers as index; received {index!r}")


def positions(index: Index, size: int, axis: str, whole: object) -> list[int]:
    """The numbers in 0..size-1 that an index of the expression `whole` names.

    Raises:
        IndexError: it lies outside.
    """
    per = "" if axis == "layer" else " a layer"
    if index is None:
        return list(range(size))
    if isinstance(index, slice):
        chosen = list(range(size))[index]
        bounds = [bound for bound in (index.start, index.stop) if bound is not None]
        if not chosen and any(abs(bound) > size or bound == size == index.start for bound in bounds):
            raise IndexError(
                f"expected {axis}s in 0..{size - 1} (or -{size}..-1 from the end); received {whole!r}, which names "
                f"none of the tower's {size} {axis}s{per}"
            )
        return chosen
    numbers = (index,) if isinstance(index, int) else index
    for number in numbers:
        if not -size <= number < size:
            raise IndexError(
                f"expected a {axis} in 0..{size - 1} (or -{size}..-1 from the end); received {axis} {number} in "
                f"{whole!r}; the tower has {size} {axis}s{per}"
            )
    return [number % size for number in numbers]


def show(index: Index) -> str:
    """An index as it is written."""
    if index is None:
        return ":"
    if isinstance(index, slice):
        ends = ["" if part is None else str(part) for part in (index.start, index.stop)]
        return ":".join(ends if index.step is None else [*ends, str(index.step)])
    return str(index) if isinstance(index, int) else str(list(index))


def show_all(index: object) -> str:
    """What stood in the brackets, as it is written."""
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(show(part) if isinstance(part, slice) else repr(part) for part in parts)


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
