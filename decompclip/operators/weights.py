"""What heads and MLPs write to the joint space, from the weights alone: its main directions, in words.

    weight_directions(model, heads[-1])     singular vectors of what heads write, in words (SITH: Gentile et al., CVPR 2026)

A head's map from the stream to the joint space, and what an MLP's neurons write:

    head   C gain(ln1) W_V[l, h] @ W_O[l, h] C gain(ln_post) P       [d_model d_embed], of rank d_head
    MLP    W_out[l] C gain(ln_post) P                                [d_mlp d_embed]

`C` subtracts the mean over d_model, `P` is the projection; LayerScale and norms behind a block are folded in. Weights alone do
not say, and these maps leave out: where heads look (W_Q, W_K), which neurons fire (W_in), the scales of LayerNorms, biases,
and what later layers make of what is written. The heads of an attention pool count as if all attended alike.

Singular vectors on the side of the joint space are what a map writes. They are put into words by coherent orthogonal
matching pursuit: text after text, with weights that are not negative, a text being preferred that is like those picked before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_count
from decompclip.decomposition.components import Components, heads as all_heads, mlps as all_mlps
from decompclip.decomposition.maps import frozen, one_thread, term_maps, wide
from decompclip.operators.inputs import TextFeatures, default_texts, encode_texts
from decompclip.operators.parts import ByPart, Part, parts_of
from decompclip.operators.scores import features_of
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP
    from decompclip.models.zero_shot import Template


COHERENCE = 0.3
"""By default, what likeness to the texts picked before counts beside likeness to what is left to explain."""

ALIKE = 5
"""Decimals up to which the features of texts that the text tower does not tell apart agree."""

# --- what is written, as matrices


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """What a layer writes to the joint space.

    Attributes:
        read: of heads, from the stream to z.
        write: and from z on.
        out: of each neuron.
    """

    read: Float[Tensor, "head d_model d_head"]
    write: Float[Tensor, "head d_head d_embed"]
    out: Float[Tensor, "d_mlp d_embed"]

    def less(self, other: LayerMaps) -> LayerMaps:
        """The differences of the maps, as maps of twice the rank."""
        read = torch.cat([self.read, -other.read], dim=2)
        return LayerMaps(read, torch.cat([self.write, other.write], dim=1), self.out - other.out)

    def factors(self) -> Factors:
        with one_thread():
            read, out = (torch.linalg.qr(x, mode="r").R for x in (self.read, self.out))
        return Factors(read @ self.write, out)


@dataclass(frozen=True, eq=False)
class Factors:
    """Of each map a matrix of few rows with the same products in the joint space: `read = Q R`, and Q turns nothing there."""

    heads: Float[Tensor, "head row d_embed"]
    mlp: Float[Tensor, "mlp_row d_embed"]

    @property
    def lengths(self) -> tuple[Float[Tensor, " head"], Float[Tensor, ""]]:
        """Of the heads' maps and the MLP's: the root of the sum of the squares of their numbers."""
        return self.heads.flatten(1).norm(dim=1), self.mlp.norm()

    def along(self, directions: Float[Tensor, "direction d_embed"]) -> Float[Tensor, " direction"]:
        """The squares of what is written along each direction, summed over all parts."""
        heads = (self.heads @ directions.T).square().sum((0, 1))
        return heads + (self.mlp @ directions.T).square().sum(0)


@torch.no_grad()
def layer_maps(visual: HookedViT) -> Iterator[LayerMaps]:
    """Layer by layer, in fp64."""
    fixed = frozen(visual, "centred")
    end, write = fixed.into, fixed.write
    end = end[0] if fixed.read.out is None else torch.einsum("qdm,qme->de", end, fixed.read.out)
    end = end.double()
    for block, W in zip(blocks(visual), write.W.double(), strict=True):
        read, out = wide(block.attn.W_V).double(), wide(block.mlp.W_out).double().T
        if block.mlp.ln is not None:
            out = wide(block.mlp.ln.w).double()[:, None] * out
            out = out - out.mean(0)
        if block.post_norm:
            out = (out - out.mean(1, keepdim=True)) * wide(block.ln2.w)
        else:
            read = wide(block.ln1.w).double()[:, None] * read
            read = read - read.mean(1, keepdim=True)
        scale = 1.0 if block.ls2 is None else wide(block.ls2).double()
        yield LayerMaps(read, W @ end, (out * scale) @ end)


# --- directions in words


@dataclass(frozen=True, eq=False, repr=False)
class NamedDirections(ByPart):
    """Singular vectors in the joint space of what parts write, in words.

    Attributes:
        parts: heads and MLPs.
        directions: unit vectors, those along which most is written first; zero where nothing is.
        share: of the squares of the map's numbers, what lies along each.
        words: of each part and direction, texts with their weights, none negative, the heaviest first.
        fidelity: cosine of each direction and the combination of its texts.
    """

    parts: tuple[Part, ...]
    directions: Float[Tensor, "part direction d_embed"]
    share: Float[Tensor, "part direction"]
    words: tuple[tuple[tuple[tuple[str, float], ...], ...], ...]
    fidelity: Float[Tensor, "part direction"]
    n_layers: int
    n_heads: int

    def of(self, part: Components | str) -> tuple[str, ...]:
        """The texts of a part's first direction.

        Raises:
            KeyError: the part is not among these.
        """
        return tuple(text for text, _ in self.words[self._at(str(part))][0])

    def select(self, places: Sequence[int]) -> NamedDirections:
        """Those of some parts, by their places."""
        at = list(places)
        own = {name: getattr(self, name)[at] for name in ("directions", "share", "fidelity")}
        own |= {name: tuple(getattr(self, name)[i] for i in at) for name in ("parts", "words")}
        return replace(self, **own)

    def to_frame(self) -> pd.DataFrame:
        """One row a part and direction: part, kind, layer, head, direction, share, fidelity, texts."""
        n, k = self.share.shape
        own = self._frame().loc[np.repeat(range(n), k)].reset_index(drop=True)
        columns = {name: getattr(self, name).flatten().numpy() for name in ("share", "fidelity")}
        texts = [show_words(words) for part in self.words for words in part]
        return own.assign(direction=[*range(k)] * n, **columns, texts=texts)

    def figure(self) -> go.Figure:
        """How much of what each part writes lies along its first direction."""
        from decompclip.figures.heatmaps import component_map

        heads, mlps = self._grid(self.share[:, 0])
        return component_map(heads, mlps, unit="share along the first direction", scale="sequential")

    def __repr__(self) -> str:
        first = "; ".join(f"{p}: {', '.join(self.of(p)[:2]) or 'nothing'}" for p in self.parts[:2])
        return f"NamedDirections({len(self)} parts, {self.share.shape[1]} directions each: {first})"


def show_words(words: Sequence[tuple[str, float]]) -> str:
    """Texts with their weights, on one line."""
    return ", ".join(f"{text} {weight:.2f}" for text, weight in words)


@torch.no_grad()
def weight_directions(
    model: HookedCLIP,
    components: Components = all_heads | all_mlps,
    *,
    texts: TextFeatures | Sequence[str] | Path | None = None,
    n_directions: int = 3,
    n_texts: int = 5,
    coherence: float = COHERENCE,
) -> NamedDirections:
    """What heads and MLPs write to the joint space, in words, from the weights alone.

    Args:
        model: a CLIP.
        components: heads and MLPs.
        texts: as `textspan` takes them; by default its pool for this model and the model's class names.
        n_directions: singular vectors of each part.
        n_texts: at most so many a direction.
        coherence: what likeness to the texts picked before counts; 0 is plain matching pursuit, and below 0 texts are
            preferred that are unlike each other.

    Returns:
        The directions, with their texts.

    Raises:
        IndexError: a component that the tower does not have.
        TypeError: no CLIP.
        ValueError: other components than heads and MLPs, weights that are not finite, or texts too few to name anything.
    """
    check_model(model)
    parts = heads_and_mlps(components, model)
    pool = text_pool(model, texts, n_texts)
    found = singular((maps.factors() for maps in layer_maps(model.visual)), parts, n_directions)
    return in_words(parts, found, pool, n_texts, coherence, model)


def check_model(model: HookedCLIP) -> None:
    """Raises TypeError where there is no CLIP, and ValueError where its weights are not finite."""
    if tower(model) is model:
        raise TypeError(
            "expected a CLIP, whose texts name directions; received an image tower; pass the model"
        )
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"expected finite weights; received nan or inf in {name} of {model.name!r}; fetch or save it again, in fp32"
            )


def heads_and_mlps(components: Components, model: HookedCLIP) -> tuple[Part, ...]:
    parts = parts_of(components, model.cfg)
    if odd := [part for part in parts if part.kind not in ("heads", "mlps")]:
        raise ValueError(
            f"expected heads and MLPs, which write by a matrix; received {odd[0]}; name heads[...] and mlps[...] alone"
        )
    return parts


@dataclass(frozen=True, eq=False)
class Singular:
    """Of parts in their order: first singular vectors in the joint space, their shares, and the length of the whole map."""

    directions: Float[Tensor, "part direction d_embed"]
    share: Float[Tensor, "part direction"]
    length: Float[Tensor, " part"]


def singular(layers: Iterable[Factors], parts: Sequence[Part], n_directions: int) -> Singular:
    """Singular vectors of some parts; `layers` gives the factors of one layer after another.

    Raises:
        ValueError: a number of directions that is none.
    """
    check_count(n_directions, "directions", "n_directions")
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for layer, factors in enumerate(layers):
        for part in parts:
            if part.layer != layer:
                continue
            matrix = factors.heads[part.head] if part.kind == "heads" else factors.mlp
            with one_thread():
                _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
            squares = F.pad(values.square(), (0, n_directions))
            share = squares[:n_directions] / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
            vectors = F.pad(vectors, (0, 0, 0, n_directions))[:n_directions] * (share > 0)[:, None]
            found[str(part)] = vectors, share, squares.sum().sqrt()
    return Singular(*(torch.stack(column) for column in zip(*(found[str(p)] for p in parts), strict=True)))


@dataclass(frozen=True, eq=False)
class TextPool:
    """Texts that the text tower tells apart, and their unit features about their mean."""

    texts: tuple[str, ...]
    features: Float[Tensor, "text d_embed"]


def text_pool(
    model: HookedCLIP,
    texts: TextFeatures | Sequence[str] | Path | None,
    n_texts: int,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[Template] = (),
) -> TextPool:
    """Texts to name directions by; by default classes (the model's) in a template, and the pool for this model.

    Raises:
        ValueError: no more than `n_texts` that are apart.
    """
    check_count(n_texts, "texts", "n_texts")
    if texts is None:
        template = next(
            (x for x in (*templates, *chain(*model.templates.values())) if isinstance(x, str)), "{}"
        )
        names = model.class_names if class_names is None else class_names
        own = [template.replace("{}", name) for name in names]
        try:
            usual = default_texts(model)
        except ValueError:  # the model has words for none
            if not own:
                raise
            usual = ()
        texts = tuple(dict.fromkeys((*own, *usual)))
    encoded = encode_texts(model, texts)
    features, names = features_of(encoded, model.cfg.d_embed, term_maps(model.visual, "centred").fingerprint)
    centred = features.double().cpu()
    centred = centred - centred.mean(0)
    rounded = centred.numpy().round(ALIKE)
    _, first = np.unique(rounded, axis=0, return_index=True)
    at = sorted(i for i in first.tolist() if rounded[i].any())
    if len(at) <= n_texts:
        raise ValueError(
            f"expected more than {n_texts} texts that the text tower tells apart, to name directions by {n_texts} of them; "
            f"received {len(names)}, of which {len(at)} are apart; pass more texts=, in words that the model knows, or a "
            "smaller n_texts"
        )
    return TextPool(tuple(names[i] for i in at), F.normalize(centred[at]))


def in_words(
    parts: tuple[Part, ...],
    found: Singular,
    pool: TextPool,
    n_texts: int,
    coherence: float,
    model: HookedCLIP,
) -> NamedDirections:
    """A singular vector has no sign: it gets the one that texts explain better."""
    n, k, width = found.directions.shape
    flat = found.directions.reshape(n * k, width).cpu()
    both = torch.stack([flat, -flat])
    words, fidelity = words_of(both.flatten(0, 1), pool, n_texts, coherence)
    fidelity, side = fidelity.view(2, n * k).max(0)
    words = [words[i :: n * k][own] for i, own in enumerate(side.tolist())]
    return NamedDirections(
        parts=parts,
        directions=both[side, torch.arange(n * k)].view(n, k, width),
        share=found.share.cpu(),
        words=tuple(tuple(words[i * k : (i + 1) * k]) for i in range(n)),
        fidelity=fidelity.view(n, k),
        n_layers=model.cfg.n_layers,
        n_heads=model.cfg.n_heads,
    )


def words_of(
    directions: Float[Tensor, "direction d_embed"], pool: TextPool, n_texts: int, coherence: float
) -> tuple[list[tuple[tuple[str, float], ...]], Float[Tensor, " direction"]]:
    """Of each direction the texts that are picked with their weights, the heaviest first, and the cosine of it and their combination."""
    picks, weights = pursue(directions, pool.features, n_texts, coherence=coherence)
    combined = torch.einsum("np,npd->nd", weights, pool.features[picks.clamp_min(0)])
    words = []
    for ps, ws in zip(picks.tolist(), weights.tolist(), strict=True):
        own = [(pool.texts[i], w) for i, w in zip(ps, ws, strict=True) if w > 0]
        words.append(tuple(sorted(own, key=lambda word: -word[1])))
    return words, F.cosine_similarity(combined, directions.to(combined))


def pursue(
    directions: Float[Tensor, "direction d"],
    texts: Float[Tensor, "text d"],
    n_texts: int,
    *,
    coherence: float = COHERENCE,
) -> tuple[Tensor, Tensor]:
    """Sparse combinations of texts, with weights that are not negative, that come near directions.

    Again and again the text is picked along which most is left to explain, where `coherence` times its mean product with
    the texts picked before is added; then all weights are fitted anew (least squares, none negative). It ends early
    where no text has a share in what is left.

    Args:
        directions: what to explain.
        texts: unit vectors.
        n_texts: at most so many picks.
        coherence: see above.

    Returns:
        Numbers of the texts, [direction pick], -1 where there was no pick; and their weights.

    Raises:
        ValueError: a coherence that is no finite number, or no texts.
    """
    from scipy.optimize import nnls

    if not isinstance(coherence, Real) or not isfinite(coherence):
        raise ValueError(f"expected a finite coherence, {COHERENCE} by default; received {coherence!r}")
    if not len(texts):
        raise ValueError("expected texts to combine; received none")
    directions, texts = directions.double(), texts.double()
    picks = torch.empty(len(directions), n_texts, dtype=torch.long)
    weights = directions.new_zeros(len(directions), n_texts)
    left = directions.clone()
    for step in range(n_texts):
        products = left @ texts.T
        free = products > 1e-9
        free.scatter_(1, picks[:, :step].clamp_min(0), False)
        scores = products
        if step:
            scores = products + coherence * texts[picks[:, :step].clamp_min(0)].mean(1) @ texts.T
        going = free.any(1)
        picks[:, step] = torch.where(going, scores.masked_fill(~free, -torch.inf).argmax(1), -1)
        for row in going.nonzero().flatten().tolist():
            chosen = texts[picks[row, : step + 1]]
            fitted, _ = nnls(chosen.T.numpy(), directions[row].numpy())
            weights[row, : step + 1] = torch.from_numpy(fitted)
            left[row] = directions[row] - weights[row, : step + 1] @ chosen
    return picks, weights
