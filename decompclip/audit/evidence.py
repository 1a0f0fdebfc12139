"""Where suspect images differ: the difference of every component's mean, and its pull toward the target.

What a verdict stands on: the class that suspect images go to, by how much, and what else could explain it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.audit.checks import Change, Checks, Setting
from decompclip.audit.controls import Controls
from decompclip.audit.shares import ClassShare
from decompclip.decomposition.decomposition import Decomposition
from decompclip.intervals import Z


@dataclass(frozen=True)
class Shift:
    """Difference of a component's mean between suspect and clean images, in units of the feature's norm.

    Attributes:
        *_distance: norm of the difference of the mean terms.
        *_floor: norm to expect from sampling alone, were the means equal.
        *_push: its part along (target text - mean of the other classes' texts), where positive pulls
            suspect images toward the target; *_push_error: half-width of its 95 % interval.
        paired: whether differences were taken between twins.
    """

    heads_distance: Float[Tensor, "layer head"]
    heads_floor: Float[Tensor, "layer head"]
    heads_push: Float[Tensor, "layer head"]
    heads_push_error: Float[Tensor, "layer head"]
    mlps_distance: Float[Tensor, " layer"]
    mlps_floor: Float[Tensor, " layer"]
    mlps_push: Float[Tensor, " layer"]
    mlps_push_error: Float[Tensor, " layer"]
    totals: dict[str, tuple[float, float]]  # "all", "heads", "mlps", "rest": push and half-width
    paired: bool


@dataclass(frozen=True)
class _Difference:
    """Difference of two means of `[batch, *component, r]` with the covariance of its estimate's error."""

    mean: Float[Tensor, "*component r"]
    error: Float[Tensor, "*component r r"]

    @classmethod
    def of(cls, clean: Tensor, suspect: Tensor, *, twins: bool) -> _Difference:
        clean, suspect = clean.double(), suspect.double()
        if twins:
            return cls((suspect - clean).mean(0), _error(suspect - clean))
        return cls(suspect.mean(0) - clean.mean(0), _error(suspect) + _error(clean))


def _error(samples: Float[Tensor, "batch *component r"]) -> Float[Tensor, "*component r r"]:
    """Covariance of the mean: that of the samples over their number; nan for a single sample, unknown."""
    n, centred = len(samples), samples - samples.mean(0)
    spread = torch.einsum("b...r,b...s->...rs", centred, centred)
    return spread / (n * (n - 1)) if n > 1 else torch.full_like(spread, torch.nan)


def shift(
    clean: Decomposition, suspect: Decomposition, toward: Float[Tensor, " d_embed"], *, twins: bool
) -> Shift:
    """Compare the mean terms of two sets of images, in head coordinates (docs/method.md, section 4).

    Args:
        toward: direction of the joint space whose share of each difference is told; for instance the target's
            text feature minus the mean of the others'.
        twins: image `i` of the one set is image `i` of the other but for the trigger: what all images have in
            common with their twins cancels, and the intervals shrink.
    """
    toward = toward.double()
    maps = clean.maps.heads.double()  # [layer head r d_embed]
    heads = _Difference.of(clean.coords, suspect.coords, twins=twins)
    along = maps @ toward
    terms = torch.einsum("lhr,lhrd->lhd", heads.mean, maps)
    mlps_push, mlps_error = _along(clean.mlps @ toward.float(), suspect.mlps @ toward.float(), twins=twins)
    mlps_distance, mlps_floor = _spread(clean.mlps, suspect.mlps, twins=twins)

    pairs = {
        "all": [d.features @ toward.float() for d in (clean, suspect)],
        "heads": [torch.einsum("blhr,lhr->b", d.coords, along.float()) for d in (clean, suspect)],
        "mlps": [d.mlps.sum(1) @ toward.float() for d in (clean, suspect)],
    }
    pairs["rest"] = [whole - h - m for whole, h, m in zip(*pairs.values(), strict=True)]
    totals = {name: _along(*pair, twins=twins) for name, pair in pairs.items()}
    return Shift(
        heads_distance=terms.norm(dim=-1),
        heads_floor=(heads.error * clean.maps.grams.double()).sum((-2, -1)).clamp_min(0).sqrt(),
        heads_push=(heads.mean * along).sum(-1),
        heads_push_error=Z * torch.einsum("lhr,lhrs,lhs->lh", along, heads.error, along).clamp_min(0).sqrt(),
        mlps_distance=mlps_distance,
        mlps_floor=mlps_floor,
        mlps_push=mlps_push,
        mlps_push_error=mlps_error,
        totals={name: (float(push), float(error)) for name, (push, error) in totals.items()},
        paired=twins,
    )


def _along(clean: Tensor, suspect: Tensor, *, twins: bool) -> tuple[Tensor, Tensor]:
    """Difference of the means of `[batch, ...]` numbers, and the half-width of its 95 % interval."""
    difference = _Difference.of(clean[..., None], suspect[..., None], twins=twins)
    return difference.mean[..., 0], Z * difference.error[..., 0, 0].sqrt()


def _spread(
    clean: Float[Tensor, "batch layer d_embed"], suspect: Float[Tensor, "batch layer d_embed"], *, twins: bool
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """Norm of the difference of means, and the norm to expect from sampling alone."""
    mean, error = _along(clean, suspect, twins=twins)
    return mean.norm(dim=-1), (error / Z).norm(dim=-1)


@dataclass(frozen=True)
class Target:
    """The class that the audit takes for the attacker's, and how it came to that."""

    index: int
    name: str
    inferred: bool
    over_prediction: tuple[float, float, float] | None  # value, low, high on the images it was inferred from
    images: int  # suspect images it was inferred from
    asked: str | None = None  # the class that was asked for, where suspect images go to this one instead


@dataclass(frozen=True)
class Reference:
    """A clean model on the same images.

    Attributes:
        setting: toward the audited model's target.
        most: the class, whichever it is, that it takes suspect images for more often than clean ones by the most.
    """

    name: str
    setting: Setting
    most: ClassShare


@dataclass(frozen=True)
class Repair:
    """One way of repairing, scored on the same images.

    Attributes:
        setting: the model repaired so.
        change: what that does image by image, beside the model as it is.
        flagged_clean, flagged_suspect: heads of the last layer replaced in a mean image; None where a repair does
            not choose heads.
    """

    setting: Setting
    change: Change
    flagged_clean: float | None = None
    flagged_suspect: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What a verdict stands on."""

    name: str
    class_names: tuple[str, ...]
    counts: dict[str, int]
    target: Target
    twins: bool
    as_it_is: Setting
    class_shares: tuple[ClassShare, ...]  # the over-predicted first
    checks: Checks
    controls: Controls | None = None
    reference: Reference | None = None
    repairs: tuple[Repair, ...] = ()
