"""Change of role: how far two descriptions of a component are apart (docs/method.md, section 4, last bullet but one).

The paper compares clean and triggered descriptions by eye, its second limitation. Here are numbers, each with a bootstrap
interval. Resampled is always the side that is described (texts, or images where terms are given); the side that describes
stays whole, because resampled spans shrink, and the interval of two shrunken spans would miss the value it is meant for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_count
from decompclip.decomposition.maps import one_thread
from decompclip.display import Result
from decompclip.intervals import CONFIDENCE, Z, t_for

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


EXACT = 1e-6
"""Relative size under which an axis of a span is rounding of the features."""

SIDES = ("before", "after")
SIMILARITY = "text similarity"

CHANCE_DRAWS = 200
"""Pairs of random sets of texts that give the level of chance."""


@runtime_checkable
class Described(Protocol):
    """What describes a component: texts and their features; for instance a result of TEXTSPAN."""

    @property
    def texts(self) -> Sequence[str]: ...

    @property
    def features(self) -> Float[Tensor, "text d_embed"]: ...


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % bootstrap interval, and what random texts of the pool would give."""

    value: float
    low: float
    high: float
    chance: float | None = None

    def __str__(self) -> str:
        chance = "" if self.chance is None else f", chance {self.chance:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{chance}"


