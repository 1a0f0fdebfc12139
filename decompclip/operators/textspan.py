"""TEXTSPAN: what a component contributes, in words (Gandelsman et al., ICLR 2024, algorithm 1; docs/method.md, section 4).

    textspan(model, layer, head)                  one head, on default images and texts
    textspans(model, heads[-1] | mlps[-1])        several components at once
    fit_textspans(moments, texts)                 without a model: from moments and encoded texts

Texts are projected on the span of the component's terms. Then, again and again, the text along whose projection the
terms vary most is picked, and its direction is removed from terms and texts.

The algorithm sees the terms C [image d_embed] only through products of texts with their spread: `std(C t)^2 = t Sigma t`.
So it runs on `Sigma`, in an orthonormal frame of the subspace that the texts are projected on, where a head has d_head
numbers instead of d_embed. Removing a direction u leaves `Sigma` as it is for texts that are already without u; the
scores follow by a rank-one update:

    t' = t - (t u) u        t' Sigma t' = t Sigma t - 2 (t u) (t Sigma u) + (t u)^2 (u Sigma u)

That is two products of the texts with a vector a pick, for all components at once; nothing grows with the number of
images. All in fp64: fp32 would flip picks that are nearly equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.api import check_count
from decompclip.decomposition.components import Components, heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention, one_thread, pieces, same_model, term_maps
from decompclip.decomposition.moments import Moments
from decompclip.operators.inputs import (
    Images,
    TextFeatures,
    default_images,
    encode_texts,
    image_batches,
)
from decompclip.operators.parts import Head, Part, part_at, parts_of
from decompclip.operators.scores import features_of
from decompclip.operators.textspan_result import TextSpan, TextSpans

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


TIE = 1e-9
"""Scores that differ by less, as a share of the largest, are equal: the text that stands first is picked."""

FLOOR = 1e-13
"""Scores below this share of the first pick's are rounding."""


