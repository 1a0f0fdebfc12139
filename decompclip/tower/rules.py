"""Which weights of a source tower are which of ours, readable in both directions.

A rule says that the numbers of some of our weights, one after the other, are those of some of theirs:

    Rule("W_pos", "pos_embed")                                         a weight of another shape
    Rule("blocks.0.attn.W_QKV", ["attn.q.weight", "attn.k.weight"...]) several in one
    Rule("blocks.0.attn.b_QKV", ["q_bias", 768, "v_bias"])             768 zeros, which the source leaves out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Piece = str | int
"""A weight's name, or a number of zeros that have no weight."""


class Rule:
    """Our weights and theirs that hold the same numbers; `turned` where one is the transpose of the other."""

    def __init__(
        self, ours: str | Sequence[str], theirs: str | Sequence[Piece], *, turned: bool = False
    ) -> None:
        self.ours = (ours,) if isinstance(ours, str) else tuple(ours)
        self.theirs: tuple[Piece, ...] = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        self.turned = turned

    @property
    def names(self) -> Iterator[str]:
        return (piece for piece in self.theirs if isinstance(piece, str))

    def forward(self, source: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our weights."""
        if len(self.ours) == 1 and isinstance(name := self.theirs[0], str) and len(self.theirs) == 1:
            (ours,) = self.ours
            weight = source[name].detach()
            return {ours: (weight.T.contiguous() if self.turned else weight).view(shapes[ours])}
        like = source[next(self.names, next(iter(source)))]
        parts = [
            like.new_zeros(piece) if isinstance(piece, int) else source[piece].detach().flatten()
            for piece in self.theirs
        ]
        return _cut(parts, self.ours, shapes)

    def backward(self, ours: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Their weights.

        Raises:
            ValueError: numbers that the source has no weight for were changed from zero.
        """
        if self.turned:
            (name,) = self.names
            return {name: ours[self.ours[0]].detach().T.contiguous().view(shapes[name])}
        keys = [piece if isinstance(piece, str) else f"zeros {i}" for i, piece in enumerate(self.theirs)]
        sizes = {
            key: torch.Size([piece])
            for key, piece in zip(keys, self.theirs, strict=True)
            if isinstance(piece, int)
        }
        cut = _cut([ours[name].detach().flatten() for name in self.ours], keys, {**shapes, **sizes})
        for key in sizes:
            if cut.pop(key).any():
                raise ValueError(
                    f"expected zeros in {' and '.join(self.ours)} where the source tower has no weight; received others; "
                    "the source's architecture cannot hold this edit"
                )
        return cut


def _cut(parts: list[Tensor], names: Sequence[str], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    cut = whole.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, cut, strict=True)}


@dataclass(frozen=True)
class Names:
    """Builds rules under two prefixes: ours and theirs."""

    ours: str = ""
    theirs: str = ""

    def under(self, ours: str, theirs: str) -> Names:
        return Names(self.ours + ours, self.theirs + theirs)

    def rule(self, ours: str | Sequence[str], theirs: str | Sequence[Piece], *, turned: bool = False) -> Rule:
        ours = (ours,) if isinstance(ours, str) else ours
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        pieces = [self.theirs + piece if isinstance(piece, str) else piece for piece in theirs]
        return Rule([self.ours + name for name in ours], pieces, turned=turned)

    def rules(self, pairs: Mapping[str, str | Sequence[Piece]]) -> list[Rule]:
        """One of each pair of ours and theirs."""
        return [self.rule(ours, theirs) for ours, theirs in pairs.items()]

    def norm(self, ours: str, theirs: str) -> list[Rule]:
        """A LayerNorm's two weights."""
        return self.rules({f"{ours}.w": f"{theirs}.weight", f"{ours}.b": f"{theirs}.bias"})

    def linear(self, weight: str, bias: str, theirs: str, layer: nn.Linear) -> list[Rule]:
        """A linear layer; zeros where it has no bias."""
        biased = [f"{theirs}.bias"] if layer.bias is not None else [layer.out_features]
        return self.rules({weight: f"{theirs}.weight", bias: biased})

    def module(self, ours: str, theirs: str, module: nn.Module) -> list[Rule]:
        """All that a module keeps, taken over as it is."""
        return self.rules({f"{ours}.{name}": f"{theirs}.{name}" for name in module.state_dict()})
