"""TEXTSPAN: what a component writes, in words (Gandelsman et al., ICLR 2024, algorithm 1; paper, appendix E).

textspan(model, layer, head)                  one head, on default images and texts
textspans(model, heads[-1] | mlps[-1])        several components at once
fit_textspans(moments, texts)                 without a model: from moments and encoded texts

Texts are projected on the span of the component's terms; then, again and again, the text along whose projection the
terms vary most is picked, and its direction is removed from terms and texts. Only mean and second moment of the terms
are needed (`textspan_greedy`), so that memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from decompclip.cache.components import Components, heads, mlps
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.fingerprint import same_model
from decompclip.cache.maps import Convention, term_maps
from decompclip.cache.moments import Moments
from decompclip.operators.batches import Images as Pictures
from decompclip.operators.batches import image_batches
from decompclip.operators.parts import Head, Part, part_at, parts_named, parts_of, place_of
from decompclip.operators.textspan_greedy import Terms, frame, pick
from decompclip.operators.textspan_inputs import (
    TextFeatures,
    default_images,
    encode_texts,
)
from decompclip.operators.textspan_result import TextSpan, TextSpans

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP

Rank = int | Literal["auto", "paper"]
Images = Moments | Decomposition | Pictures
Texts = TextFeatures | Sequence[str] | Path

PAPER_RANK = 80
CHUNK = 2**25
"""Numbers that the projected texts of the components at work at one time may hold (256 MiB)."""


def textspan(
    model: HookedCLIP,
    layer: int,
    head: Head,
    *,
    images: Images | None = None,
    texts: Texts | None = None,
    n_texts: int = 20,
    rank: Rank = "auto",
    centred: bool = False,
    tolerance: float | None = None,
    convention: Convention = "centred",
    batch_size: int = 32,
) -> TextSpan:
    """Descriptions of one head, or of the MLP of a layer (`head="mlp"`).

    Args:
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
        convention: of the decomposition; what `images` that were decomposed before have goes first.
        batch_size: of the forward passes.

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
    images: Images | None = None,
    texts: Texts | None = None,
    n_texts: int = 20,
    rank: Rank = "auto",
    centred: bool = False,
    tolerance: float | None = None,
    convention: Convention = "centred",
    batch_size: int = 32,
) -> TextSpans:
    """Descriptions of several components, from one pass over the images; see `textspan`.

    Raises:
        IndexError, ValueError: as `textspan`.
    """
    cfg = model.cfg
    # What names nothing that is there fails before any work.
    parts_of(components, cfg.n_layers, cfg.n_heads, int(bool(cfg.pool_mlp)))
    _check_numbers(n_texts, rank, tolerance)
    if isinstance(images, Decomposition):
        images = Moments.of(images)
    if not isinstance(images, Moments):
        images = default_images(model, batch_size=batch_size) if images is None else images
        read = image_batches(images, batch_size=batch_size)
        batches = (batch.to(model.device, model.dtype) for batch in read)
        with torch.no_grad():
            images = Moments.fit(model, batches, convention=convention, stream=False)
    images.check_model(term_maps(model.visual, images.maps.convention))
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
    """Descriptions of components from moments and encoded texts; see `textspan`.

    Raises:
        IndexError: the moments' tower has no such component.
        ValueError: the moments have no second moments or are of too few images, or the texts are of another width or
            were encoded by another model.
    """
    _check_numbers(n_texts, rank, tolerance)
    if texts.features.shape[1] != len(moments.embed):
        raise ValueError(
            f"expected text features of width {len(moments.embed)}, as the terms have it; received "
            f"{list(texts.features.shape)}; encode the texts with the text tower of the same model"
        )
    mark = moments.maps.fingerprint
    if texts.model is not None and mark is not None and not same_model(texts.model, mark):
        raise ValueError(
            "expected texts encoded by the model whose terms they describe; received those of a model with other "
            "weights; encode them with encode_texts(model, texts)"
        )
    parts = parts_named(components, moments)
    limit = None if rank == "auto" else PAPER_RANK if rank == "paper" else rank
    features = texts.features.to(moments.coords)
    spans: list[TextSpan] = []
    for chunk in _chunks(parts, moments, len(texts)):
        _check_count(moments, chunk[0], rank, limit, centred)
        terms = _terms(moments, chunk)
        space = frame(
            terms, limit=limit, centred=centred, tolerance=tolerance, dtype=moments.maps.heads.dtype
        )
        picks = pick(space, features, n_texts)
        means = _means(moments, chunk)
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
                    total_variance=float(space.total[row]),
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
        width = getattr(moments, place_of(alike[0])[0]).shape[-1]
        size = max(1, CHUNK // (width * max(n_texts, width)))
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _terms(moments: Moments, parts: Sequence[Part]) -> Terms:
    name = place_of(parts[0])[0]
    places = [place_of(part)[1] for part in parts]
    covariance = moments.covariance(name)
    mean = getattr(moments, name)
    spread = torch.stack([covariance[at] for at in places])
    means = torch.stack([mean[at] for at in places])
    maps = torch.stack([moments.maps.heads[at] for at in places]).double() if name == "coords" else None
    return Terms(spread + means[:, :, None] * means[:, None, :], spread, maps)


def _means(moments: Moments, parts: Sequence[Part]) -> list[Tensor]:
    """The mean terms in the joint space."""
    name = place_of(parts[0])[0]
    mean = getattr(moments, name)
    if name != "coords":
        return [mean[place_of(part)[1]] for part in parts]
    return [mean[at] @ moments.maps.heads[at].double() for _, at in map(place_of, parts)]


def _check_numbers(n_texts: int, rank: Rank, tolerance: float | None) -> None:
    if n_texts < 1:
        raise ValueError(f"expected to pick at least 1 text; received n_texts={n_texts}; the paper picks 20")
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
    name = place_of(part)[0]
    width = getattr(moments, name).shape[-1]
    needed = (width if limit is None else min(limit, width)) + centred
    if moments.count < needed:
        raise ValueError(
            f"expected at least {needed} images for {part} at rank={rank!r}{', centred' if centred else ''} (its terms "
            f"have {width} coordinates); received {moments.count}; pass more images or a smaller rank"
        )
