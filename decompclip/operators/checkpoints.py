"""What differs between two checkpoints of one architecture, from their weights alone: parts, words, and classes.

    found = compare_checkpoints(model, reference)       a suspicious checkpoint, and the one that it says it comes from
    found.top(5).to_frame()                             which heads and MLPs changed most, along which direction, in words
    found.classes.to_frame()                            classes, those that both towers moved most first

For maps of parts see `decompclip.operators.weights`, where also stands what weights alone leave out. A backdoor that was
fine-tuned into both towers ties one class to a trigger: what the image tower writes along this class changes, and so does
what the text tower says of it. With `D` and `R` the maps of all heads and MLPs, changed and of the reference,
and `t` the suspicious checkpoint's text feature of a class, less the mean of the classes and of unit length:

    image   sqrt(sum |D t|^2 / sum |R t|^2)
    text    how far the class's text feature moved, past what all classes moved
    score   both, each over its median over the classes, multiplied; where the text tower is the same, the first alone

More pairs of one class in an honest fine-tuning can raise that class too: a rank is where to look, no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_count
from decompclip.decomposition.components import heads as all_heads, mlps as all_mlps
from decompclip.display import Result
from decompclip.models.text import ImageOnly
from decompclip.operators.inputs import TextFeatures
from decompclip.operators.parts import ByPart, Part, parts_of, place_of
from decompclip.operators.weights import (
    COHERENCE,
    Factors,
    NamedDirections,
    check_model,
    in_words,
    layer_maps,
    show_words,
    singular,
    text_pool,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP
    from decompclip.models.zero_shot import Template


CLASSES = 3
"""Classes of which a ranking can say something: the centred features of two are opposite, and move alike."""

STILL = 1e-6
"""Changes up to this are rounding: of checkpoints in one precision."""

SHOWN = 20
"""Classes drawn, the first."""


@dataclass(frozen=True, eq=False, repr=False)
class MovedClasses(Result):
    """Classes by how much two checkpoints differ along them.

    Attributes:
        names: of the classes.
        image: change of what the image tower writes along each, over what the reference writes.
        text: how far each one's text feature moved, past what all moved.
        score: both in one; 1 for a class that is at the median in both.
    """

    names: tuple[str, ...]
    image: Float[Tensor, " class"]
    text: Float[Tensor, " class"]
    score: Float[Tensor, " class"]

    largest = "score"

    @property
    def order(self) -> tuple[str, ...]:
        """The names, the class with the highest score first."""
        return tuple(self.names[i] for i in self.score.argsort(descending=True, stable=True).tolist())

    @property
    def lead(self) -> float:
        """The highest score over the second: 1 is no lead."""
        first, *others = self.score.topk(min(2, len(self))).values.tolist()
        return first / others[0] if others and others[0] > 0 else 1.0

    def rank(self, name: int | str) -> int:
        """Where a class stands, 1 for the first; of equals, all count as the last of them.

        Raises:
            LookupError: there is no such class.
        """
        return int((self.score >= self.score[place_of(name, self.names, "class")]).sum())

    def top(self, k: int = 10) -> MovedClasses:
        """The k classes with the highest scores, the first first."""
        check_count(k, "classes")
        at = self.score.argsort(descending=True, stable=True)[:k]
        names = tuple(self.names[i] for i in at.tolist())
        return replace(self, names=names, image=self.image[at], text=self.text[at], score=self.score[at])

    def to_frame(self) -> pd.DataFrame:
        """One row a class, the first first: rank, class, score, image, text."""
        import pandas as pd

        ordered = self.top(len(self))
        columns = {name: getattr(ordered, name).numpy() for name in ("score", "image", "text")}
        return pd.DataFrame({"rank": range(1, len(self) + 1), "class": ordered.names, **columns})

    def figure(self) -> go.Figure:
        """The scores of the first classes."""
        from decompclip.figures.bars import class_scores

        first = self.top(SHOWN)
        return class_scores(first.names, first.score.tolist())

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        first = ", ".join(
            f"{n} {s:.2f}" for n, s in zip(self.order[:3], self.top(3).score.tolist(), strict=False)
        )
        return f"MovedClasses({len(self)} classes: {first}, ...; lead {self.lead:.2f})"


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointDifference(ByPart):
    """What differs between two checkpoints.

    Attributes:
        model, reference: names of the two.
        change: of each head's or MLP's map, over the reference's: 0.1 is a change by a tenth; 1 where the reference's is zero.
        directions: along which each changed, in words.
        classes: by how much they moved; None where no classes are known.
        text_change: of the text tower's weights, over the reference's; 0 where it is the same.
    """

    model: str
    reference: str
    change: Float[Tensor, " part"]
    directions: NamedDirections
    classes: MovedClasses | None
    text_change: float
    n_layers: int
    n_heads: int

    largest = "change"

    @property
    def parts(self) -> tuple[Part, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Heads and MLPs."""
        return self.directions.parts

    def top(self, k: int = 10) -> CheckpointDifference:
        """The k parts that changed most, the first first."""
        check_count(k, "parts")
        order = self.change.argsort(descending=True, stable=True)[:k]
        return replace(self, change=self.change[order], directions=self.directions.select(order.tolist()))

    def to_frame(self) -> pd.DataFrame:
        """One row a part: part, kind, layer, head, change, share of the change along its first direction, that direction's
        texts and their fidelity."""
        first = self.directions
        frame = self._frame(change=self.change, share=first.share[:, 0], fidelity=first.fidelity[:, 0])
        frame["texts"] = [show_words(words[0]) for words in first.words]
        return frame

    def figure(self) -> go.Figure:
        """How much each head and MLP changed, layers by heads."""
        from decompclip.figures.heatmaps import component_map

        heads, mlps = self._grid(self.change)
        return component_map(heads, mlps, unit="change of the map", scale="sequential")

    def __repr__(self) -> str:
        first = self.top(3)
        parts = ", ".join(
            f"{part} {change:.1%}" for part, change in zip(first.parts, first.change.tolist(), strict=True)
        )
        classes = ""
        if self.classes is not None and len(self.classes.score.unique()) > 1:
            classes = f"; first classes {', '.join(self.classes.order[:3])}"
        return (
            f"CheckpointDifference({self.model!r} against {self.reference!r}: {parts}; text tower "
            f"{self.text_change:.1%}{classes})"
        )