@dataclass(frozen=True, eq=False, repr=False)
class RoleChange(Result):
    """How alike two descriptions are.

    Attributes:
        before, after: the texts.
        measures: by name; each is 1 where nothing changed, except measures of terms:
            "text similarity": mean cosine of each text to the nearest of the other set, both ways;
            "span overlap": mean squared cosine of the principal angles;
            "before by after", "after by before": share of the one's variance in the span of the other; of its
                terms where given, and then beside "before by before" and "after by after"; else of its texts.
        angles: principal angles between the two spans, degrees, ascending.
        cosines: of each text before to each text after.
        centred: whether the pool's mean was taken off the texts' features.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    measures: Mapping[str, Estimate]
    angles: Float[Tensor, " angle"]
    cosines: Float[Tensor, "before after"]
    centred: bool

    @property
    def similarity(self) -> Estimate:
        return self.measures[SIMILARITY]

    @property
    def overlap(self) -> Estimate:
        return self.measures["span overlap"]

    @property
    def shared(self) -> tuple[str, ...]:
        """Texts that stand in both."""
        return tuple(text for text in self.before if text in self.after)

    def to_frame(self) -> pd.DataFrame:
        """One row a measure."""
        import pandas as pd

        rows = [
            {"measure": name, "value": e.value, "low": e.low, "high": e.high, "chance": e.chance}
            for name, e in self.measures.items()
        ]
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """The measures with their intervals, and the cosines text by text."""
        from decompclip.figures.heatmaps import text_cosines
        from decompclip.figures.scatter import Point

        points = {name: Point(e.value, e.low, e.high, str(e)) for name, e in self.measures.items()}
        chance = {name: e.chance for name, e in self.measures.items() if e.chance is not None}
        return text_cosines(points, chance, self.cosines, self.before, self.after)

    def __repr__(self) -> str:
        return (
            f"RoleChange(similarity {self.similarity}; overlap {self.overlap}; {len(self.shared)} of "
            f"{len(self.before)} texts kept)"
        )


def role_change(
    before: Described,
    after: Described,
    *,
    pool: Float[Tensor, "pool d_embed"] | None = None,
    terms: tuple[Float[Tensor, "before d_embed"], Float[Tensor, "after d_embed"]] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> RoleChange:
    """Compare what describes a component on two sets of images.

    Args:
        before: texts and their features, for instance its TEXTSPAN on clean images.
        after: the same on triggered images.
        pool: features of the texts that both were picked from. Their mean, which all of CLIP's text features
            share and which makes everything alike, is taken off; random sets of them give the level of chance.
        terms: the component's terms on the two sets of images; their variance is then what is explained.
        draws: of the bootstrap.
        seed: of the bootstrap, and of the random sets.

    Returns:
        How alike the two descriptions are, by several measures.

    Raises:
        ValueError: a description without texts, features that are not one for each text or of another width, a
            feature of zero length, fewer than one draw, or fewer than two images.
    """
    check_count(draws, "draws", "draws")
    raw = _features(before, "before"), _features(after, "after")
    for other, name in ((raw[1], "after"), (pool, "pool"), *((x, "terms") for x in terms or ())):
        if other is not None and (other.ndim != 2 or other.shape[1] != raw[0].shape[1]):
            raise ValueError(
                f"expected {name} of width {raw[0].shape[1]}, as the features before; received "
                f"{list(other.shape)}; take all from one model"
            )
    generator = torch.Generator().manual_seed(seed)
    wide = None if pool is None else pool.detach().cpu().double()
    mean = torch.zeros(()) if wide is None else F.normalize(wide, dim=-1).mean(0)
    A, B = _unit(raw[0] - mean), _unit(raw[1] - mean)
    i, j = (torch.randint(len(x), (draws, len(x)), generator=generator) for x in (A, B))

    def of_texts(a: Float[Tensor, " before"], b: Float[Tensor, " after"]) -> tuple[Tensor, Tensor]:
        # Both ways share their cosines: errors add as if wholly dependent, or the interval would be too narrow.
        drawn = a[i].mean(1).sort().values + b[j].mean(1).sort().values
        return (a.mean() + b.mean()) / 2, drawn / 2

    samples = terms and (_centred(terms[0]), _centred(terms[1]))
    means, shares = _rows(raw, (A, B), samples)
    found = {name: of_texts(*pair) for name, pair in means.items()}
    found |= {name: _resampled(*pair, draws, generator) for name, pair in shares.items()}
    # Of what is resampled.
    counts = dict.fromkeys(means, min(len(A), len(B))) | {name: len(x) for name, (x, _) in shares.items()}
    chance: dict[str, float] = {}
    if wide is not None:
        chance = _chance(F.normalize(wide, dim=-1), mean, samples, (len(A), len(B)), generator)
    angles = torch.from_numpy(subspace_angles(A.T.numpy(), B.T.numpy()).copy()).flip(0).rad2deg()
    return RoleChange(
        before=tuple(before.texts),
        after=tuple(after.texts),
        measures={
            name: _estimate(name, *pair, counts[name], chance.get(name)) for name, pair in found.items()
        },
        angles=angles,
        cosines=A @ B.T,
        centred=pool is not None,
    )


def _features(side: Described, name: str) -> Float[Tensor, "text d_embed"]:
    x = side.features.detach().cpu().double()
    if isinstance(side.texts, str) or not len(side.texts) or len(x) != len(side.texts):
        raise ValueError(
            f"expected a list of texts and one feature for each; received {len(side.texts)} texts and "
            f"{len(x)} features {name}; encode the texts with model.encode_text"
        )
    return _unit(x)


def _unit(x: Float[Tensor, "text d_embed"]) -> Float[Tensor, "text d_embed"]:
    lengths = x.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ValueError(
            "expected features of some length; received one of length zero, or not a number; a pool of a single "
            "text leaves nothing: give the whole pool"
        )
    return x / lengths


Pair = tuple[Tensor, Tensor]
"""Of what is before, and of what is after."""


def _rows(raw: Pair, texts: Pair, terms: Pair | None) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """What the measures are made of, row by row.

    Args:
        raw: unit features of the texts.
        texts: the same past the pool's mean.
        terms: about their means, where given.

    Returns:
        Numbers of the texts before and after, whose two means are averaged; and squares of rows in all directions and in
        those of a span, whose sums are divided.
    """
    A, B = texts
    bases = _basis(A), _basis(B)
    cosines = A @ B.T
    means = {SIMILARITY: (cosines.amax(1), cosines.amax(0)), "span overlap": _overlap(texts, bases)}
    # Terms are explained by texts as they are, other texts past the pool's mean.
    spans = (_basis(raw[0]), _basis(raw[1])) if terms else bases
    shares: dict[str, Pair] = {}
    for side, x in zip(SIDES, terms or texts, strict=True):
        whole = x.square()
        for other, basis in zip(SIDES, spans, strict=True):
            if side != other or terms:
                shares[f"{side} by {other}"] = whole, (x @ basis).square()
    return means, shares


def _basis(x: Float[Tensor, "text d_embed"]) -> Float[Tensor, "d_embed axis"]:
    """Orthonormal axes of the span."""
    with one_thread():
        U, S, _ = torch.linalg.svd(x.T, full_matrices=False)
    return U[:, S / S[0] > EXACT]


def _overlap(texts: Pair, bases: Pair) -> Pair:
    """Mean squared cosine of the principal angles, text by text: either side's mean is that of the spans.

    `tr(P_A P_B) = sum_i (A P_B A^+)_ii`, a sum over the texts of A: their contributions can be resampled where
    resampled spans, of fewer texts, would overlap more.
    """
    (A, B), (a, b) = texts, bases
    with one_thread():
        inverse, other = (torch.linalg.pinv(x, rtol=EXACT).T for x in (A, B))
    shares, others = (A * (inverse @ b @ b.T)).sum(1), (B * (other @ a @ a.T)).sum(1)
    return shares * len(A) / a.shape[1], others * len(B) / b.shape[1]


def _resampled(
    whole: Float[Tensor, "row d_embed"],
    inside: Float[Tensor, "row axis"],
    draws: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], Float[Tensor, " draw"]]:
    """Share of the rows' squared length inside a span; and of resampled rows."""
    whole, inside = whole.sum(1), inside.sum(1)
    n = len(whole)
    picks = torch.randint(n, (draws, n), generator=generator)
    weights = whole.new_zeros(draws, n).scatter_add_(1, picks, whole.new_ones(draws, n))
    return inside.sum() / whole.sum(), (weights @ inside) / (weights @ whole)


