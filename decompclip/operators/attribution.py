"""Direct attribution: what each component adds to the score of an image along a direction (docs/method.md, section 4).

    attribute(d, "a star", model=model)                          toward a text
    attribute(d, encode_texts(model, texts))                     toward many texts at once
    attribute(d, classifier[3], against=classifier[5])           toward one class, away from another
    attribute(d, classifier, labels)                             toward each image's own class, away from all others

A score along a direction is linear in the feature, and the feature is a sum of terms: the terms' products with the
direction sum to the score, image by image. TransformerLens calls this direct logit attribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.api import check_count
from decompclip.decomposition.components import (
    Components,
    everything,
    features as features_of_sae,
    mlps,
    neurons as neurons_of,
    resolve,
)
from decompclip.decomposition.decomposition import Decomposition, batches, check_alike
from decompclip.decomposition.maps import full_precision
from decompclip.intervals import half_width
from decompclip.operators.features import FeatureTerms
from decompclip.operators.inputs import TextFeatures
from decompclip.operators.neurons import NeuronTerms
from decompclip.operators.parts import KIND_NAMES, ByPart, Part, image_names, named, parts_of, place_of
from decompclip.operators.scores import Classes, Text, class_score, directions, features_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


SHOWN = 20
"""Parts drawn, those that contribute most."""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(ByPart):
    """What each part of a tower adds to each image's score along each direction.

    Attributes:
        parts: components, neurons, or features of a sparse autoencoder.
        values: their contributions, on the CPU.
        score: what they and `rest` sum to.
        texts: names of the directions.
        names: of the images.
        tokens: of each part, the source token whose share of the head it is; None for the whole.
        normalized: whether features are of length one: with texts of length one, scores are cosines.
    """

    parts: tuple[Part, ...]
    values: Float[Tensor, "image part text"]
    score: Float[Tensor, "image text"]
    texts: tuple[str, ...]
    names: tuple[str, ...]
    tokens: tuple[int | None, ...]
    normalized: bool
    n_layers: int
    n_heads: int

    largest = "mean"

    @property
    def rest(self) -> Float[Tensor, "image text"]:
        """Of the score, what is none of the parts': the tower's constants, and all components that were left out."""
        return self.score - self.values.sum(1)

    @property
    def mean(self) -> Float[Tensor, "part text"]:
        """Mean contributions over images."""
        return self.values.mean(0)

    @property
    def error(self) -> Float[Tensor, "part text"]:
        """Half-widths of their 95 % intervals over images; nan for one image."""
        return half_width(self.values)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each part."""
        return tuple(
            str(part) + ("" if token is None else f" token {token}")
            for part, token in zip(self.parts, self.tokens, strict=True)
        )

    def top(self, k: int = 10) -> Attribution:
        """The k parts with the largest mean contributions in size (toward any of the texts), the largest first."""
        check_count(k, "parts")
        order = self.mean.abs().amax(1).argsort(descending=True, stable=True)[:k].tolist()
        parts, tokens = tuple(self.parts[i] for i in order), tuple(self.tokens[i] for i in order)
        return replace(self, parts=parts, tokens=tokens, values=self.values[:, order])

    def select(
        self, texts: Sequence[int | str] | None = None, images: Sequence[int] | None = None
    ) -> Attribution:
        """Toward some of the texts, of some of the images.

        Args:
            texts: by name or place.
            images: by place.

        Raises:
            LookupError: there is no such text or image.
        """
        at = range(len(self.texts)) if texts is None else [place_of(t, self.texts, "text") for t in texts]
        rows = (
            range(len(self.names)) if images is None else [place_of(i, self.names, "image") for i in images]
        )
        return replace(
            self,
            values=self.values[list(rows)][:, :, list(at)],
            score=self.score[list(rows)][:, list(at)],
            texts=tuple(self.texts[i] for i in at),
            names=tuple(self.names[i] for i in rows),
        )

    def heads(self, text: int | str = 0) -> Float[Tensor, "layer head"]:
        """Mean contributions of single heads; nan where none was asked for.

        Raises:
            LookupError: there is no such text.
            ValueError: heads were split into tokens.
        """
        return self._cells(self.mean, text)[0]

    def mlps(self, text: int | str = 0) -> Float[Tensor, " layer"]:
        """The same of MLPs. Raises as `heads`."""
        return self._cells(self.mean, text)[1]

    def to_frame(self, *, images: bool = False) -> pd.DataFrame:
        """One row a part and text: mean over images with its 95 % interval; or, with `images`, each image's value.

        The last row of each text, "rest", is what the parts miss: with it a text's rows sum to the score.
        """
        import pandas as pd

        kinds = [part.kind for part in self.parts]
        own: dict[str, Any] = {"part": [*map(str, self.parts), "rest"], "kind": [*kinds, "rest"]}
        for name, kind in (("layer", ""), ("head", ""), ("neuron", "neurons"), ("feature", "features")):
            if not kind or kind in kinds:
                numbers = [getattr(part, name) for part in self.parts]
                own[name] = pd.array([*numbers, None], dtype="Int64")
        if any(token is not None for token in self.tokens):
            own["token"] = pd.array([*self.tokens, None])
        whole = torch.cat([self.values, self.rest[:, None]], dim=1).double()
        frames = []
        for place, text in enumerate(self.texts):
            values = whole[..., place]
            if images:
                rows = [
                    pd.DataFrame(own | {"text": text, "image": i, "name": name, "value": values[i].numpy()})
                    for i, name in enumerate(self.names)
                ]
                frames += rows
                continue
            mean, error = values.mean(0), half_width(values)
            ends = {"mean": mean, "low": mean - error, "high": mean + error}
            frames.append(pd.DataFrame(own | {"text": text} | {n: x.numpy() for n, x in ends.items()}))
        return pd.concat(frames, ignore_index=True)

    def figure(self, kind: Literal["bars", "map"] | None = None, *, text: int | str = 0) -> go.Figure:
        """The largest contributions as bars with their intervals, or as a table toward many texts; or all, as a map.

        Args:
            kind: "bars" of the parts that contribute most; "map": layers by heads, and MLPs; by default bars toward one
                text, and toward several a table, parts by texts.
            text: of bars and map, which.

        Raises:
            LookupError: there is no such text.
            ValueError: an unknown kind, or a map of tokens.
        """
        if kind not in (None, "bars", "map"):
            raise ValueError(f"expected a kind 'bars' or 'map', or none; received {kind!r}")
        unit = "contribution to the " + ("cosine" if self.normalized else "score")
        if kind is None and len(self.texts) > 1:
            from decompclip.figures.heatmaps import matrix

            top = self.top(SHOWN)
            return matrix(
                top.mean.numpy(),
                rows=top.labels,
                columns=self.texts,
                unit=unit,
                hover="%{y}, toward %{x}: %{z:.4f} ± %{customdata:.4f}",
                scale="diverging",
                notes=top.error.numpy(),
                row_height=20,
                x_above=True,
            )
        one, several = self.select([text]), len(self.names) > 1
        of = f"mean of {len(self.names)} images" if several else "image " + "".join(self.names)
        title = f"{one.texts[0]}: {float(one.score.mean()):.3g} in all ({of})"
        if kind == "map":
            from decompclip.figures.heatmaps import component_map

            heads, mlps = self._cells(self.mean, text)
            notes = self._cells(self.error, text) if several else (None, None)
            return component_map(
                heads,
                mlps,
                unit=unit,
                scale="diverging",
                heads_note=notes[0],
                mlps_note=notes[1],
                title=title,
            )
        from decompclip.figures.bars import bar_rows

        top = one.top(SHOWN)
        rest = top.rest[:, 0]
        values = [*top.mean[:, 0].tolist(), float(rest.mean())]
        errors = [*top.error[:, 0].tolist(), float(half_width(rest))]
        kinds = [*(KIND_NAMES[part.kind] for part in top.parts), "all others"]
        series = {
            kind: [value if own == kind else None for value, own in zip(values, kinds, strict=True)]
            for kind in dict.fromkeys(kinds)
        }
        return bar_rows(
            [*top.labels, "all others and constants"],
            series,
            unit=unit,
            errors=errors if several else None,
            bars="95 % interval over images",
            filled=len(series),
            row_height=20,
            title=title,
        )

    def _cells(self, values: Float[Tensor, "part text"], text: int | str) -> tuple[Tensor, Tensor]:
        if any(token is not None for token in self.tokens):
            raise ValueError(
                "expected whole heads; received heads split into tokens; attribute without tokens=, or draw "
                "contribution_maps"
            )
        return self._grid(values[:, place_of(text, self.texts, "text")])

    def __repr__(self) -> str:
        best = self.top(1)
        at = int(best.mean[0].abs().argmax())
        towards = self.texts[0] if len(self.texts) == 1 else f"{len(self.texts)} texts"
        of = f"{len(self)} parts, {len(self.names)} image{'s' * (len(self.names) > 1)}"
        most = f"most by {best.labels[0]}, {float(best.mean[0, at]):+.3g}"
        return f"Attribution(toward {towards}; {of}; {most}{f' toward {self.texts[at]}' * (len(self.texts) > 1)})"


