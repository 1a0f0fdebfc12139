"""Retrieval by head: images alike in what one head encodes, and which heads encode a property (docs/method.md, section 4).

    nearest(d, heads[11, 0], 5)                               images like image 5, as the head sees them
    nearest(d, heads[11, 0], "a red object", model=model)     images that the head turns most to the text
    heads_for(d, "colour", labels=colours)                    which heads encode colour: by probes, where labels are
    heads_for(d, "colour", model=model)                       ... by the directions of texts, where none are

Two images that are alike for the whole tower share their subject; alike for a head that encodes colour, they share that.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decompclip.api import check_count
from decompclip.data.pixels import bytes_of
from decompclip.data.shapes import PROPERTIES
from decompclip.decomposition.components import Components, heads as all_heads
from decompclip.decomposition.decomposition import Decomposition, check_terms
from decompclip.decomposition.maps import same_model
from decompclip.display import Result
from decompclip.operators.attribution import attribute
from decompclip.operators.inputs import TextFeatures
from decompclip.operators.naming import named_property
from decompclip.operators.parts import ByPart, Part, Points, image_names, parts_of
from decompclip.operators.probes import probe
from decompclip.operators.scores import Text, directions
from decompclip.operators.textspan_result import TextSpans

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


TEMPLATES = ("{}", "a {} object")
"""Of a property's values, where the model brings none for the property."""

ALIKE = 1e-6
"""Distance of unit features up to which texts are the same to the text tower: what rounding leaves."""


