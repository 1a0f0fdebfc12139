"""Parts: the components that a result has one number for, in one order, and their points for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.decomposition.components import (
    Components,
    HasComponents,
    HasConfig,
    Part,
    heads,
    mlps,
    resolve,
)
from decompclip.decomposition.decomposition import Decomposition, batches, check_alike
from decompclip.decomposition.maps import one_thread
from decompclip.decomposition.moments import check_finite
from decompclip.display import Result, some

if TYPE_CHECKING:
    import pandas as pd


Head = int | Literal["mlp"]
"""A head of a layer by its number, or the layer's MLP."""

KIND_NAMES = {
    "heads": "heads",
    "mlps": "MLPs",
    "neurons": "neurons",
    "features": "features",
    "embed": "embedding",
    "pool": "MLP of the pool",
}
"""Kinds of components, in figures."""


def parts_of(components: Components, of: HasComponents | HasConfig) -> tuple[Part, ...]:
    """Every single component that an expression names: heads, MLPs, the embedding, the pool's MLP.

    Args:
        components: the expression.
        of: as `resolve` takes it.

    Raises:
        IndexError, TypeError: as `resolve`.
        ValueError: it names nothing, or single neurons.
    """
    parts = resolve(components, of).singles
    if not parts:
        raise ValueError(f"expected at least one component; received {components!r}, which names none")
    return parts


def part_at(layer: int, head: Head) -> Components:
    """One component by its place."""
    return mlps[layer] if head == "mlp" else heads[layer, head]


def position(parts: Sequence[Part], part: Part | str) -> int:
    """Where a part, or its name such as "heads[3, 1]", stands.

    Raises:
        KeyError: it is not among them.
    """
    names = [str(known) for known in parts]
    if str(part) not in names:
        raise KeyError(
            f"expected one of the {len(names)} parts measured, {names[0]} .. {names[-1]}; received {part}; "
            "name it in components="
        )
    return names.index(str(part))


def place_of(which: int | str, known: Sequence[str], what: str) -> int:
    """Where one of the known stands, by its name or number.

    Raises:
        LookupError: it is not among them.
    """
    if isinstance(which, str) and which in known:
        return list(known).index(which)
    if isinstance(which, str) or not -len(known) <= which < len(known):
        raise LookupError(
            f"expected {'an' if what[0] in 'aeiou' else 'a'} {what} of {len(known)}: {some([*map(repr, known)], 6)}; received {which!r}"
        )
    return which % len(known)


def named(given: str | Sequence[str] | None, usual: tuple[str, ...], what: str, of: str) -> tuple[str, ...]:
    """The names given, or the usual ones where none are.

    Raises:
        ValueError: names of another number.
    """
    found = usual if given is None else (given,) if isinstance(given, str) else tuple(map(str, given))
    if len(found) != len(usual):
        raise ValueError(
            f"expected a {what} for each of {len(usual)} {of}; received {len(found)}; pass as many, or none"
        )
    return found


def image_names(given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of images, by default their numbers. Raises as `named`."""
    return named(given, tuple(map(str, range(count))), "name", "images")


class ByPart(Result):
    """What results have in common that have numbers for each of some components."""

    parts: tuple[Part, ...]
    n_layers: int
    n_heads: int

    def __len__(self) -> int:
        return len(self.parts)

    def _at(self, part: Part | str) -> int:
        return position(self.parts, part)

    def _grid(self, values: Float[Tensor, " part"]) -> tuple[Tensor, Tensor]:
        """The numbers of single heads [layer head] and of MLPs [layer]; nan where a part is not among them."""
        heads = values.new_full((self.n_layers, self.n_heads), torch.nan)
        mlps = values.new_full((self.n_layers,), torch.nan)
        for part, value in zip(self.parts, values, strict=True):
            if part.kind == "mlps":
                mlps[part.layer] = value
            elif part.kind == "heads" and part.head is not None:
                heads[part.layer, part.head] = value
        return heads, mlps

    def _frame(self, **columns: Any) -> pd.DataFrame:
        """One row a part: part, kind, layer, head, and these columns."""
        import pandas as pd

        own: dict[str, Any] = {
            "part": [str(part) for part in self.parts],
            "kind": [part.kind for part in self.parts],
            "layer": pd.array([part.layer for part in self.parts], dtype="Int64"),
            "head": pd.array([part.head for part in self.parts], dtype="Int64"),
        }
        return pd.DataFrame(own | {name: values.numpy() for name, values in columns.items()})


class Points:
    """Terms of some parts, image by image, as points whose euclidean distances are those of the terms.

    A head's points are its coordinates times a factor `R` of the Gram (`R @ R.T = gram`, by a QR of the map,
    which does not square its condition), so that they have d_head numbers and not d_embed. Batches are added
    one by one: kept are the points alone.
    """

    def __init__(self, like: Decomposition, components: Components | None) -> None:
        """Without images yet. `components` None: the heads of each layer together, and the MLPs."""
        self.maps, self.normalized = like.maps, like.normalized
        if components is None:
            self.parts = tuple(kind[layer] for kind in (heads, mlps) for layer in range(like.n_layers))
        else:
            self.parts = parts_of(components, like)
        self._kept: list[list[Tensor]] = [[] for _ in self.parts]

    @staticmethod
    def of(d: Decomposition | Iterable[Decomposition], components: Components | None) -> Points:
        """Of a decomposition, or of a stream of batches.

        Raises:
            IndexError: a component that the tower does not have.
            TypeError: what the stream gives is no decomposition.
            ValueError: no images, terms that are not finite, or batches of different models or options.
        """
        points = None
        for batch in batches(d):
            if points is None:
                points = Points(batch, components)
            check_alike(points, batch)
            check_finite(batch, first=len(points))
            for kept, part in zip(points._kept, points.parts, strict=True):
                kept.append(points._points(batch, part))
        if points is None or not len(points):
            raise ValueError("expected at least one image; received none; check the image source")
        return points

    @cached_property
    def _factors(self) -> Float[Tensor, "layer head coord coord"]:
        with one_thread():
            return torch.linalg.qr(self.maps.heads.double().mT, mode="r").R.mT

    def _points(self, d: Decomposition, part: Part) -> Float[Tensor, "batch point"]:
        if part.kind == "mlps":
            return d.mlps[:, part.layer].contiguous()  # no view, which would keep the other layers' terms
        if part.kind != "heads":
            return d.embed if part.kind == "embed" else d.pool[:, 0]
        coords, maps = d.coords[:, part.layer], d.maps.heads[part.layer]
        if part.head is None:
            return coords.sum(1) if d.maps.direct else coords.flatten(1) @ maps.flatten(0, 1)
        coords = coords[:, part.head]
        if d.maps.direct:
            return coords.contiguous()
        return coords @ self._factors[part.layer, part.head].to(coords)

    def __getitem__(self, index: int) -> Float[Tensor, "image point"]:
        """All images' points of one part."""
        return torch.cat(self._kept[index])

    def __len__(self) -> int:
        """Number of images."""
        return sum(map(len, self._kept[0]))
