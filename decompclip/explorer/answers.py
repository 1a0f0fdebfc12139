"""Answers: what the explorer's view shows of one question, small enough for a message and for a saved page; and that page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.display import printable, printable_all


@dataclass(frozen=True, eq=False)
class Answer:
    """What the view shows of one question: facts that go through JSON, and arrays.

    Maps are in 8 bits, a share of the head's largest patch, whose size stands beside them.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def described(self) -> dict[str, Any]:
        """Facts, and name, type and shape of each array; their bytes go apart."""
        return {**self.facts, "arrays": [[name, x.dtype.name, x.shape] for name, x in self.arrays.items()]}

    def written(self) -> dict[str, Any]:
        """All of it as JSON."""
        arrays = [
            [n, x.dtype.name, x.shape, base64.b64encode(x.tobytes()).decode()] for n, x in self.arrays.items()
        ]
        return {**self.facts, "arrays": arrays}


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def shares_of(patches: Float[Tensor, "head rows columns"]) -> dict[str, np.ndarray]:
    """Maps in 8 bits, as shares of each head's largest patch."""
    largest = patches.abs().amax((1, 2))
    shares = (127 * patches / largest.clamp_min(torch.finfo(patches.dtype).tiny)[:, None, None]).round()
    return {"patches": shares.to(torch.int8).flatten(1).cpu().numpy(), "largest": numbers(largest)}


def _text(name: str) -> str:
    return (files("decompclip.explorer") / name).read_text(encoding="utf-8")


JS, CSS = _text("explore.js"), _text("explore.css")


def page(title: str, state: Mapping[str, Any], answers: Sequence[Sequence[Any]]) -> str:
    """One HTML file with everything in it: nothing is fetched, and only this script may run."""
    from decompclip.figures.theme import content_policy

    script = f"{JS}\nopenSaved(document);\n"
    data = json.dumps(
        printable_all({"state": state, "answers": answers}), separators=(",", ":"), allow_nan=False
    )
    parts = {
        "policy": escape(content_policy(styles=[CSS], scripts=[script])),
        "title": escape(printable(title)),
        "css": CSS,
        "data": data.replace("<", "\\u003c"),
        "script": script,
    }
    return _text("page.html").format(**parts)
