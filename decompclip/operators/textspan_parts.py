"""One component: by its place in the tower, and where moments and decompositions keep it."""

from __future__ import annotations

from typing import Literal

from decompclip.cache.components import Components, heads, mlps
from decompclip.cache.moments import Moments
from decompclip.operators.parts import Part, parts_of

Head = int | Literal["mlp"]
"""A head of a layer by its number, or the layer's MLP."""


def part_at(layer: int, head: Head) -> Components:
    """One component by its place."""
    return mlps[layer] if head == "mlp" else heads[layer, head]


def parts_named(components: Components, moments: Moments) -> tuple[Part, ...]:
    """The components that an expression names in the tower of these moments.

    Raises:
        IndexError: it names what the tower does not have.
        ValueError: it names nothing, or single neurons.
    """
    n_layers, n_heads, _ = moments.coords.shape
    return parts_of(components, n_layers, n_heads, len(moments.pool))


def place_of(part: Part) -> tuple[str, tuple[int, ...]]:
    """The field of `Decomposition` and `Moments` that holds a component, and where on it (past the batch's axis)."""
    match part.kind:
        case "heads":
            return "coords", (part.layer or 0, part.head or 0)
        case "mlps":
            return "mlps", (part.layer or 0,)
        case "pool":
            return "pool", (0,)
        case _:
            return part.kind, ()
