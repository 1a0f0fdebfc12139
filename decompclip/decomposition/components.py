"""Components: the one vocabulary for which parts of a tower are meant.

    heads[11, 4]                one head
    heads[-1] | mlps[-5:]       the heads of the last layer and the last five MLPs
    layers[3:5]                 heads and MLPs of two layers
    everything - heads[:, 0]    all but head 0 of each layer; `~heads[:, 0]` is the same
    heads[3:] & heads[:, 0]     head 0 of the later layers
    neurons[3, [5, 7]]          two neurons of an MLP
    features[[5, 7]]            two features of a sparse autoencoder

An expression names no tower. `resolve` holds it to one, and gives a `ComponentMask`: the one resolved form.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

Index = int | slice | tuple[int, ...] | None  # None: all


@runtime_checkable
class HasComponents(Protocol):
    """What components are resolved against: a `ViTConfig`, a `Decomposition` or `Moments`."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def has_pool(self) -> bool: ...


@runtime_checkable
class HasConfig(Protocol):
    """A tower."""

    cfg: Any


@dataclass(frozen=True, eq=False)
class ComponentMask:
    """The components that an expression names in a tower of known shape.

    Attributes:
        pool: whether the MLP of the attention pooling is named.
        has_pool: whether the tower has one.
        neurons: of width 0 where the width of the MLPs was not given.
        features: of a sparse autoencoder; none where their number was not given.
    """

    heads: Bool[Tensor, "layer head"]
    mlps: Bool[Tensor, " layer"]
    embed: bool
    pool: bool
    has_pool: bool
    neurons: Bool[Tensor, "layer neuron"]
    features: Bool[Tensor, " feature"]

    def join(self, other: ComponentMask, how: Callable[[Any, Any], Any]) -> ComponentMask:
        """Both masks, entry by entry."""
        names = [field.name for field in fields(self) if field.name != "has_pool"]
        joined: dict[str, Any] = {name: how(getattr(self, name), getattr(other, name)) for name in names}
        return replace(self, **joined)

    @property
    def empty(self) -> bool:
        return not (self.beside_heads or self.heads.any())

    @property
    def beside_heads(self) -> bool:
        """Whether something else than heads is named."""
        others = (self.mlps, self.neurons, self.features)
        return bool(self.embed or self.pool or any(x.any() for x in others))

    @property
    def flat(self) -> Bool[Tensor, " component"]:
        """All but neurons and features in one row: heads layer by layer, MLPs, the embedding, and the pool's MLP if any."""
        ends = [self.embed, *([self.pool] if self.has_pool else [])]
        return torch.cat([self.heads.flatten(), self.mlps, torch.tensor(ends)])

    @property
    def singles(self) -> tuple[Part, ...]:
        """Each component of `flat` as an expression of its own, in the same order."""
        ends = [kind for kind in (embed, pool) if getattr(self, kind.kind)]
        of_mlps = (mlps[layer] for layer in self.mlps.nonzero()[:, 0].tolist())
        return (*(heads[place] for place in map(tuple, self.heads.nonzero().tolist())), *of_mlps, *ends)


def resolve(
    components: object, of: HasComponents | HasConfig, *, neurons: bool | int = False, features: int = 0
) -> ComponentMask:
    """Which components of a tower an expression names.

    Args:
        components: the expression.
        of: the tower, its configuration, or a `Decomposition` or `Moments` of it.
        neurons: how many each MLP has, True for as many as those of the tower `of`; 0 where none may be named.
        features: how many a sparse autoencoder has; 0 where none may be named.

    Raises:
        IndexError: the expression names a layer, a head, a pool or a feature that there is not.
        TypeError: it is no expression.
        ValueError: it names neurons or features where they may not be named, or mixes an MLP and neurons of it.
    """
    if not isinstance(components, Components):
        raise TypeError(f"expected components such as heads[-1] | mlps; received {components!r}")
    shape: Any = getattr(of, "cfg", of)
    d_mlp = shape.d_mlp if neurons is True else int(neurons)
    given = {"d_sae": features} if features else {}  # a user's class may know of none
    return components.resolve(shape.n_layers, shape.n_heads, pool=shape.has_pool, d_mlp=d_mlp, **given)


class Components(ABC):
    """A set of components; made from `heads`, `mlps`, `layers`, `neurons`, `features`, `embed`, `pool` and
    `everything` by `[]`, `|`, `&`, `-` and `~`."""

    @abstractmethod
    def resolve(
        self, n_layers: int, n_heads: int, pool: bool = False, d_mlp: int = 0, d_sae: int = 0
    ) -> ComponentMask:
        """Which components of a tower of this shape are meant.

        Args:
            n_layers: of the tower.
            n_heads: of each layer.
            pool: whether the tower has an attention pooling with an MLP of its own.
            d_mlp: neurons of each MLP; 0 where single neurons may not be named.
            d_sae: features of a sparse autoencoder; 0 where none may be named.

        Raises:
            IndexError: the expression names a layer, a head, a pool or a feature that there is not.
            ValueError: it names neurons without `d_mlp`, features without `d_sae`, or mixes an MLP and neurons of it.
        """

    def __or__(self, other: Components) -> Components:
        return _joined(self, "|", other)

    def __and__(self, other: Components) -> Components:
        return _joined(self, "&", other)

    def __sub__(self, other: Components) -> Components:
        return _joined(self, "-", other)

    def __invert__(self) -> Components:
        return Joined(everything, "-", self)

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


