"""Many prompts through a text tower: no further than they reach, and once for the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

KEPT = 4
"""Classifiers that are kept of a model."""

_SHORT = 32
"""Contexts up to so many tokens are not worth cutting."""

_CACHE: WeakKeyDictionary[nn.Module, dict[object, tuple[list[Any], Tensor, Tensor]]] = WeakKeyDictionary()


def causal(text: nn.Module) -> bool:
    """Whether a text's feature depends on nothing behind its end: open_clip's own causal tower, which pools there."""
    source: Any = text
    return (
        type(text) is CLIP
        and source.attn_mask is not None
        and source.text_pool_type in ("argmax", "eos")
        and source.context_length > _SHORT
    )


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
    if source.text_projection is None:
        return x
    return (
        source.text_projection(x)
        if isinstance(source.text_projection, nn.Linear)
        else x @ source.text_projection
    )


def _state(text: nn.Module) -> tuple[list[Any], Tensor]:
    """Changes with every step of an optimizer, every move and cast, and nearly all that is written past autograd."""
    weights = list(text.parameters())
    marks = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in weights]
    samples = [p.detach().reshape(-1)[:: max(1, p.numel() // 16)].float() for p in weights]
    return marks, torch.cat(samples) if samples else torch.zeros(0)


def kept(text: nn.Module, key: object) -> Tensor | None:
    """The classifier that was kept for these classes, if the text tower is as it was."""
    found = _CACHE.get(text, {}).get(key)
    if found is None:
        return None
    marks, sample = _state(text)
    return found[2].clone() if found[0] == marks and torch.equal(found[1], sample) else None


def keep(text: nn.Module, key: object, classifier: Tensor) -> None:
    """Keep a classifier, and the last few with it."""
    held = _CACHE.setdefault(text, {})
    held.pop(key, None)
    held[key] = (*_state(text), classifier.clone())
    for old in list(held)[:-KEPT]:
        del held[old]


def key_of(names: Sequence[str], templates: Sequence[Any], tokenizer: object) -> object:
    """What a classifier is of; functions and tokenizers count as the objects that they are."""
    return tuple(names), tuple(templates), id(tokenizer)
