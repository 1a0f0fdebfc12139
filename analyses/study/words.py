"""TEXTSPAN's words for a case's components, on clean and on triggered images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from analyses.study.case import Case
from decompclip.decomposition.components import Components, heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.inputs import TextFeatures, encode_texts
from decompclip.operators.textspan import fit_textspans
from decompclip.operators.textspan_result import TextSpans


def pool(case: Case) -> tuple[TextFeatures, int]:
    """The model's default pool; where its vocabulary knows none of it, its own prompts of the classes.

    Beside it the number of different things that it can say: prompts of one class are one.
    """
    try:
        texts = encode_texts(case.model, None)
    except ValueError:
        templates = [t for kind in case.model.templates.values() for t in kind] or ["{}"]
        texts = encode_texts(case.model, [t.format(name) for t in templates for name in case.class_names])
        return texts, len(case.class_names)
    return texts, len(texts)


def late(n_layers: int) -> Components:
    """What Finding 3 speaks of: the last layer's heads, and the MLPs of the last five layers."""
    return heads[-1] | mlps[-min(5, n_layers) :]


@dataclass(frozen=True, eq=False)
class Words:
    """Descriptions of the same components on several sets of images.

    Attributes:
        clean, triggered: of paired images, none of the target's class.
        first, second: of two halves of the clean images: what changes between them is chance.
        sets: the terms of the four, for what is to be explained.
    """

    pool: TextFeatures
    clean: TextSpans
    triggered: TextSpans
    first: TextSpans
    second: TextSpans
    sets: dict[str, Decomposition]


@torch.no_grad()
def words(case: Case, components: Components, *, n_texts: int) -> Words:
    """Descriptions by `n_texts` texts, or by a third of what the pool can say: two picks of nearly all are always alike.

    Raises:
        ValueError: fewer than four images of other classes than the target.
    """
    texts, meanings = pool(case)
    n_texts = min(n_texts, max(1, meanings // 3))
    clean, triggered = (case.terms(part, "centred")[case.others] for part in ("clean", "triggered"))
    half = len(clean) // 2
    if half < 2:
        raise ValueError(
            f"expected at least 4 images of other classes than the target; received {len(clean)}"
        )
    sets = {"clean": clean, "triggered": triggered, "first": clean[:half], "second": clean[half:]}
    # Half the images give at most so many directions; all four sets get the same.
    spans = {
        name: fit_textspans(Moments.of(d), texts, components, n_texts=n_texts, rank=half)
        for name, d in sets.items()
    }
    return Words(texts, **spans, sets=sets)
