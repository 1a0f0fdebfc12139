"""Sweeps: one ablation after another, layer by layer or head by head, in one pass (docs/method.md, section 2; paper, section 3.2).

Ablating a component adds `(fill - coords) @ maps @ classifier.T` to the logits: a change. The two factors on the right
belong to the model and are multiplied once. Settings differ by whole layers, so that their logits are prefix sums of
the layers' changes: a setting costs one addition.

`most_damaging` finds the set of components whose ablation does most, one component at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.api import check_choice
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, heads, mlps, resolve
from decompclip.decomposition.decomposition import Decomposition, check_alike
from decompclip.decomposition.maps import pieces
from decompclip.decomposition.moments import Moments, check_finite
from decompclip.display import Result
from decompclip.intervals import Rate
from decompclip.operators.ablation import check_moments
from decompclip.operators.sweep_results import FillKind, HeadSweep, Kind, Scheme, Sweep, SweepTable
from decompclip.tower.vit import HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True, eq=False)
class Shared:
    """What all chunks of a data set have in common.

    Attributes:
        to_class: heads' coordinates to logits; None where two steps are cheaper.
        heads, mlps, embed: the logits of what is filled in; None for zero.
    """

    classifier: Float[Tensor, "d_embed class"]
    to_class: Float[Tensor, "layer head coord class"] | None
    heads: Float[Tensor, "layer head class"] | None = None
    mlps: Float[Tensor, "layer class"] | None = None
    embed: Float[Tensor, " class"] | None = None

    @staticmethod
    def of(d: Decomposition, moments: Moments | None, classifier: Float[Tensor, "class d_embed"]) -> Shared:
        weights = classifier.detach().to(d.embed).T.contiguous()
        n_heads, coord, d_embed = d.maps.heads.shape[1:]
        one_step = n_heads * coord * weights.shape[1]
        two_steps = n_heads * coord * d_embed + weights.numel()
        to_class = d.maps.heads @ weights if not d.maps.direct and one_step <= two_steps else None
        if moments is None:
            return Shared(weights, to_class)
        fills = (moments.heads, moments.mlps, moments.embed)
        return Shared(
            weights, to_class, *((term.to(weights.device) @ weights.double()).to(weights) for term in fills)
        )


@dataclass(frozen=True, eq=False)
class Changes:
    """What ablations add to the logits of one chunk of images."""

    d: Decomposition
    shared: Shared

    @property
    def before(self) -> Float[Tensor, "batch class"]:
        """The logits with nothing ablated."""
        return self._logits[0]

    def of_layers(self, kind: str) -> list[Float[Tensor, "batch class"]]:
        """Of each layer's "heads" together, or of its MLP ("mlps")."""
        return self._logits[1][kind]

    def of_entry(self) -> Float[Tensor, "batch class"]:
        """Of the stream's entry, the embedding."""
        return _less(self.d.embed @ self.shared.classifier, self.shared.embed)

    def of_head(self, layer: int, head: int) -> Float[Tensor, "batch class"]:
        fill = None if self.shared.heads is None else self.shared.heads[layer, head]
        return _less(self._heads(layer, slice(head, head + 1)), fill)

    @cached_property
    def _logits(self) -> tuple[Tensor, dict[str, list[Tensor]]]:
        d, shared = self.d, self.shared
        parts = {
            "heads": [self._heads(layer) for layer in range(d.n_layers)],
            "mlps": [d.mlps[:, layer] @ shared.classifier for layer in range(d.n_layers)],
        }
        before = (d.embed + d.bias + d.pool.sum(1)) @ shared.classifier
        for part in (*parts["heads"], *parts["mlps"]):
            before += part
        fills = {"heads": None if shared.heads is None else shared.heads.sum(1), "mlps": shared.mlps}
        for kind, fill in fills.items():
            for layer, part in enumerate(parts[kind]):
                _less(part, None if fill is None else fill[layer], out=part)
        return before, parts

    def _heads(self, layer: int, which: slice = slice(None)) -> Float[Tensor, "batch class"]:
        """The logits of some heads of a layer together."""
        d, shared = self.d, self.shared
        coords = d.coords[:, layer, which]
        if d.maps.direct:
            return coords.sum(1) @ shared.classifier
        if shared.to_class is not None:
            return coords.flatten(1) @ shared.to_class[layer, which].flatten(0, 1)
        return (coords.flatten(1) @ d.maps.heads[layer, which].flatten(0, 1)) @ shared.classifier