def _centred(terms: Float[Tensor, "image d_embed"]) -> Float[Tensor, "image d_embed"]:
    if len(terms) < 2:
        raise ValueError(f"expected terms of at least two images; received {len(terms)}; add images")
    x = terms.detach().cpu().double()
    return x - x.mean(0)


def _chance(
    pool: Float[Tensor, "pool d_embed"],
    mean: Tensor,
    terms: Pair | None,
    sizes: tuple[int, int],
    generator: torch.Generator,
) -> dict[str, float]:
    """Means over random sets of so many texts."""
    values: dict[str, list[Tensor]] = {}
    for _ in range(CHANCE_DRAWS):
        p, q = (pool[torch.randperm(len(pool), generator=generator)[:size]] for size in sizes)
        means, shares = _rows((p, q), (_unit(p - mean), _unit(q - mean)), terms)
        drawn = {name: (x.mean() + y.mean()) / 2 for name, (x, y) in means.items()}
        drawn |= {name: inside.sum() / whole.sum() for name, (whole, inside) in shares.items()}
        for name, value in drawn.items():
            values.setdefault(name, []).append(value)
    return {name: float(torch.stack(found).mean()) for name, found in values.items()}


def _estimate(name: str, value: Tensor, drawn: Tensor, count: int, chance: float | None) -> Estimate:
    """Percentiles of the resampled values, spread as far as so few texts or images ask for.

    A bootstrap's own spread is that of `count` values divided by `count`, and normal: both too small a correction for
    few (Hesterberg, 2015), so that without it ten texts' 95 % are 90.
    """
    least = -1.0 if name == SIMILARITY else 0.0
    if count < 2:
        # One text, or image, does not show how much they differ.
        return Estimate(float(value), least, 1.0, chance)
    tail = (1 - CONFIDENCE) / 2
    wider = t_for(count) / Z * math.sqrt(count / (count - 1))
    spread = value + wider * (drawn - value)
    low, high = torch.quantile(spread, spread.new_tensor([tail, 1 - tail])).clamp(least, 1).tolist()
    return Estimate(float(value), low, high, chance)
