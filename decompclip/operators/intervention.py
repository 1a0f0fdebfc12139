"""Intervention: one edit, in two modes.

edit(d)                                   direct: the terms alone are edited, as in the paper
with visual.hooks(edit.fwd_hooks(visual)) causal: the stream is edited, and later layers see it
first | second                            both, left first
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.cache.components import ComponentMask
from decompclip.cache.decomposition import Decomposition
from decompclip.models.vit import Hook, HookedViT

Rows = Literal["all", "pooled"]
Where = Bool[Tensor, "batch layer head"]


class Intervention(ABC):
    """An edit of components, applied to terms (direct) or inside a forward pass (causal).

    `where` restricts it to some heads of some images (MLPs and the embedding are not restricted).
    """

    @abstractmethod
    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """The decomposition with edited terms; the same object where nothing is edited.

        Raises:
            IndexError: the edit names a layer or head that `d` does not have.
            ValueError: `where`, or what the edit was made from, does not fit `d`.
        """

    @abstractmethod
    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """The edit as hooks for `visual.hooks(...)` or `visual.run_with_hooks(images, fwd_hooks=...)`.

        Raises:
            IndexError: the edit names a layer or head that the tower does not have.
            ValueError: what the edit was made from does not fit the tower.
        """

    def __or__(self, other: Intervention) -> Composition:
        return (
            Composition((*_steps(self), *_steps(other)))
            if isinstance(other, Intervention)
            else NotImplemented
        )


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Intervention):
    """Interventions one after the other; of none, the identity."""

    steps: tuple[Intervention, ...] = ()

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        for step in self.steps:
            d = step(d, where=where)
        return d

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        return [hook for step in self.steps for hook in step.fwd_hooks(visual, where=where)]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.steps)) or "Composition()"


def _steps(intervention: Intervention) -> tuple[Intervention, ...]:
    return intervention.steps if isinstance(intervention, Composition) else (intervention,)


@dataclass(frozen=True, eq=False)
class Fill:
    """What stands in for heads, MLPs and the embedding: of terms (direct) or of the stream (causal).

    The leading axes of the parts are `[layer head]`, `[layer]`, `[]` for terms and
    `[layer token head]`, `[layer token]`, `[token]` for the stream, where one token serves for all.
    """

    heads: Float[Tensor, "layer *token head coord"]
    mlps: Float[Tensor, "layer *token width"]
    embed: Float[Tensor, "*token width"]


def edit_terms(d: Decomposition, mask: ComponentMask, fill: Fill, where: Where | None) -> Decomposition:
    """Terms of `d` replaced where `mask`, and for heads also `where`, say so.

    Raises:
        ValueError: `where` is of another shape than `[batch, layer, head]`.
    """
    check_where(where, (len(d), d.n_layers, d.n_heads))
    edited: dict[str, Tensor] = {}
    device = d.coords.device
    if mask.heads.any():
        chosen = mask.heads.to(device) if where is None else mask.heads.to(device) & where.to(device)
        edited["coords"] = torch.where(chosen[..., None], fill.heads.to(d.coords), d.coords)
    if mask.mlps.any():
        edited["mlps"] = torch.where(mask.mlps.to(device)[:, None], fill.mlps.to(d.mlps), d.mlps)
    if mask.embed:
        edited["embed"] = fill.embed.to(d.embed).expand_as(d.embed)
    return d.edit(**edited)


def edit_stream(mask: ComponentMask, fill: Fill, *, rows: Rows, where: Where | None) -> list[Hook]:
    """Hooks that replace z, MLP outputs and the input of block 0, at all tokens or at the pooled row."""
    n_layers, n_heads = mask.heads.shape
    hooks: list[Hook] = [("hook_ln_pre", _writer(fill.embed, rows))] if mask.embed else []
    for layer in range(n_layers):
        if mask.heads[layer].any():

            def edit_z(z: Tensor, hook: Any, layer: int = layer) -> Tensor:
                chosen = mask.heads[layer].to(z.device).expand(len(z), 1, n_heads)
                if where is not None:
                    check_where(where, (len(z), n_layers, n_heads))
                    chosen = chosen & where[:, None, layer].to(z.device)
                return _write(z, fill.heads[layer], rows, chosen[..., None])

            hooks.append((f"blocks.{layer}.attn.hook_z", edit_z))
        if mask.mlps[layer]:
            hooks.append((f"blocks.{layer}.hook_mlp_out", _writer(fill.mlps[layer], rows)))
    return hooks


def _writer(fill: Tensor, rows: Rows) -> Any:
    return lambda x, hook: _write(x, fill, rows)


def _write(x: Tensor, fill: Tensor, rows: Rows, chosen: Tensor | None = None) -> Tensor:
    """`x [batch, token, ...]` with `fill [token, ...]` at the chosen places of the rows."""
    here = x[:, :1] if rows == "pooled" else x
    # The last block may compute token 0 alone.
    fill = fill[: here.shape[1]].to(x).expand_as(here)
    new = fill if chosen is None else torch.where(chosen, fill, here)
    return torch.cat([new, x[:, 1:]], dim=1) if rows == "pooled" else new


def check_where(where: Tensor | None, expected: tuple[int, int, int]) -> None:
    """Raises ValueError unless `where` is a mask of the expected shape (or there is none)."""
    if where is not None and (tuple(where.shape) != expected or where.dtype != torch.bool):
        raise ValueError(
            f"expected where as a boolean mask [batch, layer, head] = {list(expected)}; received {where.dtype} "
            f"{list(where.shape)}; give one row for each image of this very batch"
        )


def check_rows(rows: str) -> None:
    """Raises ValueError unless `rows` is a known choice."""
    if rows not in get_args(Rows):
        raise ValueError(f"expected rows of {get_args(Rows)}; received {rows!r}")