def _less(now: Tensor, fill: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    return torch.neg(now, out=out) if fill is None else torch.sub(fill, now, out=out)


def predictions(logits: Float[Tensor, "batch class"]) -> Int[Tensor, " batch"]:
    """The class of largest logit, the first of equals."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(logits.numpy().argmax(1))  # many times faster than torch's own
    return logits.argmax(1)


Data = Decomposition | Iterable[Decomposition]

CHUNK = 2**19
"""Logits worked on at a time: a chunk has as many images as make these (2 MiB in fp32, that caches hold)."""


def ablation_sweep(
    data: Data | Iterable[Float[Tensor, "_ 3 h w"]],
    moments: Moments | None,
    classifier: Float[Tensor, "class d_embed"],
    *,
    model: HookedViT | HookedCLIP | None = None,
    kinds: tuple[Kind, ...] = get_args(Kind),
    schemes: tuple[Scheme, ...] = get_args(Scheme),
    each_head: bool = False,
    entry: bool = False,
) -> SweepTable:
    """Predictions under every setting of every sweep, in one pass over the data and in bounded memory.

    The published code counts the embedding, the stream's entry, as the first MLP. Its curves of L layers then have
    L + 1 settings, and its "forward" always ablates the embedding; its "last five" are layers L-5..L-1 all the same.
    Here MLPs are MLPs; `entry=True` counts as the published code does.

    Args:
        data: a decomposition, or batches of them (from a store, say); with `model` also batches of images, which
            are decomposed in the moments' form.
        moments: their means are filled in; None fills in zero.
        classifier: text features.
        model: decomposes batches of images.
        kinds: what is ablated.
        schemes: in which order of layers; see `Sweep`.
        each_head: whether to ablate also every head alone.
        entry: whether sweeps of MLPs begin with the stream's entry, in the place of a layer before the first.

    Returns:
        The predictions under every setting.

    Raises:
        ValueError: an unknown kind or scheme, no data, moments that do not fit it, a classifier of another width,
            or batches of different models or options.
        TypeError: images without a model.
    """
    for name, values, known in (("kind", kinds, get_args(Kind)), ("scheme", schemes, get_args(Scheme))):
        if isinstance(values, str) or not values:
            raise ValueError(f"expected {name}s as a tuple of some of {known}; received {values!r}")
        for value in values:
            check_choice(name, value, known)
    found: dict[tuple[Kind, Scheme] | Literal["before", "heads"], list[Tensor]] = {}
    for changes in chunks(data, moments, classifier, model=model):
        for key, answers in _settings(changes, kinds, schemes, each_head, entry):
            found.setdefault(key, []).append(answers)
    if "before" not in found:
        raise ValueError("expected decompositions; received none; check the source of the data")
    joined = {key: torch.cat(parts, dim=-1) for key, parts in found.items()}
    fill: FillKind = "zero" if moments is None else "mean"
    before, alone = joined.pop("before"), joined.pop("heads", None)
    sweeps = {
        key: Sweep(answers, *key, fill, before, entry and key[0] == "mlps")
        for key, answers in joined.items()
        if isinstance(key, tuple)
    }
    each = None if alone is None else HeadSweep(alone, fill, before)
    return SweepTable(before, sweeps, each, fill)


def chunks(
    data: object,
    moments: Moments | None,
    classifier: Tensor,
    *,
    model: HookedViT | HookedCLIP | None = None,
) -> Iterator[Changes]:
    """The changes of all the data, some images at a time; what belongs to the model is made once.

    Raises:
        ValueError, TypeError: as `ablation_sweep`.
    """
    if moments is not None:
        check_moments(moments)
    first, shared, seen = None, None, 0
    for d in _decompositions(data, moments, model):
        if first is None:
            if classifier.ndim != 2 or not len(classifier) or classifier.shape[1] != d.d_embed:
                raise ValueError(
                    f"expected a classifier [class, {d.d_embed}] of at least one class; received "
                    f"{list(classifier.shape)}; build it with the text tower of the same model "
                    "(model.zero_shot_classifier)"
                )
            if moments is not None:
                moments.check(d)
            first, shared = d[:0], Shared.of(d, moments, classifier)
        assert shared is not None
        check_alike(first, d)
        for piece in pieces(len(d), len(classifier), CHUNK):
            changes = Changes(d[piece], shared)
            if not changes.before.isfinite().all():  # as any term that is not, at the cost of a few numbers
                check_finite(changes.d, first=seen + piece.start)
                raise ValueError(
                    "expected finite logits; received nan or inf of finite terms; check the classifier, or decompose "
                    "in fp32"
                )
            yield changes
        seen += len(d)


def _decompositions(
    data: object, moments: Moments | None, model: HookedViT | HookedCLIP | None
) -> Iterator[Decomposition]:
    if isinstance(data, Tensor):
        raise ValueError(
            f"expected batches of images, one after another; received one tensor {list(data.shape)}; a single batch "
            "is [images]"
        )
    options: dict[str, Any] = {}
    if moments is not None:
        options = {"convention": moments.maps.convention, "normalize": moments.normalized}
    known = [data] if isinstance(data, Decomposition) or not isinstance(data, Iterable) else data
    for part in known:
        if isinstance(part, Tensor):
            if model is None:
                raise TypeError(
                    "expected decompositions, or images and a model; received images alone; pass model=, or decompose "
                    "them"
                )
            yield decompose(tower(model), part, **options)
        elif isinstance(part, Decomposition):
            yield from part.shards()
        else:
            raise TypeError(f"expected a Decomposition, or batches of them; received {type(part).__name__}")


def _settings(
    changes: Changes, kinds: tuple[Kind, ...], schemes: tuple[Scheme, ...], each_head: bool, entry: bool
) -> Iterator[tuple[tuple[Kind, Scheme] | Literal["before", "heads"], Tensor]]:
    """The predictions of all settings, of one chunk."""
    before, d = changes.before, changes.d
    yield "before", predictions(before)
    spare = torch.empty_like(before)

    def added(change: Tensor) -> Tensor:
        return predictions(torch.add(before, change, out=spare))

    if each_head:
        heads = [
            [added(changes.of_head(layer, head)) for head in range(d.n_heads)] for layer in range(d.n_layers)
        ]
        yield "heads", torch.stack([torch.stack(row) for row in heads])
    for kind in kinds:
        of_layers = changes.of_layers(kind)
        if entry and kind == "mlps":
            of_layers = [changes.of_entry(), *of_layers]
        for scheme in schemes:
            if scheme == "separate":
                yield (kind, scheme), torch.stack([added(change) for change in of_layers])
                continue
            step = 1 if scheme == "forward" else -1
            spare.copy_(before)
            found = [predictions(spare.add_(change)) for change in of_layers[::step]]
            yield (kind, scheme), torch.stack(found[::step])


Place = tuple[int, int | None]  # layer and head; the layer's MLP where there is no head


@dataclass(frozen=True, eq=False, repr=False)
class GreedySet(Result):
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
        return reduce(or_, self.steps) if self.steps else heads[[]]

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
        from decompclip.figures.scatter import Point
        from decompclip.figures.theme import ACCURACY

        style = replace(ACCURACY, label="Taken for their answer")
        points = [Point.of(Rate(hits, self.total).to_dict()) for hits in self.hits]
        names = ["none", *(f"+ {step!r}" for step in self.steps)]
        return sweep_panels({"": {style: points}}, {style: points[0].value}, x="", ticks=names)

    def __repr__(self) -> str:
        ends = f"{self.rates[0]:.3f} to {self.rates[-1]:.3f}"
        return f"GreedySet({self.components!r}, {self.fill}-ablated: {ends} of {self.total} images)"


def most_damaging(
    data: Data,
    moments: Moments | None,
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
        classifier: text features.
        answers: a class for each image: its label, to harm accuracy; the attacker's target for triggered images, to
            harm the attack.
        candidates: heads and MLPs to choose from.
        size: number of components at most; fewer where there are no more candidates.

    Returns:
        The components in order, and how many images keep their answer after each.

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
    while True:
        last, present, total = len(chosen) == size, 0, 0
        left: list[Place] = []
        counts = Counter[Place]()
        for changes in chunks(data, moments, classifier):
            if not left:
                left = [place for place in _places(candidates, changes) if place not in chosen]
            wanted = answers[total : total + len(changes.d)].to(changes.before.device)
            total += len(changes.d)
            if len(wanted) < len(changes.d):
                break
            now = changes.before + sum(_change(changes, place) for place in chosen)
            present += int((predictions(now) == wanted).sum())
            for place in () if last else left:
                counts[place] += int((predictions(now + _change(changes, place)) == wanted).sum())
        if total != len(answers) or not total:
            raise ValueError(
                f"expected an answer for each image, and some images; received {len(answers)} answers and "
                f"{total}{' or more' if total > len(answers) else ''} images; keep the order of the data"
            )
        hits.append(present)
        if last or not left:
            break
        chosen.append(min(left, key=counts.__getitem__))
    fill: FillKind = "zero" if moments is None else "mean"
    steps = tuple(mlps[layer] if head is None else heads[layer, head] for layer, head in chosen)
    return GreedySet(steps, tuple(hits), total, fill)


def _places(candidates: Components, changes: Changes) -> list[Place]:
    mask = resolve(candidates, changes.d)
    if mask.embed or mask.pool or mask.empty:
        raise ValueError(
            f"expected heads and MLPs to choose from; received {candidates!r}; e.g. heads | mlps[-5:]"
        )
    found: list[Any] = mask.heads.nonzero().tolist()
    return [*((layer, head) for layer, head in found), *((int(layer), None) for layer in mask.mlps.nonzero())]


def _change(changes: Changes, place: Place) -> Float[Tensor, "batch class"]:
    layer, head = place
    return changes.of_layers("mlps")[layer] if head is None else changes.of_head(layer, head)
