"""Which components are infected: those that pull suspect images toward the target, and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from decompclip.audit.checks import Scorer, Setting
from decompclip.audit.collect import Split
from decompclip.audit.evidence import Shift
from decompclip.decomposition.components import Components, Part, heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.evaluation.metrics import predict
from decompclip.intervals import CONFIDENCE, Z
from decompclip.operators.ablation import MeanAblate


@dataclass(frozen=True)
class InfectedPart:
    """One component's pull on suspect images, by its own term (the direct effect).

    Attributes:
        push: mean pull toward the target, in units of the feature's norm (see `Shift`).
        error: half-width of its 95 % interval, which holds for all components at once (Bonferroni).
        share: of everything that pulls toward the target.
        distance, floor: how far the mean moves in all directions, and how far to expect from sampling alone.
        infected: pulls beyond chance, and more than an equal share, in a model on which suspect images have an effect.
    """

    part: Part
    push: float
    error: float
    share: float
    distance: float
    floor: float
    infected: bool


@dataclass(frozen=True)
class Infection:
    """Every head and MLP, the strongest pull first; and the model without the infected ones.

    Attributes:
        without: their terms replaced by clean means; None where none is infected.
        without_others: the same done to as many others of each kind, drawn, as far as there are so many.
    """

    parts: tuple[InfectedPart, ...]
    without: Setting | None
    without_others: Setting | None

    @property
    def infected(self) -> tuple[InfectedPart, ...]:
        return tuple(part for part in self.parts if part.infected)


def infected_parts(shift: Shift, *, affected: bool) -> tuple[InfectedPart, ...]:
    """Every head and MLP in the order of its pull; none is infected where suspect images have no effect.

    Unknown errors (single images) infect nothing: nothing is beyond chance then.
    """
    places = [heads[layer, head] for layer, head in _places(shift.heads_push)]
    places += [mlps[layer] for layer in range(len(shift.mlps_push))]

    def flat(name: str) -> list[float]:
        of_heads, of_mlps = (getattr(shift, f"{kind}_{name}") for kind in ("heads", "mlps"))
        return [*of_heads.flatten().tolist(), *of_mlps.tolist()]

    n = len(places)
    wider = float(-ndtri((1 - CONFIDENCE) / 2 / n)) / Z
    pushes, errors = flat("push"), [wider * error for error in flat("push_error")]
    whole = sum(push for push in pushes if push > 0) or 1.0
    found = [
        InfectedPart(
            part,
            push,
            error,
            push / whole,
            distance,
            floor,
            infected=affected and push - error > 0 and push > whole / n,
        )
        for part, push, error, distance, floor in zip(
            places, pushes, errors, flat("distance"), flat("floor"), strict=True
        )
    ]
    return tuple(sorted(found, key=lambda part: -part.push))


def infection(
    split: Split,
    shift: Shift,
    moments: Moments,
    classifier: Float[Tensor, "class d_embed"],
    score: Scorer,
    *,
    affected: bool,
    seed: int,
) -> Infection:
    """The components that pull, and what mean-ablating the infected ones leaves beside as many others."""
    parts = infected_parts(shift, affected=affected)
    chosen = [part.part for part in parts if part.infected]
    others = as_many(chosen, [part.part for part in parts if not part.infected], seed)

    def without(which: list[Part], name: str) -> Setting | None:
        if not which:
            return None
        components: Components = reduce(or_, which)
        edit = MeanAblate(components, moments)
        sets = (split.clean.decomposition, split.suspect.decomposition)
        return score(name, *(predict(edit(d).features, classifier) for d in sets))

    n = len(chosen)
    return Infection(
        parts,
        without(chosen, f"{n} infected component{'s' if n > 1 else ''} mean-ablated"),
        without(others, f"{len(others)} other{'s' if len(others) > 1 else ''} of their kinds mean-ablated"),
    )


def as_many(chosen: list[Part], rest: list[Part], seed: int) -> list[Part]:
    """Of each kind as many of the rest as were chosen, drawn without replacement, or all that there are."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Part] = []
    for kind in ("heads", "mlps"):
        own = [part for part in rest if part.kind == kind]
        order = torch.randperm(len(own), generator=generator).tolist()
        drawn += [own[i] for i in order[: sum(part.kind == kind for part in chosen)]]
    return drawn


def _places(grid: Float[Tensor, "layer head"]) -> list[tuple[int, int]]:
    n_layers, n_heads = grid.shape
    return [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