@dataclass(frozen=True, eq=False)
class TermMoments:
    """Moments of the terms of some components of one kind, fp64.

    Attributes:
        mean: of the coordinates.
        covariance: of the coordinates.
        maps: from coordinates to the joint space; None where the coordinates are the terms.
    """

    mean: Float[Tensor, "component coord"]
    covariance: Float[Tensor, "component coord coord"]
    maps: Float[Tensor, "component coord d_embed"] | None = None

    @staticmethod
    def of(moments: Moments, parts: Sequence[Part]) -> TermMoments:
        name, places = parts[0].field, [part.place for part in parts]
        covariance, mean = moments.covariance(name), getattr(moments, name)
        maps = torch.stack([moments.maps.heads[at] for at in places]).double() if name == "coords" else None
        return TermMoments(
            torch.stack([mean[at] for at in places]), torch.stack([covariance[at] for at in places]), maps
        )

    @property
    def second(self) -> Float[Tensor, "component coord coord"]:
        """The mean outer product of the coordinates."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def wide_mean(self) -> Float[Tensor, "component d_embed"]:
        """The mean term, in the joint space."""
        return self.mean if self.maps is None else torch.einsum("cx,cxd->cd", self.mean, self.maps)


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
    terms: TermMoments,
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
    if maps is not None:
        with one_thread():
            start, triangle = torch.linalg.qr(maps.mT)  # terms = coords triangle^T start^T
        second, covariance = (triangle @ moment @ triangle.mT for moment in (second, covariance))
    with one_thread():
        values, vectors = torch.linalg.eigh(covariance if centred else second)
    values, vectors = values.flip(-1), vectors.flip(-1)
    width = terms.wide_mean.shape[1]
    if tolerance is None:
        tolerance = width * torch.finfo(dtype).eps
    own = width * torch.finfo(torch.float64).eps  # singular values in squares, as the moments have them
    used = values > values[:, :1] * max(tolerance**2, own)
    if limit is not None:
        used[:, limit:] = False
    rank = used.sum(1)
    vectors = (vectors * used[:, None])[:, :, : int(rank.max())]
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
    components, width = torch.arange(len(scores), device=scores.device), frame.basis.shape[1]
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
        # twice: orthogonal to rounding
        direction = _without(_without(projected[components, chosen], past), past)
        length = direction.norm(dim=1, keepdim=True).clamp_min(torch.finfo(direction.dtype).tiny)
        direction = torch.where(going[:, None], direction / length, 0.0)
        chain[:, step] = direction
        swayed = torch.einsum("cfg,cg->cf", spread, direction)
        variance = (direction * swayed).sum(1)
        explained[:, step] = variance
        pair = torch.stack([direction, _without(swayed, past)], dim=-1)
        along, crossed = (projected @ pair).unbind(-1)
        scores = scores - 2 * along * crossed + along.square() * variance[:, None]
    total = frame.total.clamp_min(torch.finfo(frame.total.dtype).tiny)
    return Picks(found, chain @ frame.basis, explained.cumsum(1) / total[:, None])


def _without(
    x: Float[Tensor, "component direction"], chain: Float[Tensor, "component pick direction"]
) -> Float[Tensor, "component direction"]:
    """What is left of x past its share in orthonormal rows."""
    return x - torch.einsum("cpf,cp->cf", chain, torch.einsum("cpf,cf->cp", chain, x))


Rank = int | Literal["auto", "paper"]
Data = Moments | Decomposition | Images
Texts = TextFeatures | Sequence[str] | Path

PAPER_RANK = 80
CHUNK = 2**25
"""Numbers that the projected texts of the components at work at one time may hold (256 MiB)."""


def textspan(
    model: HookedCLIP,
    layer: int,
    head: Head,
    *,
    images: Data | None = None,
    texts: Texts | None = None,
    n_texts: int = 20,
    rank: Rank = "auto",
    centred: bool = False,
    tolerance: float | None = None,
    convention: Convention = "centred",
    batch_size: int = 32,
) -> TextSpan:
    """Descriptions of one head, or of the MLP of a layer.

    Args:
        model: whose text tower and image tower are used.
        layer: its number; -1 is the last.
        head: its number, or "mlp".
        images: as the tower takes them, in one tensor or in batches; a source such as `FolderSource`; or what they left
            behind, `Moments` or a `Decomposition`. By default drawings of the Shapes world: right for the bundled
            models, a stopgap with a warning for others.
        texts: descriptions to pick from; the path of a text file with one a line; or `TextFeatures`, encoded once for
            many calls. By default the project's general pool, or for a model with a vocabulary of its own the Shapes
            pool.
        n_texts: how many to pick; fewer come back where fewer explain all there is.
        rank: dimension of the space that texts are projected on: "auto", the true rank of the terms; a number; or
            "paper", 80. Numbers past the true rank are cut to it (the published code fills them with rounding noise).
        centred: whether that space is of the terms about their mean; the published algorithm takes them as they are.
        tolerance: singular values of the terms up to this share of the largest do not count for their rank; by default
            what rounding leaves in the terms' precision (fp32, or fp64 for a model in fp64).
        convention: of the decomposition; that of `images` that were decomposed before goes first.
        batch_size: of the forward passes.

    Returns:
        The texts in the order of the picks, with the variance that they explain.

    Raises:
        IndexError: the model has no such layer or head.
        ValueError: no images or fewer than the rank needs, no texts, or moments of another model.
    """
    spans = textspans(
        model, part_at(layer, head), images=images, texts=texts, n_texts=n_texts, rank=rank, centred=centred,
        tolerance=tolerance, convention=convention, batch_size=batch_size,
    )  # fmt: skip
    return spans.spans[0]


def textspans(
    model: HookedCLIP,
    components: Components = heads | mlps,
    *,
    images: Data | None = None,
    texts: Texts | None = None,
    n_texts: int = 20,
    rank: Rank = "auto",
    centred: bool = False,
    tolerance: float | None = None,
    convention: Convention = "centred",
    batch_size: int = 32,
) -> TextSpans:
    """Descriptions of several components, from one pass over the images.

    Args:
        model: as in `textspan`; so are all other arguments but `components`.
        components: which.
        images: whose terms are described.
        texts: to pick from.
        n_texts: how many to pick.
        rank: dimension of the space that texts are projected on.
        centred: whether terms are centred for it.
        tolerance: share of the largest singular value that one must surpass to count.
        convention: of the terms.
        batch_size: images in a forward pass.

    Returns:
        One `TextSpan` a component.

    Raises:
        IndexError, ValueError: as `textspan`.
    """
    # What names nothing that is there fails before any work.
    given = images if isinstance(images, Decomposition | Moments) else model.cfg
    parts_of(components, given)
    _check_numbers(n_texts, rank, tolerance)
    if isinstance(images, Decomposition):
        images = Moments.of(images)
    if not isinstance(images, Moments):
        images = default_images(model, batch_size=batch_size) if images is None else images
        read = image_batches(images, batch_size=batch_size, device=model.device)
        batches = (batch.to(model.device, model.dtype) for batch in read)
        with torch.no_grad():
            images = Moments.fit(model, batches, convention=convention, stream=False)
    ours, theirs = term_maps(model.visual, images.maps.convention), images.maps.fingerprint
    if theirs is None or ours.fingerprint is None or not same_model(ours.fingerprint, theirs):
        images.check_model(ours)  # `decompose_pool`'s maps have another shape, though the model is the same
    return fit_textspans(
        images,
        encode_texts(model, texts),
        components,
        n_texts=n_texts,
        rank=rank,
        centred=centred,
        tolerance=tolerance,
    )


def fit_textspans(
    moments: Moments,
    texts: TextFeatures,
    components: Components = heads | mlps,
    *,
    n_texts: int = 20,
    rank: Rank = "auto",
    centred: bool = False,
    tolerance: float | None = None,
) -> TextSpans:
    """Descriptions of components from moments and encoded texts.

    Args:
        moments: of the images' terms.
        texts: to pick from.
        components: which.
        n_texts, rank, centred, tolerance: as `textspan`.

    Returns:
        One `TextSpan` a component.

    Raises:
        IndexError: the moments' tower has no such component.
        ValueError: the moments have no second moments or are of too few images, or the texts are of another width or
            were encoded by another model.
    """
    _check_numbers(n_texts, rank, tolerance)
    features, _ = features_of(texts, len(moments.embed), moments.maps.fingerprint)
    parts = parts_of(components, moments)
    limit = None if rank == "auto" else PAPER_RANK if rank == "paper" else rank
    features = features.to(moments.coords)
    spans: list[TextSpan] = []
    for chunk in _chunks(parts, moments, len(texts)):
        _check_count(moments, chunk[0], rank, limit, centred)
        terms = TermMoments.of(moments, chunk)
        space = frame(
            terms, limit=limit, centred=centred, tolerance=tolerance, dtype=moments.maps.heads.dtype
        )
        picks = pick(space, features, n_texts)
        means = terms.wide_mean
        for row, part in enumerate(chunk):
            kept = picks.texts[row] >= 0
            indices = picks.texts[row][kept].tolist()
            spans.append(
                TextSpan(
                    part,
                    tuple(texts.texts[i] for i in indices),
                    tuple(indices),
                    picks.explained[row][kept],
                    rank=int(space.rank[row]),
                    mean=means[row],
                    directions=picks.directions[row][kept],
                    features=texts.features[indices],
                    n_images=moments.count,
                )
            )
    settings = {
        "rank": rank, "centred": centred, "convention": moments.maps.convention,
        "images": moments.count, "pool": len(texts),
    }  # fmt: skip
    return TextSpans(tuple(spans), replace(moments, scatter=None, streams=None), settings)


def _chunks(parts: Sequence[Part], moments: Moments, n_texts: int) -> Iterator[list[Part]]:
    """Components of one kind, as many as may be at work at one time."""
    for _, group in groupby(parts, key=lambda part: part.kind):
        alike = list(group)
        width = getattr(moments, alike[0].field).shape[-1]
        yield from (alike[piece] for piece in pieces(len(alike), width * max(n_texts, width), CHUNK))


def _check_numbers(n_texts: int, rank: Rank, tolerance: float | None) -> None:
    check_count(n_texts, "texts", "n_texts")
    if rank not in ("auto", "paper") and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"expected a rank of 'auto', 'paper' or a number of at least 1; received {rank!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(
            f"expected a tolerance in [0, 1), a share of the largest singular value; received {tolerance}"
        )


def _check_count(moments: Moments, part: Part, rank: Rank, limit: int | None, centred: bool) -> None:
    """Too few images span less than the component does, and what is missing would look like structure.

    About their mean, n terms span one dimension less.
    """
    width = getattr(moments, part.field).shape[-1]
    needed = (width if limit is None else min(limit, width)) + centred
    if moments.count < needed:
        raise ValueError(
            f"expected at least {needed} images for {part} at rank={rank!r}{', centred' if centred else ''} (its terms "
            f"have {width} coordinates); received {moments.count}; pass more images or a smaller rank"
        )