@torch.no_grad()
def compare_checkpoints(
    model: HookedCLIP,
    reference: HookedCLIP,
    *,
    class_names: Sequence[str] | None = None,
    templates: str | Sequence[Template] | None = None,
    texts: TextFeatures | Sequence[str] | Path | None = None,
    n_directions: int = 1,
    n_texts: int = 5,
    coherence: float = COHERENCE,
) -> CheckpointDifference:
    """Which heads and MLPs differ between two checkpoints, along which directions, in words; from weights alone.

    Words are the reference's: its text tower encodes them.

    Args:
        model: the checkpoint that is looked at; a guard counts as its model.
        reference: the one that it is held against, of the same architecture.
        class_names: to rank by how much the checkpoints differ along them; by default those that the reference (or else the
            model) brings. None are ranked where there are none.
        templates: of the classes' prompts, as `zero_shot_classifier` takes them; by default the reference's.
        texts: to name directions by, as `textspan` takes them, or encoded by the reference; by default the classes in their first
            template and the pool for this model.
        n_directions: directions of each part's change.
        n_texts: at most so many texts a direction.
        coherence: as `decompclip.operators.weights.weight_directions`.

    Returns:
        The differences of all heads and MLPs, and the ranked classes.

    Raises:
        MissingTextError: a model without its text tower.
        TypeError: no CLIP.
        ValueError: two architectures or vocabularies, weights that are not finite, fewer than three classes or texts that are not
            told apart, or texts too few to name anything.
    """
    for of in (model, reference):
        check_model(of)
    _check_alike(model, reference)
    names = class_names if class_names is not None else reference.class_names or model.class_names
    templates = reference._templates(templates)
    precisions = {of.visual.dtype for of in (model, reference)}
    still = max([STILL, *(torch.finfo(x).eps for x in precisions)]) if len(precisions) > 1 else STILL
    moved = along = None
    if len(names):
        before, after = _classifiers(model, reference, names, templates)
        moved, along = _past_common(after - before, still), F.normalize(after - after.mean(0), dim=1)
    parts = parts_of(all_heads | all_mlps, reference.cfg)
    pool = text_pool(reference, texts, n_texts, class_names=names, templates=templates)
    usual: dict[str, Tensor] = {}
    changed = written = torch.zeros(())

    def differences() -> Iterator[Factors]:
        nonlocal changed, written
        layers = zip(layer_maps(model.visual), layer_maps(reference.visual), strict=True)
        for layer, (mine, theirs) in enumerate(layers):
            new, old = mine.less(theirs).factors(), theirs.factors()
            heads, mlp = old.lengths
            usual.update({str(all_heads[layer, head]): x for head, x in enumerate(heads)})
            usual[str(all_mlps[layer])] = mlp
            if along is not None:
                at = along.to(new.mlp)
                changed, written = changed + new.along(at), written + old.along(at)
            yield new

    found = singular(differences(), parts, n_directions)
    length = torch.stack([usual[str(part)] for part in parts])
    change = torch.where(length > 0, found.length / length, (found.length > 0).double())
    same = (change <= still)[:, None]  # rounding has directions too, of which nothing is to be said
    found = replace(
        found,
        directions=found.directions.masked_fill(same[..., None], 0.0),
        share=found.share.masked_fill(same, 0.0),
    )
    classes = None
    if moved is not None:
        image = (changed / written).sqrt().cpu()
        score = _over_median(image, still) * _over_median(moved, still)
        classes = MovedClasses(tuple(names), image, moved, score)
    return CheckpointDifference(
        model=model.name,
        reference=reference.name,
        change=change.cpu(),
        directions=in_words(parts, found, pool, n_texts, coherence, reference),
        classes=classes,
        text_change=_text_change(model, reference),
        n_layers=reference.cfg.n_layers,
        n_heads=reference.cfg.n_heads,
    )


