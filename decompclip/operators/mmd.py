"""Maximum mean discrepancy (MMD) of components' terms on two sets of images (docs/method.md, section 4; paper, figures 3 and 8d).

Squared MMD (Gretton et al., JMLR 2012) of the observed sets and of many relabelled ones at once, block by block of the
kernel matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control
from torch import Tensor

from decompclip.api import check_choice, renamed
from decompclip.decomposition.components import Components, heads, mlps
from decompclip.decomposition.decomposition import Decomposition, check_alike
from decompclip.operators.parts import ByPart, Part, Points

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def labellings(
    n: int, m: int, permutations: int, paired: bool, generator: torch.Generator
) -> Bool[Tensor, "image labelling"]:
    """Which images count as the first set: as they are, then relabelled."""
    labels = torch.zeros(n + m, permutations + 1, dtype=torch.bool)
    labels[:n, 0] = True
    if paired:
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
    paired: bool,
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
            if paired and unbiased:  # image i belongs to image n + i
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
    pairs = n * (n - 1) if paired else n * m
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / pairs, size


def _squared_distances(x: Float[Tensor, "a point"], y: Float[Tensor, "b point"]) -> Float[Tensor, "a b"]:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min_(0)


Kernel = Literal["unbiased", "paper"]
Batches = Decomposition | Iterable[Decomposition]

PAPER_BANDWIDTH, PAPER_SCALE = 10.0, 1000.0
MEDIAN_OF = 1000
"""Images among which the median distance is taken."""

RATE = 0.05
"""The false discovery rate that the number of permutations is made for."""

FIRST, ENOUGH = 999, 100
"""A part of which so many of the first relabellings are as large is judged by these alone: p > 0.1 already."""


@dataclass(frozen=True, eq=False, repr=False)
class MMD(ByPart):
    """How far apart two sets of images are in the terms of each component.

    Attributes:
        parts: single heads and MLPs, or (`layer_mmd`) all heads of each layer and the MLPs.
        values: squared MMD; with the paper's kernel biased and times 1000, else unbiased (so that it can fall
            below zero).
        p_values: share of relabelled samples with a value as large, the observed one counted, one where both sets are
            the same images; None without permutations. Not below 1 / (permutations + 1).
        adjusted: Benjamini and Hochberg's p-values, over the parts; see `least_adjusted`.
        bandwidths: of the Gaussian kernel.
        counts: images of either set.
        paired: whether image i of the one set belongs to image i of the other.
    """

    parts: tuple[Part, ...]
    values: Float[Tensor, " part"]
    p_values: Float[Tensor, " part"] | None
    adjusted: Float[Tensor, " part"] | None
    bandwidths: Float[Tensor, " part"]
    kernel: Kernel
    counts: tuple[int, int]
    permutations: int
    paired: bool
    seed: int
    n_layers: int
    n_heads: int

    largest = "mmd"

    @property
    def heads(self) -> Float[Tensor, "layer head"]:
        """Values of single heads; nan where not measured."""
        return self._grid(self.values)[0]

    @property
    def mlps(self) -> Float[Tensor, " layer"]:
        """Values of the MLPs; nan where not measured."""
        return self._grid(self.values)[1]

    def __getitem__(self, part: Part | str) -> float:
        """The value of a part, by its name: `mmd["heads[5, 2]"]`.

        Raises:
            KeyError: it was not measured.
        """
        return float(self.values[self._at(part)])

    @property
    def least_adjusted(self) -> float:
        """The smallest adjusted p-value of a part that differs alone: `parts / (permutations + 1)`, at most one.

        Above the rate asked for, no single part can be significant, however far it moved. nan without p-values.
        """
        return min(1.0, len(self) / (self.permutations + 1)) if self.permutations else math.nan

    def significant(self, rate: float = RATE) -> tuple[Part, ...]:
        """Parts that differ, with a false discovery rate of at most `rate`; the largest value first.

        Raises:
            ValueError: there are no p-values.
        """
        if self.adjusted is None:
            raise ValueError(
                "expected p-values to choose by; received a result without; compute it with permutations=999"
            )
        order = self.values.argsort(descending=True).tolist()
        return tuple(self.parts[i] for i in order if self.adjusted[i] <= rate)

    def to_frame(self) -> pd.DataFrame:
        """One row a part."""
        columns = {"mmd": self.values, "bandwidth": self.bandwidths}
        if self.p_values is not None:
            assert self.adjusted is not None
            columns |= {"p": self.p_values, "p_adjusted": self.adjusted}
        return self._frame(**columns)

    def figure(self) -> go.Figure:
        """A heat map, layers by heads with the MLPs beside; of whole layers, two curves."""
        if any(p.kind == "heads" and p.head is None for p in self.parts):
            return self._curves()
        from decompclip.figures.heatmaps import component_map

        shown: dict[str, Any] = {}
        if self.adjusted is not None:
            heads_p, mlps_p = self._grid(self.adjusted)
            dots = heads_p <= RATE, mlps_p <= RATE
            shown = {"heads_note": heads_p, "mlps_note": mlps_p, "note": "adjusted p", "dots": dots}
            shown["dots_name"] = f"beyond chance (false discovery rate {RATE:.0%})"
        return component_map(
            self.heads,
            self.mlps,
            unit=self._unit,
            scale="sequential",
            **shown,
        )

    def _curves(self) -> go.Figure:
        """Of whole layers: heads and MLPs over depth; filled where the difference is beyond chance."""
        from decompclip.figures.curves import Curve, LinePanel, line_panels

        curves = {}
        for kind, name in (("heads", "all heads of the layer"), ("mlps", "MLP")):
            rows = [i for i, part in enumerate(self.parts) if part.kind == kind]
            hollow = None if self.adjusted is None else (self.adjusted[rows] > RATE).tolist()
            layers = [float(self.parts[i].layer or 0) for i in rows]
            curves[name] = Curve(layers, self.values[rows].tolist(), hollow=hollow)
        low, high = float(self.values.min()), float(self.values.max())
        ends = min(0.0, 1.1 * low), max(1.08 * high, 1e-9)
        return line_panels([LinePanel("", "layer", self._unit, curves, ends=ends, whole=True)], columns=1)

    @property
    def _unit(self) -> str:
        return "MMD² × 1000 (paper's kernel)" if self.kernel == "paper" else "MMD² (unbiased)"

    def __repr__(self) -> str:
        tested = "no p-values"
        if self.permutations:
            least = f"{self.least_adjusted:.3g}"
            tested = f"{self.permutations} permutations, adjusted p of a part alone at least {least}"
        images = "paired images" if self.paired else "images"
        return f"MMD({len(self)} parts, {self.kernel} kernel, {self.counts[0]} and {self.counts[1]} {images}, {tested})"


@renamed(twins="paired")
def head_mmd(
    a: Batches,
    b: Batches,
    *,
    components: Components | None = heads | mlps,
    kernel: Kernel = "unbiased",
    permutations: int | None = None,
    paired: bool = False,
    block: int = 1024,
    seed: int = 0,
) -> MMD:
    """Squared MMD between the terms of each single component on two sets of images.

    Pairs of images are gone through in blocks, so that memory is O(block^2) beside the points themselves: of a
    stream, the asked-for components' coordinates are kept (d_head numbers a head and image), no terms.

    Args:
        a: a decomposition, or a stream of batches, for instance of clean images.
        b: the same of the others, for instance of triggered images.
        components: which; by default all heads and all MLPs. None: as `layer_mmd`.
        kernel: "unbiased": U-statistic, Gaussian kernel as wide as the median distance between images;
            "paper": V-statistic, bandwidth 10, times 1000, which on terms this small is ten times the squared
            distance of the means.
        permutations: relabellings for the p-values, the same for every component; 0 for none. To find one of k components
            that differs alone, at a rate of 5 %, takes 20 k of them; by default so many, and at least 999. A component
            whose p-value is above 0.1 after 999 gets no more, which can only cost it significance: the test stays valid.
        paired: image i of `a` and of `b` are one image, but for the trigger. Paired images are not independent: labels
            are then swapped within pairs only, and pairs left out of the unbiased estimate.
        block: images a side of a block.
        seed: of the relabellings, and of the images among which the median is taken, past 1000.

    Returns:
        The squared MMD of each component, with its p-value.

    Raises:
        IndexError: a component that the tower does not have.
        TypeError: a stream of something else.
        ValueError: an unknown kernel, fewer than two images a side, paired images that are not as many, or terms that are
            not finite or of different models or options.
    """
    check_choice("kernel", kernel, Kernel)
    if (permutations is not None and permutations < 0) or block < 1:
        raise ValueError(
            f"expected permutations of at least 0 and a block of at least 1; received permutations={permutations}, "
            f"block={block}"
        )
    one, two = Points.of(a, components), Points.of(b, components)
    check_alike(one, two)
    n, m = len(one), len(two)
    if min(n, m) < 2:
        raise ValueError(f"expected at least two images a side; received {n} and {m}; add images")
    if paired and n != m:
        raise ValueError(
            f"expected paired images, as many on either side; received {n} and {m}; leave out images that have no "
            "partner, or pass paired=False"
        )
    if permutations is None:
        permutations = max(FIRST, math.ceil(len(one.parts) / RATE))
    generator = torch.Generator().manual_seed(seed)
    labels = labellings(n, m, permutations, paired, generator)
    first, rest = labels[:, : FIRST + 1], labels[:, FIRST + 1 :]
    subset = torch.randperm(n + m, generator=generator)[:MEDIAN_OF]
    values, p_values, bandwidths = [], [], []
    for index in range(len(one.parts)):
        points = torch.cat([one[index].cpu(), two[index].cpu()]).double()
        points = points - points.mean(0)  # distances stay, and lose fewer digits
        sigma = PAPER_BANDWIDTH if kernel == "paper" else median_distance(points[subset])
        options = (sigma, n, kernel == "unbiased", paired, block)
        found, size = statistics(points, first, *options)
        if rest.numel() and _as_large(found, size) <= ENOUGH:
            found = torch.cat([found, statistics(points, rest, *options)[0]])
        values.append(found[0] * (PAPER_SCALE if kernel == "paper" else 1))
        p_values.append(_as_large(found, size) / len(found))
        bandwidths.append(sigma)
    p = torch.tensor(p_values, dtype=torch.float64) if permutations else None
    return MMD(
        parts=one.parts,
        values=torch.stack(values),
        p_values=p,
        adjusted=None if p is None else torch.from_numpy(false_discovery_control(p.numpy())),
        bandwidths=torch.tensor(bandwidths, dtype=torch.float64),
        kernel=kernel,
        counts=(n, m),
        permutations=permutations,
        paired=paired,
        seed=seed,
        n_layers=one.maps.heads.shape[0],
        n_heads=one.maps.heads.shape[1],
    )


@renamed(twins="paired")
def layer_mmd(
    a: Batches,
    b: Batches,
    *,
    kernel: Kernel = "unbiased",
    permutations: int | None = None,
    paired: bool = False,
    block: int = 1024,
    seed: int = 0,
) -> MMD:
    """Squared MMD of the heads of each layer together, and of each layer's MLP (paper, figure 8d).

    `head_mmd` describes the arguments in full, and the errors.

    Args:
        a: a decomposition, or a stream of batches.
        b: the same of the others.
        kernel: "unbiased" or "paper".
        permutations: relabellings for the p-values.
        paired: image i of `a` and of `b` are one image, but for the trigger.
        block: images a side of a block.
        seed: of the relabellings.
    """
    return head_mmd(
        a, b, components=None, kernel=kernel, permutations=permutations, paired=paired, block=block, seed=seed
    )


def _as_large(found: Float[Tensor, " labelling"], size: Float[Tensor, ""]) -> int:
    """How many values are as large as the first, which is the observed one, itself counted.

    Args:
        size: of an entry of the kernel matrix. Values that differ by a 10^12th of it are ties, apart by rounding
            alone: all of them where both sets are the same images, and p is then one.
    """
    return int((found >= found[0] - 1e-12 * size).sum())