@dataclass(frozen=True, eq=False, repr=False)
class Neighbours(Result):
    """The images nearest to each query, as one component sees them.

    Attributes:
        part: the component.
        queries: names.
        indices: of the images, the nearest first.
        similarity: cosines of the component's terms, or of term and text.
        names: of all images.
        pictures: of the images found; `query_pictures`: of the queries. None where they are not known.
    """

    part: Part
    queries: tuple[str, ...]
    indices: Int[Tensor, "query k"]
    similarity: Float[Tensor, "query k"]
    names: tuple[str, ...]
    pictures: UInt8[Tensor, "query k h w 3"] | None = None
    query_pictures: UInt8[Tensor, "query h w 3"] | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row a query and image found: query, rank, image, name, similarity."""
        import pandas as pd

        count, k = self.indices.shape
        found = self.indices.flatten().tolist()
        return pd.DataFrame(
            {
                "query": [query for query in self.queries for _ in range(k)],
                "rank": list(range(1, k + 1)) * count,
                "image": found,
                "name": [self.names[i] for i in found],
                "similarity": self.similarity.flatten().tolist(),
            }
        )

    def figure(self) -> go.Figure:
        """A row a query: its picture, then the images found with their similarities.

        Raises:
            ValueError: the pictures are not known.
        """
        from decompclip.figures.gallery import PictureRow, picture_rows

        if self.pictures is None:
            raise ValueError(
                "expected pictures; received none; pass pixels= of the images (in [0, 1]) to nearest"
            )
        rows = []
        for place, query in enumerate(self.queries):
            own = None if self.query_pictures is None else self.query_pictures[place]
            captions = [
                f"{x:.2f} {self.names[i]}"
                for i, x in zip(self.indices[place].tolist(), self.similarity[place].tolist(), strict=True)
            ]
            rows.append(PictureRow(query, own, list(self.pictures[place]), captions))
        return picture_rows(rows, title=f"nearest by {self.part}")

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        queries = self.queries[0] if len(self) == 1 else f"{len(self)} queries"
        return f"Neighbours({queries} by {self.part}: {self.indices.shape[1]} of {len(self.names)} images)"


def nearest(
    d: Decomposition,
    component: Components,
    query: int | Sequence[int] | Decomposition | Text | TextFeatures,
    *,
    k: int = 8,
    centred: bool = False,
    model: HookedCLIP | None = None,
    pixels: Float[Tensor, "batch 3 h w"] | None = None,
    query_pixels: Float[Tensor, "query 3 h w"] | None = None,
    names: Sequence[str] | None = None,
) -> Neighbours:
    """The images whose term of one component is nearest to that of others, or to a text; by cosine, exact.

    Args:
        d: the images to choose from.
        component: a single one, such as `heads[11, 0]`.
        query: images of `d` by number (they are not found themselves); other images, decomposed alike; a text (with
            `model`), several that stand for one thing and are averaged, or a direction `[d_embed]`. Many at once:
            directions `[text, d_embed]`, or `encode_texts(model, texts)`, a query each.
        k: how many to find for each query; at most all.
        centred: of the terms about their mean over `d`, of which all images have much in common.
        model: encodes a text.
        pixels: of the images, in [0, 1], for the figure.
        query_pixels: of query images that are not of `d`, likewise.
        names: of the images; by default their numbers.

    Returns:
        Images and similarities, query by query.

    Raises:
        IndexError: a component or image that there is not.
        TypeError: no decomposition, or a query that is none of these.
        ValueError: several components, no images, k below one, terms of another model, a text without a model, or pictures or
            names of another number.
    """
    check_terms(d)
    part, *others = parts_of(component, d)
    if others:
        raise ValueError(
            f"expected one component, such as {part}; received {component!r}, {len(others) + 1} of them"
        )
    check_count(k, "images")
    if not len(d):
        raise ValueError("expected at least one image; received none")
    if pixels is not None and len(pixels) != len(d):
        raise ValueError(f"expected pixels of {len(d)} images; received {len(pixels)}")
    labels, pictures = image_names(names, len(d)), _pictures(pixels)
    known: list[int] = []
    own: Tensor | None = None
    if isinstance(query, Decomposition):
        if query_pixels is not None and len(query_pixels) != len(query):
            raise ValueError(f"expected query_pixels of {len(query)} queries; received {len(query_pixels)}")
        queries, own = tuple(f"query {i}" for i in range(len(query))), _pictures(query_pixels)
        similarity = _to_images(d, part, query, centred)
    elif isinstance(query, str | Tensor | TextFeatures) or any(isinstance(q, str) for q in _listed(query)):
        along, queries = directions(d, cast(Text | TextFeatures, query), None, model)
        similarity = _to_texts(d, part, along, centred)
    else:
        listed = _listed(query)
        if not all(hasattr(i, "__index__") for i in listed):
            raise TypeError(
                f"expected images by number, a decomposition, a text or a direction; received {query!r}"
            )
        known = [operator.index(cast(int, i)) for i in listed]
        if any(not -len(d) <= i < len(d) for i in known):
            raise IndexError(f"expected images in 0..{len(d) - 1}; received {query!r}")
        known = [i % len(d) for i in known]
        queries, own = tuple(labels[i] for i in known), None if pictures is None else pictures[known]
        similarity = _to_images(d, part, d[known], centred)
        similarity[range(len(known)), known] = -torch.inf
    if not queries:
        raise ValueError("expected at least one query; received none")
    found = similarity.topk(min(k, len(d) - bool(known)))
    return Neighbours(
        part=part,
        queries=queries,
        indices=found.indices,
        similarity=found.values,
        names=labels,
        pictures=None if pictures is None else pictures[found.indices],
        query_pictures=own,
    )


def _listed(query: Any) -> list[Any]:
    return list(query) if isinstance(query, Sequence) else [query]


def _to_images(
    d: Decomposition, part: Part, query: Decomposition, centred: bool
) -> Float[Tensor, "query image"]:
    """Cosines of terms."""
    points, count = Points.of([d, query], part)[0], len(d)
    points = points - points[:count].mean(0) if centred else points
    points = points / points.norm(dim=1, keepdim=True).clamp_min(torch.finfo(points.dtype).tiny)
    return (points[count:] @ points[:count].T).cpu()


def _to_texts(
    d: Decomposition, part: Part, along: Float[Tensor, "query d_embed"], centred: bool
) -> Float[Tensor, "query image"]:
    """Cosines of terms and texts."""
    products = attribute(d, along, components=part).values[:, 0].T
    points = Points.of(d, part)[0].cpu()
    if centred:
        products, points = products - products.mean(1, keepdim=True), points - points.mean(0)
    lengths = along.cpu().to(points).norm(dim=1, keepdim=True) * points.norm(dim=1)
    return products / lengths.clamp_min(torch.finfo(points.dtype).tiny)


def _pictures(pixels: Tensor | None) -> UInt8[Tensor, "batch h w 3"] | None:
    if pixels is None:
        return None
    if pixels.ndim != 4 or float(pixels.min()) < 0 or float(pixels.max()) > 1:
        raise ValueError(
            f"expected pixels [batch, 3, h, w] in [0, 1]; received {list(pixels.shape)} in [{float(pixels.min()):.2g}, "
            f"{float(pixels.max()):.2g}]; for normalised images take model.denormalize(images)"
        )
    return bytes_of(pixels)


@dataclass(frozen=True, eq=False, repr=False)
class PropertyHeads(ByPart):
    """Which parts encode a property of images, those that encode it most first.

    Attributes:
        parts: the components.
        score: by "probe": accuracy on images held out, between chance (0) and all (1). By "texts": share of the part's
            variance over images that lies along the differences of the values' texts.
        named: by texts, share of the part's descriptions (weighted by what they explain) that name a value; None without.
        values: of the property, in words; none where labels were given.
        n_images: behind the scores.
    """

    parts: tuple[Part, ...]
    score: Float[Tensor, " part"]
    named: Float[Tensor, " part"] | None
    property: str
    values: tuple[str, ...]
    by: Literal["probe", "texts"]
    n_images: int
    n_layers: int
    n_heads: int

    def top(self, k: int = 10) -> PropertyHeads:
        """The first k."""
        check_count(k, "parts")
        named = None if self.named is None else self.named[:k]
        return replace(self, parts=self.parts[:k], score=self.score[:k], named=named)

    def to_frame(self) -> pd.DataFrame:
        """One row a part: part, kind, layer, head, score, and how much its descriptions name the property."""
        named = {} if self.named is None else {"named": self.named}
        return self._frame(score=self.score, **named)

    def figure(self) -> go.Figure:
        """The scores, layers by heads."""
        from decompclip.figures.heatmaps import component_map

        unit = {"probe": "accuracy, from chance (0) to all (1)", "texts": "share of variance along the texts"}
        heads, mlps = self._grid(self.score.clamp_min(0))
        return component_map(heads, mlps, unit=unit[self.by], scale="sequential", title=self.property)

    def __repr__(self) -> str:
        best = ", ".join(
            f"{part} {x:.2f}" for part, x in zip(self.parts[:3], self.score[:3].tolist(), strict=True)
        )
        return (
            f"PropertyHeads({self.property} by {self.by}: {best}; {len(self)} parts, {self.n_images} images)"
        )


def heads_for(
    d: Decomposition,
    property: str,
    values: Sequence[str] | None = None,
    *,
    labels: Int[Tensor, " batch"] | None = None,
    model: HookedCLIP | None = None,
    spans: TextSpans | None = None,
    templates: Sequence[str] | None = None,
    components: Components = all_heads,
    seed: int | None = None,
) -> PropertyHeads:
    """Which heads encode a property: by linear probes where labels are, by the directions of texts where none are.

    Without labels a head scores by how much of its variance lies in the span of the differences between the values' text
    features. That is right as far as the joint space has the property along its texts: a head that encodes it along other
    directions is missed.

    Args:
        d: the images' terms.
        property: its name, such as "colour".
        values: its values in words, without labels; by default those of the Shapes world, for its properties.
        labels: of each image, the index of its value.
        model: without labels: encodes the values' texts.
        spans: descriptions of the same components (`textspans`): how many of them name a value is shown beside.
        templates: without labels: prompts with a slot `{}`; by default the model's own for the property, or general ones.
        components: which.
        seed: with labels: of the probes' split, by default 0.

    Returns:
        The components, those that encode the property most first.

    Raises:
        IndexError: a component that the tower does not have.
        KeyError: a component without a description among `spans`.
        ValueError: neither labels nor a model; fewer than two values, or values that the text tower does not tell apart; an
            argument that has no meaning with labels, or without; descriptions of another model; or as `probe`.
    """
    if labels is not None:
        of_texts = {"values": values, "model": model, "spans": spans, "templates": templates}
        idle = [name for name, given in of_texts.items() if given is not None]
        if idle:
            raise ValueError(
                f"expected labels, or values in words; received both, labels and {', '.join(idle)}; leave one out"
            )
        found = probe(d, {property: labels}, components=components, seed=seed or 0)
        parts, score, words, named = found.parts, found.gain[:, 0], (), None
    else:
        words = _values(property, values)
        if seed is not None:
            raise ValueError(
                f"expected no seed without labels, for nothing is drawn; received {seed}; leave it out"
            )
        if model is None:
            raise ValueError(
                f"expected labels of {property!r}, or the model that encodes its values; received neither; pass labels= or "
                "model=model"
            )
        chosen = model.templates.get(property, TEMPLATES) if templates is None else templates
        texts = model.zero_shot_classifier(words, chosen).double()
        apart = texts - texts.mean(0)
        _, sizes, axes = torch.linalg.svd(apart, full_matrices=False)
        basis = axes[sizes > ALIKE].float()
        if not len(basis):
            raise ValueError(
                f"expected values that the text tower tells apart; received {', '.join(map(repr, words))}, whose texts have "
                "one feature; use words that the model knows"
            )
        along = attribute(d, basis, components=components)
        points, parts = Points.of(d, components), along.parts
        spread = [points[i].double().cpu() for i in range(len(parts))]
        variance = torch.stack([(x - x.mean(0)).square().sum() for x in spread])
        within = (along.values - along.mean).double().square().sum((0, 2))
        score = torch.where(variance > 0, within / variance, 0)
        named = None if spans is None else _named(_spans_of(spans, d, components), property, words)
    order = score.argsort(descending=True, stable=True)
    return PropertyHeads(
        parts=tuple(parts[i] for i in order.tolist()),
        score=score[order],
        named=None if named is None else named[order],
        property=property,
        values=words,
        by="texts" if labels is None else "probe",
        n_images=len(d),
        n_layers=d.n_layers,
        n_heads=d.n_heads,
    )


def _values(property: str, values: Sequence[str] | None) -> tuple[str, ...]:
    if values is None and property not in PROPERTIES:
        raise ValueError(
            f"expected labels of {property!r}, or its values in words; received neither; known by themselves are "
            f"{', '.join(PROPERTIES)}"
        )
    words = PROPERTIES[property] if values is None else values
    if isinstance(words, str) or len(words) < 2:
        raise ValueError(f"expected at least two values of {property!r} in a list; received {words!r}")
    return tuple(words)


def _spans_of(spans: TextSpans, d: Decomposition, components: Components) -> TextSpans:
    """The descriptions of these components, in the order that a decomposition has them."""
    ours, theirs = spans.means.maps.fingerprint, d.maps.fingerprint
    if ours is not None and theirs is not None and not same_model(ours, theirs):
        raise ValueError(
            f"expected descriptions of the model that was decomposed; received {spans!r} of other weights; make them with "
            "textspans on the same model"
        )
    return spans[components]


def _named(spans: TextSpans, property: str, values: Sequence[str]) -> Float[Tensor, " part"]:
    """Share of each part's descriptions that name a value, weighted by what each explains."""
    shares = []
    for span in spans:
        gains = torch.diff(span.variance_explained, prepend=span.variance_explained.new_zeros(1)).clamp_min(0)
        found = named_property(span.texts, {property: values}, weights=gains.tolist())
        shares.append(found.shares[property])
    return torch.tensor(shares, dtype=torch.float64)
