"""Repairs of image features by name, each fitted on clean images alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from decompclip.attacks.trigger import Extent
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.decomposition.moments import Moments
from decompclip.defenses.agnostic_rep import AgnosticRep
from decompclip.defenses.decomp_rep import DecompRep, fixed_heads, random_heads
from decompclip.operators.ablation import MeanAblate

Edit = Callable[[Decomposition], Decomposition]


@dataclass(frozen=True, eq=False)
class Known:
    """What a repair is fitted on.

    Attributes:
        clean: terms of unit features, in the repair's convention.
        classifier: of the zero-shot classes.
        extent: of the model's own trigger, which the paper's repair must be told; None for a clean model.
        seed: of what a repair draws.
    """

    clean: Decomposition
    classifier: Float[Tensor, "class d_embed"]
    extent: Extent | None
    seed: int


@dataclass(frozen=True)
class Repair:
    """How a repair is fitted, and the convention of terms that it reads."""

    fit: Callable[[Known], Edit]
    convention: Convention = "centred"


def _paper(known: Known) -> Edit:
    return DecompRep.paper(trigger=known.extent or "local").fit(known.clean)


def _misled(known: Known) -> Edit:
    other: Extent = "local" if known.extent == "global" else "global"
    return _paper(replace(known, extent=other))


def _judged(known: Known) -> DecompRep:
    return DecompRep(similarity="cosine", threshold="quantile").fit(known.clean)


def _random_heads(known: Known) -> Edit:
    repair = _judged(known)
    selector, edit = repair.selector_, MeanAblate(heads[-1], repair.selector_.moments_)
    return lambda d: edit.on(random_heads(repair.flags(d), selector.mask_, seed=known.seed))(d)


def _fixed_heads(known: Known) -> Edit:
    """In every image, as many heads as images have flagged on average; those that clean images flag most often."""
    repair = _judged(known)
    edit, clean = MeanAblate(heads[-1], repair.selector_.moments_), repair.flags(known.clean)
    ever = int(clean.any(0).sum())

    def apply(d: Decomposition) -> Decomposition:
        count = min(ever, round(float(repair.flags(d).sum((1, 2)).float().mean())))
        if not count:
            return d
        return edit.on(fixed_heads(clean, count).expand(len(d), -1, -1))(d)

    return apply


REPAIRS: dict[str, Repair] = {
    "none": Repair(lambda known: lambda d: d),
    "Decomp-Rep (paper, right hint)": Repair(_paper, "paper"),
    "Decomp-Rep (paper, wrong hint)": Repair(_misled, "paper"),
    "Decomp-Rep (cosine, quantile)": Repair(_judged),
    "random heads": Repair(_random_heads),
    "fixed heads": Repair(_fixed_heads),
    "last 5 MLPs": Repair(lambda known: MeanAblate(mlps[-5:], Moments.of(known.clean, second=False))),
    "agnostic": Repair(lambda known: AgnosticRep(known.classifier, budget=0.01).fit(known.clean)),
}
"""Adding a repair is adding a line. Without a hint, on a clean model, the paper's takes "local" for right."""
