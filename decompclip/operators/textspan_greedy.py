"""The greedy choice of TEXTSPAN, from moments alone (Gandelsman et al., ICLR 2024, algorithm 1; METHOD 4).

The algorithm sees a component's terms C [image d_embed] only through products of texts with their spread:
`std(C t)^2 = t Sigma t`. So it runs on `Sigma` in an orthonormal frame of the subspace that the texts are projected on,
where a head has d_head numbers for d_embed. Removing a direction u from C and from all texts leaves `Sigma` as it is
for texts that are already without u; the scores follow by a rank-one update:

    t' = t - (t u) u        t' Sigma t' = t Sigma t - 2 (t u) (t Sigma u) + (t u)^2 (u Sigma u)

Two products of the texts with a vector a pick, for all components at once; nothing grows with the number of images.
All in fp64: fp32 would flip picks that are nearly equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.cache.threads import one_thread

TIE = 1e-9
"""Scores that differ by less, as a share of the largest, are equal: the text that stands first is picked."""

FLOOR = 1e-13
"""Scores below this share of the first pick's are rounding."""


@dataclass(frozen=True, eq=False)
class Terms:
    """Moments of the terms of some components of one kind, fp64.

    Attributes:
        second: mean outer product of the coordinates.
        covariance: the same about the mean.
        maps: from coordinates to the joint space; None where the coordinates are the terms.
    """

    second: Float[Tensor, "component coord coord"]
    covariance: Float[Tensor, "component coord coord"]
    maps: Float[Tensor, "component coord d_embed"] | None = None


@dataclass(frozen=True, eq=False)
class Frame:
    """Orthonormal directions that texts are projected on, by falling second moment, and the spread along them.

    Attributes:
        basis: past a component's rank its rows are zero.
        covariance: of the terms, in the frame.
        rank: number of directions in use.
        total: variance of the terms, in and out of the frame.
    """

    basis: Float[Tensor, "component direction d_embed"]
    covariance: Float[Tensor, "component direction direction"]
    rank: Int[Tensor, " component"]
    total: Float[Tensor, " component"]


@dataclass(frozen=True, eq=False)
class Picks:
    """What the greedy choice gives.

    Attributes:
        texts: numbers of the texts in the order of the picks; -1 once there is nothing left to explain.
        directions: unit vectors, orthogonal to each other, that the picks add; zero where there is no pick.
        explained: share of the total variance along the directions so far.
    """

    texts: Int[Tensor, "component pick"]
    directions: Float[Tensor, "component pick d_embed"]
    explained: Float[Tensor, "component pick"]


def frame(
    terms: Terms,
    *,
    limit: int | None,
    centred: bool,
    tolerance: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Frame:
    """The span of the top right singular vectors of the terms.

    Args:
        limit: at most so many; None: the true rank.
        centred: of the terms about their mean; the published algorithm takes them as they are.
        tolerance: share of the largest singular value that one must surpass to count; None: numpy's rule for a
            matrix in the precision of the terms. Under what the moments' own rounding leaves nothing counts.
        dtype: precision of the terms behind the moments.
    """
    second, covariance, maps = terms.second, terms.covariance, terms.maps
    start = None
    if maps is not None and maps.shape[1] < maps.shape[2]:
        with one_thread():
            start, triangle = torch.linalg.qr(maps.mT)  # terms = coords triangle^T start^T
        second, covariance = (triangle @ moment @ triangle.mT for moment in (second, covariance))
    elif maps is not None:
        second, covariance = (maps.mT @ moment @ maps for moment in (second, covariance))
    with one_thread():
        values, vectors = torch.linalg.eigh(covariance if centred else second)
    values, vectors = values.flip(-1), vectors.flip(-1)
    width = vectors.shape[1] if maps is None else maps.shape[2]
    if tolerance is None:
        tolerance = width * torch.finfo(dtype).eps
    own = width * torch.finfo(torch.float64).eps  # singular values in squares, as the moments have them
    used = (values > values[:, :1] * max(tolerance**2, own)) & (values > 0)
    if limit is not None:
        used[:, limit:] = False
    rank = used.sum(1)
    vectors = (vectors * used[:, None])[:, :, : max(1, int(rank.max()))]
    return Frame(
        basis=vectors.mT if start is None else vectors.mT @ start.mT,
        covariance=vectors.mT @ covariance @ vectors,
        rank=rank,
        total=covariance.diagonal(dim1=1, dim2=2).sum(1),
    )


def pick(frame: Frame, texts: Float[Tensor, "text d_embed"], n_texts: int) -> Picks:
    """Again and again the text along whose projection the terms vary most, and its direction removed."""
    projected = torch.einsum("td,cfd->ctf", texts.double(), frame.basis)
    spread = frame.covariance
    scores = ((projected @ spread) * projected).sum(-1)  # component text
    first = scores.amax(1, keepdim=True)
    components, width = torch.arange(len(scores), device=scores.device), spread.shape[-1]
    found = torch.full((len(scores), n_texts), -1, device=scores.device)
    chain = projected.new_zeros(len(scores), n_texts, width)
    explained = projected.new_zeros(len(scores), n_texts)
    for step in range(min(n_texts, width)):
        best = scores.amax(1, keepdim=True)
        going = ((best > FLOOR * first)[:, 0]) & (frame.rank > step)
        if not going.any():
            break
        chosen = (scores >= best * (1 - TIE) - FLOOR * first).int().argmax(1)  # the first of equals
        found[:, step] = torch.where(going, chosen, -1)
        past = chain[:, :step]
        direction = _without(
            _without(projected[components, chosen], past), past
        )  # twice: orthogonal to rounding
        length = direction.norm(dim=1, keepdim=True)
        direction = torch.where(going[:, None] & (length > 0), direction / length, 0.0)
        chain[:, step] = direction
        swayed = torch.einsum("cfg,cg->cf", spread, direction)
        variance = (direction * swayed).sum(1)
        explained[:, step] = variance
        pair = torch.stack([direction, _without(swayed, past)], dim=-1)
        along, crossed = (projected @ pair).unbind(-1)
        scores = scores - 2 * along * crossed + along.square() * variance[:, None]
    total = torch.where(frame.total > 0, frame.total, 1.0)
    return Picks(found, chain @ frame.basis, explained.cumsum(1) / total[:, None])


def _without(
    x: Float[Tensor, "component direction"], chain: Float[Tensor, "component pick direction"]
) -> Float[Tensor, "component direction"]:
    """What is left of x past its share in orthonormal rows."""
    return x - torch.einsum("cpf,cp->cf", chain, torch.einsum("cpf,cf->cp", chain, x))
