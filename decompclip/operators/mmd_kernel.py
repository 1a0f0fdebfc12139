"""Squared MMD of many labellings at once, in blocks of the kernel matrix (Gretton et al., JMLR 2012)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def labellings(
    n: int, m: int, permutations: int, twins: bool, generator: torch.Generator
) -> Bool[Tensor, "image labelling"]:
    """Which images count as the first set: as they are, then relabelled."""
    labels = torch.zeros(n + m, permutations + 1, dtype=torch.bool)
    labels[:n, 0] = True
    if twins:
        kept = torch.rand(n, permutations, generator=generator) < 0.5
        labels[:, 1:] = torch.cat([kept, ~kept])
        return labels
    for column in range(1, permutations + 1):
        labels[torch.randperm(n + m, generator=generator)[:n], column] = True
    return labels


def median_distance(points: Float[Tensor, "image point"]) -> float:
    """Over pairs; the mean distance where more than half of the pairs coincide, and one where all do."""
    distances = torch.nn.functional.pdist(points)
    for sigma in (float(distances.median()), float(distances.mean())):
        if sigma > 0:
            return sigma
    return 1.0


def statistics(
    points: Float[Tensor, "image point"],
    labels: Bool[Tensor, "image labelling"],
    sigma: float,
    n: int,
    unbiased: bool,
    twins: bool,
    block: int,
) -> tuple[Float[Tensor, " labelling"], Float[Tensor, ""]]:
    """Squared MMD of every labelling, from blocks of `E = kernel - 1`; and the mean size of an entry of E.

    With `s` the first set's indicator, `s' E s`, `s' E 1` and `1' E 1` give all three sums of pairs. The ones
    cancel in the MMD, and without them nothing is lost where the kernel is nearly one. E has a zero diagonal.
    """
    m = len(points) - n
    starts = range(0, len(points), block)
    blocks = list(zip(points.split(block), labels.split(block), starts, strict=True))
    within, toward_all = points.new_zeros(labels.shape[1]), points.new_zeros(labels.shape[1])
    total = points.new_zeros(())
    for i, (x, s, start) in enumerate(blocks):
        for y, t, other in blocks[i:]:
            E = torch.expm1(_squared_distances(x, y) / (-2 * sigma**2))
            if start == other:
                E.fill_diagonal_(0)
            if twins and unbiased:  # image i is the twin of image n + i
                for offset in {start + n - other, start - n - other}:
                    if -len(x) < offset < len(y):
                        E.diagonal(offset).zero_()
            fold = 1 if start == other else 2  # off the diagonal a block stands for its mirror too
            s_, t_ = s.to(E), t.to(E)
            within += fold * (s_ * (E @ t_)).sum(0)
            toward_all += E.sum(1) @ s_ + (E.sum(0) @ t_ if fold == 2 else 0)
            total += fold * E.sum()
    size = total.abs() / len(points) ** 2  # no entry is above zero
    between, rest = toward_all - within, total - 2 * toward_all + within
    if not unbiased:
        return within / n**2 + rest / m**2 - 2 * between / (n * m), size
    pairs = n * (n - 1) if twins else n * m
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / pairs, size


def _squared_distances(x: Float[Tensor, "a point"], y: Float[Tensor, "b point"]) -> Float[Tensor, "a b"]:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min_(0)