@torch.no_grad()
def attribute(
    d: Decomposition | Iterable[Decomposition],
    toward: Text | TextFeatures | Float[Tensor, "text d_embed"],
    target: Classes | None = None,
    *,
    metric: Literal["logit", "logit_difference"] = "logit_difference",
    against: Text | Classes | None = None,
    components: Components = everything,
    tokens: bool = False,
    neurons: NeuronTerms | None = None,
    features: FeatureTerms | None = None,
    model: HookedCLIP | None = None,
    label: str | Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Attribution:
    """Which components move images toward a text, a class, or one class against another, and by how much.

    The contributions of all components and the tower's constants sum to the score: the product of feature and direction,
    a cosine of a decomposition with `normalize=True` and a text of length one.

    Args:
        d: a decomposition, or a stream of batches.
        toward: a direction `[d_embed]`, or a text (with `model`); several strings stand for one thing and are averaged
            (`logit_lens` and `explore` score each by itself). Many at once: features `[text, d_embed]`, such as a classifier,
            or `encode_texts(model, texts)`. With `target`, the text features of all classes.
        target: the class scored (`ClassScore`): one for all images, or one for each.
        metric: of a target: its "logit", or the "logit_difference" to `against`.
        against: of a target, the other class (by default the mean of all others); else a text or direction, whose score is
            subtracted.
        components: which have a number each; those left out stay in `rest`.
        tokens: split heads whose tokens were kept (`decompose(images, tokens=heads[-1])`) into the tokens that they read.
        neurons: terms of the same images in the same order (`neuron_terms`), which stand for the MLPs that they are of.
        features: of a sparse autoencoder, likewise (`feature_terms`): they stand for the components whose sum its activations
            are. Its bias and its error are in `rest`, and in the terms.
        model: encodes texts.
        label: a name for the direction, or for each; by default the texts.
        names: of the images; by default their numbers.

    Returns:
        The contributions, image by image.

    Raises:
        IndexError: a component, or a class, that there is not.
        LookupError: `tokens` of a decomposition that kept none.
        TypeError: no decomposition; a text that is no string; a class by its name.
        ValueError: no images; a text without a model; directions of another width or model; neurons or features of another
            model, of other options or another number of images, or of components that are left out or split already;
            labels or names of another number.
    """
    score = None if target is None else class_score(toward, target, metric, against)
    parts: tuple[Part, ...] = ()
    held: tuple[int | None, ...] = ()
    first: Decomposition | None = None
    values, totals, start = [], [], 0
    along, labels = torch.empty(0), ("" if score is None else score.label,)
    for batch in batches(d):
        rows = slice(start, start := start + len(batch))
        if not len(batch):
            continue
        if first is None and score is None:
            along, labels = directions(batch, toward, cast(Any, against), model)
        elif first is None:
            features_of(cast(Any, toward), batch.d_embed, batch.maps.fingerprint)
        first = first or batch
        check_alike(first, batch)
        own: list[Any] = [None if fine is None else fine.select(rows) for fine in (neurons, features)]
        for fine in own:
            if fine is not None:
                fine.check(batch)
        if score is None:
            each, which = along[None], torch.zeros(len(batch))
        else:
            each, which = score.directions(rows).unique(dim=0, return_inverse=True)
            each, which = each[:, None], which.expand(len(batch))
        places = [(which == i).nonzero()[:, 0] for i in range(len(each))]
        found = []
        for place, toward_one in zip(places, each, strict=True):
            whole = len(place) == len(batch)
            some = batch if whole else batch[place]
            of_some = [fine if whole or fine is None else fine.select(place) for fine in own]
            parts, held, *numbers = _contributions(some, toward_one, components, tokens, *of_some)
            found.append(numbers)
        back = torch.cat(places).argsort()
        values.append(torch.cat([x for x, _ in found])[back].cpu())
        totals.append(torch.cat([x for _, x in found])[back].cpu())
    if first is None:
        raise ValueError("expected at least one image; received none; check the image source")
    if score is not None:
        score.check(start)
    for fine in (neurons, features):
        if fine is not None and len(fine) != start:
            raise ValueError(f"expected {fine.what} terms of {start} images; received {fine!r}")
    return Attribution(
        parts=parts,
        values=torch.cat(values),
        score=torch.cat(totals),
        texts=named(label, labels, "label", "directions"),
        names=image_names(names, start),
        tokens=held,
        normalized=first.normalized,
        n_layers=first.n_layers,
        n_heads=first.n_heads,
    )


def _contributions(
    d: Decomposition,
    along: Float[Tensor, "text d_embed"],
    components: Components,
    tokens: bool,
    neurons: NeuronTerms | None,
    features: FeatureTerms | None,
) -> tuple[tuple[Part, ...], tuple[int | None, ...], Tensor, Tensor]:
    """Parts, their tokens, contributions [batch part text] and scores [batch text]."""
    mask, singles = resolve(components, d), parts_of(components, d)
    with full_precision(d.embed):
        into = along.to(d.embed).T
        read = into if d.maps.direct else d.maps.heads.to(d.coords) @ into
        of_heads = d.coords @ into if d.maps.direct else torch.einsum("blhr,lhrt->blht", d.coords, read)
        ends = [d.embed[:, None] @ into, d.pool @ into]
        whole = torch.cat([of_heads.flatten(1, 2), d.mlps @ into, *ends], dim=1)
        columns = list(whole[:, mask.flat.to(whole.device)].split(1, dim=1))
        names: list[tuple[tuple[Part, ...], tuple[int | None, ...]]] = [
            ((part,), (None,)) for part in singles
        ]
        if tokens:
            shares, kept = d.token_logits(along.to(d.embed)), d._asked(None, None)
            for place, part in enumerate(singles):
                if part.kind == "heads" and kept.kept[part.layer, part.head]:
                    columns[place] = shares[:, kept.position(*part.place)]
                    count = columns[place].shape[1]
                    names[place] = (part,) * count, tuple(range(count))
        if neurons is not None:
            of_neurons, layers = neurons.toward(along).to(whole), neurons.layers.cpu()
            for layer in layers.unique().tolist():
                mine = layers == layer
                split = mlps[layer], tuple(neurons_of[layer, i] for i in neurons.index[mine].tolist())
                _split(columns, names, singles, [split[0]], split[1], of_neurons[:, mine.to(whole.device)])
        if features is not None:
            stand_for = resolve(features.of, d).singles
            parts = tuple(features_of_sae[i] for i in features.index.tolist())
            _split(columns, names, singles, stand_for, parts, features.toward(along).to(whole))
        score = d.features @ into
    parts = tuple(part for several, _ in names for part in several)
    return parts, tuple(token for _, several in names for token in several), torch.cat(columns, dim=1), score


def _split(
    columns: list[Tensor],
    names: list[tuple[tuple[Part, ...], tuple[int | None, ...]]],
    singles: Sequence[Part],
    stand_for: Sequence[Part],
    parts: tuple[Part, ...],
    values: Float[Tensor, "batch part text"],
) -> None:
    """Put finer parts in the place of the components that they are parts of."""
    if missing := [part for part in stand_for if part not in singles]:
        raise ValueError(
            f"expected components with {missing[0]}, which {parts[0].kind} are of; received components without {missing[0]}; "
            "name it"
        )
    places = [singles.index(part) for part in stand_for]
    if split := [singles[place] for place in places if names[place] != ((singles[place],), (None,))]:
        raise ValueError(
            f"expected one way to split {split[0]}; received tokens or neurons, and {parts[0].kind}; leave one out"
        )
    for place in places:
        columns[place], names[place] = values[:, :0], ((), ())
    columns[places[0]], names[places[0]] = values, (parts, (None,) * len(parts))
