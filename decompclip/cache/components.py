"""Components: the one vocabulary for which parts of a tower are meant.

    heads[11, 4]                one head
    heads[-1] | mlps[-5:]       the heads of the last layer and the last five MLPs
    everything - heads[:, 0]    all but head 0 of each layer

An expression is a recipe: it names no tower, and is held to one by `resolve`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

Index = int | slice | tuple[int, ...] | None  # None: all


@dataclass(frozen=True, eq=False)
class ComponentMask:
    """The components that an expression names in a tower of known shape."""

    heads: Bool[Tensor, "layer head"]
    mlps: Bool[Tensor, " layer"]
    embed: bool

    @property
    def empty(self) -> bool:
        return not (self.embed or bool(self.heads.any()) or bool(self.mlps.any()))


class Components(ABC):
    """A set of components; made from `heads`, `mlps`, `embed` and `everything` by `[]`, `|` and `-`."""

    @abstractmethod
    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        """Which heads `[layer head]`, MLPs `[layer]` and whether the embedding are meant.

        Raises:
            IndexError: the expression names a layer or a head that such a tower does not have.
        """

    def __or__(self, other: Components) -> Components:
        return Union(self, other) if isinstance(other, Components) else NotImplemented

    def __sub__(self, other: Components) -> Components:
        return Difference(self, other) if isinstance(other, Components) else NotImplemented

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
        layers, *rest = index if isinstance(index, tuple) else (index,)
        if self.layers is not None or self.heads is not None or len(rest) > 1:
            raise IndexError(
                f"expected heads[layer] or heads[layer, head]; received {self!r}[{_show_all(index)}]; write all "
                "indices into one pair of brackets"
            )
        return Heads(_checked(layers), _checked(rest[0]) if rest else None)

    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        mask = _nothing(n_layers, n_heads)
        layers = _positions(self.layers, n_layers, "layer", self)
        chosen = _positions(self.heads, n_heads, "head", self)
        mask.heads[torch.tensor(layers, dtype=torch.long)[:, None], chosen] = True
        return mask

    def __repr__(self) -> str:
        if self.heads is None:
            return "heads" if self.layers is None else f"heads[{_show(self.layers)}]"
        return f"heads[{_show(self.layers)}, {_show(self.heads)}]"


@dataclass(frozen=True, eq=False, repr=False)
class Mlps(Components):
    """MLPs: `mlps[layer]`, a number, a slice or a list of numbers."""

    layers: Index = None

    def __getitem__(self, index: object) -> Mlps:
        if self.layers is not None or isinstance(index, tuple):
            raise IndexError(
                f"expected mlps[layer], for a layer has one MLP; received {self!r}[{_show_all(index)}]; "
                "several layers are a slice or a list: mlps[[0, 3]]"
            )
        return Mlps(_checked(index))

    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        mask = _nothing(n_layers, n_heads)
        mask.mlps[_positions(self.layers, n_layers, "layer", self)] = True
        return mask

    def __repr__(self) -> str:
        return "mlps" if self.layers is None else f"mlps[{_show(self.layers)}]"


@dataclass(frozen=True, eq=False, repr=False)
class Embed(Components):
    """The stream at the input of block 0."""

    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        none = _nothing(n_layers, n_heads)
        return ComponentMask(none.heads, none.mlps, True)

    def __repr__(self) -> str:
        return "embed"


@dataclass(frozen=True, eq=False, repr=False)
class Everything(Components):
    """All heads, all MLPs and the embedding; not the constant biases, which no image changes."""

    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        none = _nothing(n_layers, n_heads)
        return ComponentMask(~none.heads, ~none.mlps, True)

    def __repr__(self) -> str:
        return "everything"


@dataclass(frozen=True, eq=False, repr=False)
class Union(Components):
    left: Components
    right: Components

    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        a, b = self.left.resolve(n_layers, n_heads), self.right.resolve(n_layers, n_heads)
        return ComponentMask(a.heads | b.heads, a.mlps | b.mlps, a.embed or b.embed)

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, Union) else repr(self.right)
        return f"{self.left!r} | {right}"


@dataclass(frozen=True, eq=False, repr=False)
class Difference(Components):
    left: Components
    right: Components

    def resolve(self, n_layers: int, n_heads: int) -> ComponentMask:
        a, b = self.left.resolve(n_layers, n_heads), self.right.resolve(n_layers, n_heads)
        return ComponentMask(a.heads & ~b.heads, a.mlps & ~b.mlps, a.embed and not b.embed)

    def __repr__(self) -> str:
        # Python binds `-` tighter than `|`, and both to the left.
        left = f"({self.left!r})" if isinstance(self.left, Union) else repr(self.left)
        right = f"({self.right!r})" if isinstance(self.right, Union | Difference) else repr(self.right)
        return f"{left} - {right}"


heads = Heads()
mlps = Mlps()
embed = Embed()
everything = Everything()


def _nothing(n_layers: int, n_heads: int) -> ComponentMask:
    return ComponentMask(
        torch.zeros(n_layers, n_heads, dtype=torch.bool), torch.zeros(n_layers, dtype=torch.bool), False
    )


def _checked(index: object) -> Index:
    if isinstance(index, slice):
        return None if index == slice(None) else index
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(index, list | range) and all(isinstance(i, int) for i in index):
        return tuple(index)
    raise TypeError(f"expected a number, a slice or a list of numbers as index; received {index!r}")


def _positions(index: Index, size: int, axis: str, whole: Components) -> list[int]:
    if index is None:
        return list(range(size))
    if isinstance(index, slice):
        chosen = list(range(size))[index]
        bounds = [bound for bound in (index.start, index.stop) if bound is not None]
        if not chosen and any(abs(bound) > size or bound == size == index.start for bound in bounds):
            raise IndexError(
                f"expected {axis}s in 0..{size - 1} (or -{size}..-1 from the end); received {whole!r}, which names "
                f"none of the tower's {size} {axis}s{' a layer' if axis == 'head' else ''}"
            )
        return chosen
    numbers = (index,) if isinstance(index, int) else index
    for number in numbers:
        if not -size <= number < size:
            raise IndexError(
                f"expected a {axis} in 0..{size - 1} (or -{size}..-1 from the end); received {axis} {number} in "
                f"{whole!r}; the tower has {size} {axis}s{' a layer' if axis == 'head' else ''}"
            )
    return [number % size for number in numbers]


def _show(index: Index) -> str:
    if index is None:
        return ":"
    if isinstance(index, slice):
        ends = ["" if part is None else str(part) for part in (index.start, index.stop)]
        return ":".join(ends if index.step is None else [*ends, str(index.step)])
    return str(index) if isinstance(index, int) else str(list(index))


def _show_all(index: object) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_show(part) if isinstance(part, slice) else repr(part) for part in parts)
