"""Where suspect images differ: how each component's mean moves, what it contributes to the target, and which are infected; and
what weights alone say of components beside a reference, on which no verdict stands.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.audit.checks import Scorer, Setting
from decompclip.audit.collect import Split
from decompclip.decomposition.components import Components, Part, heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.evaluation.evaluate import classify
from decompclip.intervals import Z, z_for
from decompclip.models.clip import HookedCLIP
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.checkpoints import CLASSES, compare_checkpoints


@dataclass(frozen=True)
class Shift:
    """Difference of each component's mean term between suspect and clean images, in units of the feature's norm.

    Attributes:
        *_distance: norm of the difference of the mean terms.
        *_floor: norm to expect from sampling alone, were the means equal.
        *_contribution: its part along (target text - mean of the other classes' texts); positive is toward the target.
        *_error: half-width of the contribution's 95 % interval.
        totals: contribution and half-width of "all", "heads", "mlps" and "rest".
        paired: whether differences were taken between paired images.
    """

    heads_distance: Float[Tensor, "layer head"]
    heads_floor: Float[Tensor, "layer head"]
    heads_contribution: Float[Tensor, "layer head"] = field(metadata={"key": "heads_push"})
    heads_error: Float[Tensor, "layer head"] = field(metadata={"key": "heads_push_error"})
    mlps_distance: Float[Tensor, " layer"]
    mlps_floor: Float[Tensor, " layer"]
    mlps_contribution: Float[Tensor, " layer"] = field(metadata={"key": "mlps_push"})
    mlps_error: Float[Tensor, " layer"] = field(metadata={"key": "mlps_push_error"})
    totals: dict[str, tuple[float, float]]
    paired: bool

    @property
    def heads_push(self) -> Float[Tensor, "layer head"]:
        """The former name of `heads_contribution`."""
        warnings.warn("heads_push is now heads_contribution", DeprecationWarning, stacklevel=2)
        return self.heads_contribution


def shift(
    clean: Decomposition, suspect: Decomposition, toward: Float[Tensor, " d_embed"], *, paired: bool
) -> Shift:
    """Compare the mean terms of two sets of images, in head coordinates (docs/method.md, section 4).

    Args:
        clean: the clean images' terms.
        suspect: the suspect images' terms.
        toward: direction of the joint space along which contributions are measured; for instance the target's
            text feature minus the mean of the others'.
        paired: image `i` of the one set is image `i` of the other but for the trigger. What the two have in common then
            cancels, and the intervals shrink.
    """
    toward = toward.double()
    maps = clean.maps.heads.double()  # [layer head r d_embed]
    along = maps @ toward
    mean, error = _difference(clean.coords, suspect.coords, paired)

    def contribution(clean: Tensor, suspect: Tensor) -> tuple[Tensor, Tensor]:
        """Difference of the means of `[batch, ...]` numbers, and the half-width of its 95 % interval."""
        mean, error = _difference(clean[..., None], suspect[..., None], paired)
        return mean[..., 0], Z * error[..., 0, 0].sqrt()

    mlps_contribution, mlps_error = contribution(clean.mlps @ toward.float(), suspect.mlps @ toward.float())
    mlps_mean, mlps_half = contribution(clean.mlps, suspect.mlps)
    pairs = {
        "all": [d.features @ toward.float() for d in (clean, suspect)],
        "heads": [torch.einsum("blhr,lhr->b", d.coords, along.float()) for d in (clean, suspect)],
        "mlps": [d.mlps.sum(1) @ toward.float() for d in (clean, suspect)],
    }
    pairs["rest"] = [whole - h - m for whole, h, m in zip(*pairs.values(), strict=True)]
    totals = {name: contribution(*pair) for name, pair in pairs.items()}
    return Shift(
        heads_distance=torch.einsum("lhr,lhrd->lhd", mean, maps).norm(dim=-1),
        heads_floor=(error * clean.maps.grams.double()).sum((-2, -1)).clamp_min(0).sqrt(),
        heads_contribution=(mean * along).sum(-1),
        heads_error=Z * torch.einsum("lhr,lhrs,lhs->lh", along, error, along).clamp_min(0).sqrt(),
        mlps_distance=mlps_mean.norm(dim=-1),
        mlps_floor=(mlps_half / Z).norm(dim=-1),
        mlps_contribution=mlps_contribution,
        mlps_error=mlps_error,
        totals={name: (float(value), float(half)) for name, (value, half) in totals.items()},
        paired=paired,
    )


def _difference(
    clean: Float[Tensor, "batch *component r"], suspect: Float[Tensor, "batch *component r"], paired: bool
) -> tuple[Float[Tensor, "*component r"], Float[Tensor, "*component r r"]]:
    """Difference of the two means, and the covariance of its error."""
    clean, suspect = clean.double(), suspect.double()
    if paired:
        return (suspect - clean).mean(0), _covariance(suspect - clean)
    return suspect.mean(0) - clean.mean(0), _covariance(suspect) + _covariance(clean)


def _covariance(samples: Float[Tensor, "batch *component r"]) -> Float[Tensor, "*component r r"]:
    """Of the mean: that of the samples over their number; nan for a single sample, unknown."""
    n, centred = len(samples), samples - samples.mean(0)
    spread = torch.einsum("b...r,b...s->...rs", centred, centred)
    return spread / (n * (n - 1)) if n > 1 else torch.full_like(spread, torch.nan)


@dataclass(frozen=True)
class InfectedPart:
    """One component's contribution to the target on suspect images, by its own term (the direct effect).

    Attributes:
        part: the head or MLP.
        contribution: mean difference toward the target, in units of the feature's norm (see `Shift`).
        error: half-width of its 95 % interval, which holds for all components at once (Bonferroni).
        share: of all that contributes toward the target.
        distance, floor: how far the mean moves in all directions, and how far to expect from sampling alone.
        infected: contributes beyond chance, and more than an equal share, in a model on which suspect images have an effect.
    """

    part: Part
    contribution: float = field(metadata={"key": "push"})
    error: float
    share: float
    distance: float
    floor: float
    infected: bool


def short(part: Part) -> str:
    """`head 5.6` or `MLP 3`."""
    return f"MLP {part.layer}" if part.kind == "mlps" else f"head {part.layer}.{part.head}"


@dataclass(frozen=True)
class Infection:
    """Every head and MLP, the largest contribution first; and the model without the infected ones.

    Attributes:
        parts: every head and MLP.
        without: the infected ones' terms replaced by clean means; None where none is infected.
        without_others: the same done to as many others of each kind, drawn, as far as there are so many.
    """

    parts: tuple[InfectedPart, ...]
    without: Setting | None
    without_others: Setting | None

    @property
    def infected(self) -> tuple[InfectedPart, ...]:
        return tuple(part for part in self.parts if part.infected)


def infected_parts(shift: Shift, *, affected: bool) -> tuple[InfectedPart, ...]:
    """Every head and MLP, the largest contribution first.

    Args:
        shift: of the two sets.
        affected: whether suspect images have an effect; where not, no component is infected. Nor is one where the error is
            unknown (single images): nothing is beyond chance then.
    """
    n_layers, n_heads = shift.heads_contribution.shape
    places = [heads[layer, head] for layer in range(n_layers) for head in range(n_heads)]
    places += [mlps[layer] for layer in range(n_layers)]
    contributions, errors, distances, floors = (
        torch.cat([getattr(shift, f"heads_{name}").flatten(), getattr(shift, f"mlps_{name}")]).tolist()
        for name in ("contribution", "error", "distance", "floor")
    )
    n, whole = len(places), sum(value for value in contributions if value > 0) or 1.0
    wider = z_for(n) / Z
    found = [
        InfectedPart(
            part,
            value,
            wider * error,
            value / whole,
            distance,
            floor,
            infected=affected and value - wider * error > 0 and value > whole / n,
        )
        for part, value, error, distance, floor in zip(
            places, contributions, errors, distances, floors, strict=True
        )
    ]
    return tuple(sorted(found, key=lambda part: -part.contribution))


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
    """Every component's contribution, and what mean-ablating the infected ones leaves beside as many others."""
    parts = infected_parts(shift, affected=affected)
    chosen = [part.part for part in parts if part.infected]
    others = as_many(chosen, [part.part for part in parts if not part.infected], seed)

    def without(which: list[Part], name: str) -> Setting | None:
        if not which:
            return None
        components: Components = reduce(or_, which)
        edit = MeanAblate(components, moments)
        sets = (split.clean.decomposition, split.suspect.decomposition)
        return score(name, *(classify(edit, d, classifier) for d in sets))

    n = len(chosen)
    return Infection(
        parts,
        without(chosen, f"{n} most affected component{'s' if n > 1 else ''} mean-ablated"),
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


SHOWN = 10
"""Parts and classes of a report: the first."""

SAID = ("change", "share", "texts")
"""Of a part."""


@dataclass(frozen=True)
class WeightsAlone:
    """The first of `compare_checkpoints`' answers, in the order of their size.

    Attributes:
        reference: the model that this one is held against.
        classes: `rank`, `class`, `score`, `image` and `text` of those along which both towers changed most; none where fewer
            than three are known.
        lead: the highest score over the second; None without classes.
        parts: `part`, `change` of its map, `share` of that along its first direction, and `texts` for this direction.
        median_change: over all heads and MLPs.
        text_change: of the text tower's weights.
        left_out: why the two cannot be compared; empty where they were.
    """

    reference: str
    classes: tuple[dict[str, Any], ...] = ()
    lead: float | None = None
    parts: tuple[dict[str, Any], ...] = ()
    median_change: float = 0.0
    text_change: float = 0.0
    left_out: str = ""

    @property
    def in_short(self) -> str:
        """What came out, in two sentences."""
        if self.left_out:
            return f"Not compared: {self.left_out}."
        most = self.parts[0]
        text = f"{most['part']} changed most, by {100 * most['change']:.0f} % (half of all heads and MLPs by {100 * self.median_change:.0f} % or less); the "
        text += f"text tower by {100 * self.text_change:.0f} %."
        if self.lead is None:
            return f"{text} Classes are not ranked: fewer than {CLASSES} are known."
        if self.lead <= 1:
            return f"{text} No class stands first."
        first, second = (entry["class"] for entry in self.classes[:2])
        return f"{text} Both towers changed most along “{first}”, {self.lead:.2f} times as much as along “{second}”."


def weights_alone(
    model: HookedCLIP, reference: HookedCLIP, class_names: Sequence[str], *, name: str | None = None
) -> WeightsAlone:
    """Compare two models by their weights; one that cannot be compared is no error of an audit.

    Args:
        model: the one that is audited.
        reference: the one that it is said to come from.
        class_names: to rank.
        name: of the reference, by default its own.
    """
    name = name or reference.name
    names = tuple(class_names) if len(class_names) >= CLASSES else ()
    try:
        found = compare_checkpoints(model, reference, class_names=names)
    except ValueError as error:
        return WeightsAlone(name, left_out=str(error))
    classes = found.classes
    most = found.top(SHOWN)
    parts = zip(most.parts, most.to_frame().to_dict("records"), strict=True)
    return WeightsAlone(
        name,
        classes=() if classes is None else tuple(classes.top(SHOWN).to_frame().to_dict("records")),
        lead=None if classes is None else classes.lead,
        parts=tuple({"part": short(part), **{key: row[key] for key in SAID}} for part, row in parts),
        median_change=found.change.median().item(),
        text_change=found.text_change,
    )


WEIGHTS_CONCLUDE = (
    "It can say where to look: parts, words, and a class. The attacker's class came first of 200 in 21 of 21 bundled backdoored models, on which nothing was chosen; "
    "and of 10 or 12 in 22 of 22 others, on which the score was chosen. Those of one world come from one model and lead to one class: they are fewer tests than models.",
    "It cannot tell a backdoor from an honest fine-tuning: some class is always first. In 6 clean fine-tunings, as long as a backdoored one of the same recipe, the first class led by 1.06 to 1.16. "
    "In the backdoored models it led by 1.05 to 4.37: by more than in the clean ones in 19 of 19 on drawings, but only in 2 of 3 on photographs of ten classes, once barely. "
    "For 200 classes (leads of 1.46 to 3.49) no clean fine-tuning of that length was made to compare with. No verdict rests on a lead. Compare with clean fine-tunings of the model's own recipe and length.",
    "Words alone are no sign: the attacker's class is among those of the parts that changed most in clean fine-tunings too.",
    "It cannot clear a model: where heads look, which neurons fire, biases, and what later layers make of a change are left out, and an attacker who knows the score can change other classes as well.",
    "It says nothing of a model that was not fine-tuned from the reference: heads and neurons have no common order then.",
)
"""What weights alone can and cannot conclude; the numbers are those of `python -m analyses.weights_alone`."""
