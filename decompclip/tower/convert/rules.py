"""Which image towers have no exact decomposition here, and why.

Rules: which weights of a source tower are which of ours, readable in both directions.

A rule says that the numbers of some of our weights, one after the other, are those of some of theirs:

    Rule("W_pos", ("pos_embed",))                                     a weight of another shape
    Rule("blocks.0.attn.W_QKV", ("attn.q.weight", "attn.k.weight"...)) several in one
    Rule("blocks.0.attn.b_QKV", ("q_bias", 768, "v_bias"))            768 zeros, which the source leaves out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from decompclip.tower.config import UnsupportedTowerError

SUPPORTED = "every transformer tower of open_clip's: native ViT, CLIPA, CoCa, SigLIP, MobileCLIP-B/-L, ViTamin, EVA, PE"

WHY_NOT = {
    "resnet": "it is a ResNet: it has no attention heads that write to a residual stream",
    "conv": "it is a convolutional network: it has no attention heads that write to a residual stream of tokens",
    "windows": "it is a Swin Transformer: its tokens are merged from stage to stage, so that no one stream of tokens "
    "goes through it",
    "foreign": "it is no image tower of open_clip's",
    "pool": "its feature is pooled in a way that has no frozen linear map",
    "block": "its blocks hold norms, gates or scales that no tower of open_clip's has",
    "activation": "its MLPs use an activation that is not known",
    "norm": "its norms are no LayerNorms of one epsilon",
}

# timm's modules of model definitions.
TRANSFORMERS = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "eva",
    "vitamin",
)
WINDOWS = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


def refuse(name: str, oddities: Sequence[str]) -> None:
    """Raise `UnsupportedTowerError` where a tower has any of `WHY_NOT`'s oddities."""
    if oddities:
        reasons = "; ".join(WHY_NOT[oddity] for oddity in oddities)
        raise UnsupportedTowerError(
            f"the image tower {name!r} is not supported: {reasons}. Supported: {SUPPORTED}"
        )


def oddities(vision_cfg: Mapping[str, Any]) -> list[str]:
    """What in open_clip's `vision_cfg` rules out a decomposition, before anything is built."""
    if name := vision_cfg.get("timm_model_name"):
        if timm.models.is_model_in_modules(name, TRANSFORMERS):
            return []
        return ["windows" if timm.models.is_model_in_modules(name, WINDOWS) else "conv"]
    return ["resnet"] if isinstance(vision_cfg.get("layers"), list | tuple) else []


def one_epsilon(name: str, module: nn.Module, skip: tuple[str, ...] = ()) -> float:
    """The epsilon that all LayerNorms of a tower share, but for those under the prefixes to skip.

    Raises:
        UnsupportedTowerError: they have several, or there is none.
    """
    found = {
        m.eps
        for path, m in module.named_modules()
        if isinstance(m, nn.LayerNorm) and not path.startswith(skip or ("\0",))
    }
    if len(found) != 1:
        refuse(name, ["norm"])
    return found.pop()


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
        return _cut([_flat(piece, source, like) for piece in self.theirs], self.ours, shapes)

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


def _flat(piece: Piece, source: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return like.new_zeros(piece) if isinstance(piece, int) else source[piece].detach().flatten()


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

    def norm(self, ours: str, theirs: str) -> list[Rule]:
        """A LayerNorm's two weights."""
        return [self.rule(f"{ours}.w", f"{theirs}.weight"), self.rule(f"{ours}.b", f"{theirs}.bias")]

    def module(self, ours: str, theirs: str, module: nn.Module) -> list[Rule]:
        """All that a module keeps, taken over as it is."""
        return [self.rule(f"{ours}.{name}", f"{theirs}.{name}") for name in module.state_dict()]
