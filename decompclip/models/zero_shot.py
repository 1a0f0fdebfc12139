"""Classifiers made of words: one text feature a class; prompts are encoded once, no further than they reach, and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.decomposition.maps import WatchedWeights
from decompclip.display import Track

KEPT = 4
"""Classifiers that are kept of a model."""

READ = 64
"""Batches of prompts that are tokenised at once, and sorted by their length."""

_CACHE: WeakKeyDictionary[nn.Module, dict[object, tuple[WatchedWeights, Tensor]]] = WeakKeyDictionary()


def causal(text: nn.Module) -> bool:
    """Whether a text's feature depends on nothing behind its end: open_clip's own causal tower, which pools there."""
    source: Any = text
    return type(text) is CLIP and source.attn_mask is not None and source.text_pool_type in ("argmax", "eos")


def encode_prompts(text: nn.Module, tokens: Int[Tensor, "text position"]) -> Float[Tensor, "text d_embed"]:
    """What `text.encode_text` gives, of a tower that is `causal`: positions behind the last end are left out."""
    source: Any = text
    ends = tokens.argmax(-1)
    if source.text_pool_type == "eos":
        ends = (tokens == source.text_eos_id).int().argmax(-1)
    length = int(ends.max()) + 1
    tokens = tokens[:, :length]
    dtype = source.transformer.get_cast_dtype()
    x = source.token_embedding(tokens).to(dtype) + source.positional_embedding[:length].to(dtype)
    x = source.ln_final(source.transformer(x, attn_mask=source.attn_mask[:length, :length]))
    x = text_global_pool(x, tokens, source.text_pool_type, eos_token_id=source.text_eos_id)
    projection = source.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def kept(text: nn.Module, key: object) -> Tensor | None:
    """The classifier that was kept for these classes, if the text tower is as it was."""
    found = _CACHE.get(text, {}).get(key)
    if found is None:
        return None
    weights, classifier = found
    return classifier.clone() if weights.are_those_of(text) else None


def keep(text: nn.Module, key: object, classifier: Tensor) -> None:
    """Keep a classifier, and the last few with it."""
    held = _CACHE.setdefault(text, {})
    held.pop(key, None)
    held[key] = (WatchedWeights.of(text), classifier.clone())
    for old in list(held)[:-KEPT]:
        del held[old]


def key_of(names: Sequence[str], templates: Sequence[Any], tokenizer: Callable[..., Any]) -> object:
    """What a classifier is of; functions and tokenizers count as the objects that they are."""
    # a bound method is its object's, which it keeps: a number in memory may become another's
    return tuple(names), tuple(templates), tokenizer.__call__


Template = str | Callable[[str], str]
"""A prompt with one slot `{}` for the class's name, or a function from the name to the prompt."""


def zero_shot_classifier(
    encode_text: Callable[[Int[Tensor, "text position"]], Float[Tensor, "text d_embed"]],
    tokenize: Callable[[list[str]], Int[Tensor, "text position"]],
    class_names: Sequence[str],
    templates: Sequence[Template],
    *,
    batch_size: int = 256,
    allow_duplicates: bool = False,
    track: Track | None = None,
) -> Float[Tensor, "class d_embed"]:
    """One unit vector a class: the mean over the templates of its unit text features, normalised again.

    Args:
        encode_text: text tower; it moves the token ids to its own device.
        tokenize: its tokenizer.
        templates: for instance open_clip's `OPENAI_IMAGENET_TEMPLATES`.
        batch_size: texts a call of `encode_text`.
        allow_duplicates: let two classes share a name, as two pairs of ImageNet's published names do; the
            later one is then never predicted.
        track: shows progress, where there are several batches.

    Raises:
        ValueError: no classes, no templates, a name that stands twice, a template without a slot, or a
            single string where a list is expected.
    """
    _check_names(class_names, allow_duplicates=allow_duplicates)
    _check_templates(templates)
    places: dict[str, list[int]] = {}  # of each distinct prompt, the classes that it counts for
    for place, name in enumerate(class_names):
        for template in templates:
            places.setdefault(_fill(template, name), []).append(place)
    prompts = list(places)
    starts: Iterable[int] = range(0, len(prompts), batch_size)
    if track is not None and len(prompts) > batch_size:
        words = f"texts of {len(class_names)} classes"
        starts = track(starts, words, len(range(0, len(prompts), batch_size)))
    sums: Tensor | None = None  # of the features of a class: never those of all prompts at once
    with torch.no_grad():
        for start in starts:
            first = start % (READ * batch_size)
            if not first:
                part = prompts[start : start + READ * batch_size]
                tokens, row_of = _short_first(tokenize(part))
                pairs = [(row_of[i], place) for i, prompt in enumerate(part) for place in places[prompt]]
                rows, classes = torch.tensor(pairs).unbind(1)
            batch = tokens[first : first + batch_size]
            if not len(batch):  # other prompts were read as the same words
                continue
            features = F.normalize(encode_text(batch), dim=-1)
            if sums is None:
                sums = features.new_zeros(len(class_names), features.shape[1])
            own = (rows >= first) & (rows < first + batch_size)
            here = (rows[own] - first).to(features.device)
            sums = sums.index_add(0, classes[own].to(features.device), features[here])
        assert sums is not None
        return F.normalize(sums, dim=-1)  # a mean's direction is its sum's


def _short_first(tokens: Int[Tensor, "text position"]) -> tuple[Int[Tensor, "row position"], list[int]]:
    """Distinct rows, those first that end first: a batch is encoded as far as its longest text; and each text's row."""
    rows, row_of = tokens.unique(dim=0, return_inverse=True)
    padding = (rows == rows[:, -1:]).flip(1).cumprod(1).sum(1)
    order = padding.argsort(descending=True, stable=True)
    return rows[order], order.argsort()[row_of].tolist()


def _fill(template: Template, name: str) -> str:
    # not str.format, which would stumble over other braces
    return template.replace("{}", name) if isinstance(template, str) else template(name)


def _check_names(class_names: Sequence[str], *, allow_duplicates: bool) -> None:
    if isinstance(class_names, str):
        raise ValueError(f"expected a list of class names; received the single string {class_names!r}")
    if not class_names:
        raise ValueError("expected at least one class name; received an empty list; check the class file")
    if odd := [name for name in class_names if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"expected class names in words; received {odd[0]!r}; name every class")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated and not allow_duplicates:
        raise ValueError(
            f"expected each class name once; received again: {', '.join(map(repr, repeated))}; tell the classes "
            "apart in words, or, from Python, pass allow_duplicates=True (the later one is then never predicted)"
        )


def _check_templates(templates: Sequence[Template]) -> None:
    if isinstance(templates, str):
        raise ValueError(f"expected a list of templates; received the single string {templates!r}")
    if not templates:
        raise ValueError('expected at least one template; received none; the plainest is "a photo of a {}."')
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(
                f"expected a slot {{}} for the class's name in every template; received {template!r}, which would "
                "give all classes the same text"
            )