# By kind: what the brackets may hold, and what to say where they hold something else.
_INDEXED = {
    "heads": ("heads[layer] or heads[layer, head]", "write all indices into one pair of brackets"),
    "neurons": ("neurons[layer] or neurons[layer, neuron]", "write all indices into one pair of brackets"),
    "features": ("features[feature]", "several features are a slice or a list: features[[5, 7]]"),
    "mlps": (
        "mlps[layer], for a layer has one MLP",
        "several layers are a slice or a list: mlps[[0, 3]]",
    ),
    "layers": ("layers[layer]", "several layers are a slice or a list: layers[[0, 3]]"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Part(Components):
    """Components of one kind: all of them, those of some layers, or some of those; a single one among others.

    Each index is a number, a slice or a list of numbers.

    Attributes:
        kind: "heads", "mlps", "layers", "neurons", "features", "embed", "pool" or "everything".
        layers: which layers.
        index: which heads or neurons of these layers, or which features.
    """

    kind: str
    layers: Index = None
    index: Index = None

    def __getitem__(self, index: object) -> Part:
        if self.kind not in _INDEXED:
            raise TypeError(f"{self.kind} is one component, or all, without an index; leave the brackets out")
        parts = index if isinstance(index, tuple) else (index,)
        most = 2 if self.kind in ("heads", "neurons") else 1
        if self.layers is not None or self.index is not None or not 1 <= len(parts) <= most:
            shown = ", ".join(_show(x) if isinstance(x, slice) else repr(x) for x in parts)
            expected, remedy = _INDEXED[self.kind]
            raise IndexError(f"expected {expected}; received {self!r}[{shown}]; {remedy}")
        return Part(self.kind, *[None] * (self.kind == "features"), *map(_checked, parts))

    @property
    def layer(self) -> int | None:
        """The layer, where it is one."""
        return self.layers if isinstance(self.layers, int) else None

    @property
    def head(self) -> int | None:
        """The head of the layer, where it is one."""
        return self.index if self.kind == "heads" and isinstance(self.index, int) else None

    @property
    def neuron(self) -> int | None:
        """The neuron of the layer, where it is one."""
        return self.index if self.kind == "neurons" and isinstance(self.index, int) else None

    @property
    def feature(self) -> int | None:
        """The feature, where it is one."""
        return self.index if self.kind == "features" and isinstance(self.index, int) else None

    @property
    def field(self) -> str:
        """The field of `Decomposition` and `Moments` that holds the component."""
        return "coords" if self.kind == "heads" else self.kind

    @property
    def place(self) -> tuple[int, ...]:
        """Where on that field a single component stands, past the batch's axis."""
        ends = {"embed": (), "pool": (0,)}
        return ends.get(self.kind) or tuple(i for i in (self.layer, self.head) if i is not None)

    def resolve(
        self, n_layers: int, n_heads: int, pool: bool = False, d_mlp: int = 0, d_sae: int = 0
    ) -> ComponentMask:
        if self.kind == "pool" and not pool:
            raise IndexError(
                "expected a tower whose attention pooling has an MLP of its own, as SigLIP's and PE's; received "
                "one without; leave pool out"
            )
        if self.kind == "neurons" and not d_mlp:
            raise ValueError(
                f"expected heads, MLPs, embed or pool; received {self!r}, which names neurons; edit those with "
                "AblateNeurons, and compose the two with | (their means: AblateNeurons(..., fill=mean_neurons(...)))"
            )
        if self.kind == "features" and not d_sae:
            raise ValueError(
                f"expected components of the tower; received {self!r}, which names features of a sparse autoencoder; edit "
                "those with AblateFeatures(sae, ...), and compose the two with |"
            )
        whole = self.kind == "everything"
        of_heads, of_neurons = (torch.zeros(n_layers, n, dtype=torch.bool) for n in (n_heads, d_mlp))
        of_mlps = of_heads.new_zeros(n_layers)
        layers = torch.tensor(_positions(self.layers, n_layers, "layer", self), dtype=torch.long)
        if self.kind in ("heads", "layers", "everything"):
            of_heads[layers[:, None], _positions(self.index, n_heads, "head", self)] = True
        if self.kind in ("mlps", "layers", "everything"):
            of_mlps[layers] = True
        if self.kind == "neurons":
            of_neurons[layers[:, None], _positions(self.index, d_mlp, "neuron", self)] = True
        of_features = torch.zeros(d_sae, dtype=torch.bool)
        if self.kind == "features":
            of_features[_positions(self.index, d_sae, "feature", self)] = True
        ends = self.kind == "embed" or whole, self.kind == "pool" or (whole and pool)
        return ComponentMask(of_heads, of_mlps, *ends, pool, of_neurons, of_features)

    def __repr__(self) -> str:
        if self.layers is None and self.index is None:
            return self.kind
        if self.kind == "features":
            return f"features[{_show(self.index)}]"
        second = "" if self.index is None else f", {_show(self.index)}"
        return f"{self.kind}[{_show(self.layers)}{second}]"


# Python binds `-` tighter than `&`, that tighter than `|`, and all to the left.
_SIGNS = ("|", "&", "-")
_JOINS = {"|": operator.or_, "&": operator.and_, "-": operator.gt}


@dataclass(frozen=True, eq=False, repr=False)
class Joined(Components):
    """Two expressions with an operator between."""

    left: Components
    sign: str
    right: Components

    def resolve(
        self, n_layers: int, n_heads: int, pool: bool = False, d_mlp: int = 0, d_sae: int = 0
    ) -> ComponentMask:
        a, b = (side.resolve(n_layers, n_heads, pool, d_mlp, d_sae) for side in (self.left, self.right))
        both = (a.mlps & b.neurons.any(1)) | (b.mlps & a.neurons.any(1))
        if self.sign != "|" and both.any():
            layer = int(both.nonzero()[0])
            raise ValueError(
                f"expected neurons taken from neurons; received {self!r}, where one side names the MLP of layer "
                f"{layer} and the other neurons of it; name its neurons instead: neurons[{layer}]"
            )
        return a.join(b, _JOINS[self.sign])

    def __repr__(self) -> str:
        own = _SIGNS.index(self.sign)
        return f"{_bracketed(self.left, own)} {self.sign} {_bracketed(self.right, own + 1)}"


def _joined(left: Components, sign: str, right: object) -> Components:
    if not isinstance(right, Components):
        raise TypeError(
            f"expected components on both sides of {sign!r}; received {left!r} {sign} {right!r}; write heads[...], "
            "mlps[...] or layers[...] on the right"
        )
    return Joined(left, sign, right)


def _bracketed(part: Components, least: int) -> str:
    """A part of an expression, in brackets where its own operator binds looser than `least`."""
    loose = isinstance(part, Joined) and _SIGNS.index(part.sign) < least
    return f"({part!r})" if loose else repr(part)


heads = Part("heads")
mlps = Part("mlps")
layers = Part("layers")
neurons = Part("neurons")
features = Part("features")
"""Of a sparse autoencoder; `everything` leaves them out, for they are no parts of the tower."""
embed = Part("embed")
"""The stream at the input of block 0."""
pool = Part("pool")
"""The MLP of the attention pooling, in towers whose pooling has one (SigLIP, PE)."""
everything = Part("everything")
"""All heads, all MLPs, the embedding, and the pool where there is one; not the constant biases, which no image changes."""


def _checked(index: object) -> Index:
    """An index in the form that expressions keep."""
    if isinstance(index, slice):
        return None if index == slice(None) else index
    if isinstance(index, Integral) and not isinstance(index, bool):  # numpy's too, as tables hold them
        return int(index)
    if isinstance(index, list | range) and all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in index
    ):
        return tuple(map(int, index))
    raise TypeError(f"expected a number, a slice or a list of numbers as index; received {index!r}")


def _positions(index: Index, size: int, axis: str, whole: object) -> list[int]:
    """The numbers in 0..size-1 that an index of the expression `whole` names."""
    per = "" if axis in ("layer", "feature") else " a layer"
    known = f"in 0..{size - 1} (or -{size}..-1 from the end)"
    if index is None:
        return list(range(size))
    if isinstance(index, slice):
        chosen = list(range(size))[index]
        bounds = [bound for bound in (index.start, index.stop) if bound is not None]
        if not chosen and any(abs(bound) > size or bound == size == index.start for bound in bounds):
            raise IndexError(
                f"expected {axis}s {known}; received {whole!r}, which names none of the {_owner(axis)}'s {size} {axis}s{per}"
            )
        return chosen
    numbers = (index,) if isinstance(index, int) else index
    for number in numbers:
        if not -size <= number < size:
            raise IndexError(
                f"expected a {axis} {known}; received {axis} {number} in {whole!r}; the {_owner(axis)} has {size} {axis}s{per}"
            )
    return [number % size for number in numbers]


def _owner(axis: str) -> str:
    return "sparse autoencoder" if axis == "feature" else "tower"


def _show(index: Index) -> str:
    """An index as it is written."""
    if index is None:
        return ":"
    if isinstance(index, slice):
        ends = ["" if part is None else str(part) for part in (index.start, index.stop)]
        return ":".join(ends if index.step is None else [*ends, str(index.step)])
    return str(index) if isinstance(index, int) else str(list(index))
