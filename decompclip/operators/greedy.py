"""The set of components whose ablation does the most, found one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.cache.components import Components, heads, mlps
from decompclip.cache.moments import Moments
from decompclip.evaluation.intervals import Rate
from decompclip.operators.changes import Changes, predictions
from decompclip.operators.splits import Validation
from decompclip.operators.sweep_results import FillKind
from decompclip.operators.sweeps import Data, chunks

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Place = tuple[int, int | None]  # layer and head; the layer's MLP where there is no head


@dataclass(frozen=True, eq=False, repr=False)
class GreedySet:
    """Components in the order in which they were added.

    Attributes:
        steps: one component each.
        hits: images that are taken for their answer before the first step, and after each.
        total: number of images.
        fill: what stands in for the ablated terms.
    """

    steps: tuple[Components, ...]
    hits: tuple[int, ...]
    total: int
    fill: FillKind

    @property
    def components(self) -> Components:
        """All of them together."""
        whole = heads[[]]
        for position, step in enumerate(self.steps):
            whole = step if not position else whole | step
        return whole

    @property
    def rates(self) -> tuple[float, ...]:
        """`hits` as shares of the images."""
        return tuple(hits / self.total for hits in self.hits)

    def to_frame(self) -> pd.DataFrame:
        """One row a step, the first without ablation: step, component, hits, rate."""
        import pandas as pd

        names = ["", *map(repr, self.steps)]
        return pd.DataFrame(
            {"step": range(len(names)), "component": names, "hits": self.hits, "rate": self.rates}
        )

    def figure(self) -> go.Figure:
        """The rate after each step."""
        from decompclip.figures.curves import sweep_panels
        from decompclip.figures.points import Point
        from decompclip.figures.theme import ACCURACY

        style = replace(ACCURACY, label="Taken for their answer")
        points = [Point.of(Rate(hits, self.total).to_dict()) for hits in self.hits]
        names = ["none", *(f"+ {step!r}" for step in self.steps)]
        return sweep_panels({"": {style: points}}, {style: points[0].value}, x="", ticks=names)

    def __repr__(self) -> str:
        ends = f"{self.rates[0]:.3f} to {self.rates[-1]:.3f}"
        return f"GreedySet({self.components!r}, {self.fill}-ablated: {ends} of {self.total} images)"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.3f}".format)


def most_damaging(
    data: Data,
    moments: Moments | Validation | None,
    classifier: Float[Tensor, "class d_embed"],
    answers: Int[Tensor, " image"],
    *,
    candidates: Components = heads | mlps,
    size: int = 5,
) -> GreedySet:
    """Add, one at a time, the component whose ablation takes most images away from their answers.

    One pass over the data for each step, in bounded memory. Of equal candidates the first is taken: heads layer by
    layer, then MLPs.

    Args:
        data: a decomposition, or batches that can be gone through again (a list, not a generator).
        moments: their means are filled in; None fills in zero.
        answers: a class for each image: its label, to harm accuracy; the attacker's target for triggered images, to
            harm the attack.
        candidates: heads and MLPs to choose from.
        size: number of components at most; fewer where there are no more candidates.

    Raises:
        IndexError: an answer that is no class.
        TypeError: data that can be gone through once only.
        ValueError: no data, not one answer for each image, candidates other than heads and MLPs, a negative size, or
            as `ablation_sweep`.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"expected data to go through {size} times; received a {type(data).__name__}, which ends after once; pass "
            "a list of decompositions, or an object whose __iter__ starts anew"
        )
    if size < 0:
        raise ValueError(f"expected a size of 0 or more components; received {size}")
    numbers = answers.flatten()
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(classifier):
        raise IndexError(
            f"expected answers as classes in 0..{len(classifier) - 1}, the rows of the classifier; received "
            f"{int(numbers.min())}..{int(numbers.max())}"
        )
    chosen: list[Place] = []
    hits: list[int] = []
    total = 0
    for _ in range(size + 1):
        left: list[Place] | None = None
        counts = torch.zeros(0, dtype=torch.long)
        present, total = 0, 0
        for changes in chunks(data, moments, classifier):
            if left is None:
                left = [place for place in _places(candidates, changes) if place not in chosen]
                counts = torch.zeros(len(left), dtype=torch.long)
            wanted = answers[total : total + len(changes.d)].to(changes.before.device)
            total += len(changes.d)
            if len(wanted) < len(changes.d):
                break
            now = changes.before + sum(_change(changes, place) for place in chosen)
            present += int((predictions(now) == wanted).sum())
            last = len(hits) == size
            for position, place in enumerate([] if last else left):
                counts[position] += int((predictions(now + _change(changes, place)) == wanted).sum())
        if total != len(answers) or not total:
            raise ValueError(
                f"expected an answer for each image, and some images; received {len(answers)} answers and "
                f"{total}{' or more' if total > len(answers) else ''} images; keep the order of the data"
            )
        hits.append(present)
        if not left or len(hits) > size:
            break
        chosen.append(left[int(counts.argmin())])
    fill: FillKind = "zero" if moments is None else "mean"
    steps = tuple(mlps[layer] if head is None else heads[layer, head] for layer, head in chosen)
    return GreedySet(steps, tuple(hits), total, fill)


def _places(candidates: Components, changes: Changes) -> list[Place]:
    mask = candidates.resolve(changes.n_layers, changes.n_heads, pool=True)
    if mask.embed or mask.pool or mask.neurons is not None or mask.empty:
        raise ValueError(
            f"expected heads and MLPs to choose from; received {candidates!r}; e.g. heads | mlps[-5:]"
        )
    found: list[Any] = mask.heads.nonzero().tolist()
    return [*((layer, head) for layer, head in found), *((int(layer), None) for layer in mask.mlps.nonzero())]


def _change(changes: Changes, place: Place) -> Float[Tensor, "batch class"]:
    layer, head = place
    return changes.of_layers("mlps")[layer] if head is None else changes.of_head(layer, head)