def _classifiers(
    model: HookedCLIP, reference: HookedCLIP, names: Sequence[str], templates: Sequence[Template]
) -> tuple[Float[Tensor, "class d_embed"], Float[Tensor, "class d_embed"]]:
    """The text features of classes, before and after."""
    if len(names) < CLASSES and not isinstance(names, str):
        raise ValueError(
            f"expected at least {CLASSES} classes to rank; received {len(names)}; name more, or class_names=() for none"
        )
    before, after = (of.zero_shot_classifier(names, templates).double().cpu() for of in (reference, model))
    for own in (before, after):
        if (apart := len(own.float().unique(dim=0))) < CLASSES:
            raise ValueError(
                f"expected at least {CLASSES} classes that the text tower tells apart; received {len(names)}, of which {apart} are "
                "apart; name them in words that the model knows, or class_names=() for none"
            )
    return before, after


def _past_common(moved: Float[Tensor, "class d_embed"], still: float) -> Float[Tensor, " class"]:
    """How far each moved past the mean; zero where it is rounding."""
    length = (moved - moved.mean(0)).norm(dim=1)
    return torch.where(length > still, length, 0.0)


def _over_median(x: Float[Tensor, " class"], still: float) -> Float[Tensor, " class"]:
    """Ones where nothing moved."""
    median = x.median()
    return x / median if median > still else torch.ones_like(x)


def _text_change(model: HookedCLIP, reference: HookedCLIP) -> float:
    mine, theirs = (of.text.state_dict() for of in (model, reference))
    pairs = [
        (mine[k].double().cpu(), x.double().cpu())
        for k, x in theirs.items()
        if x.is_floating_point() and x.ndim
    ]
    pairs = [(a, b) for a, b in pairs if b.isfinite().all()]  # a mask of attention is none of the weights
    changed, usual = (
        sum(float(x.square().sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return (changed / usual) ** 0.5


def _check_alike(model: HookedCLIP, reference: HookedCLIP) -> None:
    mine, theirs = model.cfg.to_dict(), reference.cfg.to_dict()
    odd = [f"{key} {theirs[key]} and {mine[key]}" for key in theirs if mine[key] != theirs[key]]
    if not odd:
        shapes = [
            {key: tuple(x.shape) for key, x in of.text.state_dict().items()} for of in (reference, model)
        ]
        odd = [
            f"{key} of the text tower {shapes[0].get(key, 'missing')} and {shapes[1].get(key, 'missing')}"
            for key in sorted({*shapes[0], *shapes[1]})
            if shapes[0].get(key) != shapes[1].get(key)
        ]
    words = [getattr(of.tokenizer, "words", None) for of in (reference, model)]
    if not odd and words[0] != words[1]:
        odd = [f"vocabularies of {len(words[0] or ())} and {len(words[1] or ())} words, not the same"]
    if odd:
        raise ValueError(
            f"expected two checkpoints of one architecture; received {reference.name!r} and {model.name!r}, which differ in "
            f"{'; '.join(odd[:3])}; compare a checkpoint with the one that it was fine-tuned from"
        )
    for of in (model, reference):
        if isinstance(of.text, ImageOnly):
            of.text.encode_text()
