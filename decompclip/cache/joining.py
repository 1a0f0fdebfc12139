"""Decompositions of several batches as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.token_terms import TokenTerms


def join(parts: Sequence[Decomposition]) -> Decomposition:
    """The images of several decompositions of one model, in order (`Decomposition.cat`)."""
    if not parts:
        raise ValueError("expected at least one decomposition; received none")
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        same_types = (first.coords.dtype, first.maps.heads.dtype) == (
            other.coords.dtype,
            other.maps.heads.dtype,
        )
        if other.normalized != first.normalized or not same_types or not first.maps.matches(other.maps):
            raise ValueError(
                "expected decompositions of one model with the same options; received different ones; "
                "decompose all of them alike"
            )
    terms = [part.token_terms for part in parts if part.token_terms is not None]
    if any(not torch.equal(x.kept.cpu(), terms[0].kept.cpu()) for x in terms):
        raise ValueError(
            "expected decompositions that kept the tokens of the same heads; received different ones; decompose all "
            "of them with the same tokens="
        )
    token_terms = TokenTerms.cat(terms) if len(terms) == len(parts) else None
    whole = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(first)
        if all(isinstance(getattr(part, f.name), Tensor) for part in parts)
    }
    return replace(first, **{"target": None, **whole}, token_terms=token_terms)
